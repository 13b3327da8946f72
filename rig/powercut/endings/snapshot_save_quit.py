"""The job snapshot-save, then quit. A snapshot of the loop before is deleted first, by a job, too."""

from typing import Any

from powercut.endings import Running
from powercut.endings.savevm_quit import PATIENCE, note
from powercut.errors import EnvironmentFault
from powercut.guest.ledger import Keeps

KEEPS = Keeps.COMPLETED
HEADER = True
_NAME = "loop"


def _run_job(running: Running, command: str, **arguments: Any) -> None:
    """Run a job to its end. Raises EnvironmentFault: a job that failed is concluded, too, and bears an error."""
    machine, job = running.machine, f"{command}-job"
    machine.ask(command, job_id=job, tag=_NAME, **arguments)
    machine.wait_event("JOB_STATUS_CHANGE", PATIENCE, id=job, status="concluded")
    errors = [each["error"] for each in machine.ask("query-jobs") if each["id"] == job and "error" in each]
    machine.ask("job-dismiss", id=job)
    if errors:
        raise EnvironmentFault(f"QEMU: {command}: {errors[0]}")


def end(running: Running) -> None:
    nodes = [f"disk{number}" for number in range(len(running.images))]
    known = [each.get("image", {}).get("snapshots", []) for each in running.machine.ask("query-named-block-nodes")]
    if any(snapshot["name"] == _NAME for snapshots in known for snapshot in snapshots):
        _run_job(running, "snapshot-delete", devices=nodes)
    note(running, _NAME)
    _run_job(running, "snapshot-save", vmstate=nodes[0], devices=nodes)
    running.machine.ask("quit")
    running.machine.wait_end()
