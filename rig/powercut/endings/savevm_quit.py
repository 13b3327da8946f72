"""savevm, then quit: the loop of the report of 2009. The snapshot has the same name each time and replaces the last."""

import copy

from powercut.endings import Running
from powercut.errors import EnvironmentFault
from powercut.guest.ledger import Keeps

KEEPS = Keeps.COMPLETED
HEADER = True
PATIENCE = 300.0  # seconds: all of the guest's memory is written


def note(running: Running, name: str) -> None:
    """A snapshot is about to be taken: what is completed must be in it, and what is in flight may be."""
    if running.writing is not None:
        running.snapshots[name] = copy.deepcopy(running.writing.ledgers)


def savevm(running: Running, name: str) -> None:
    """Raises EnvironmentFault: savevm tells of its failures as text."""
    note(running, name)
    said = running.machine.monitor(f"savevm {name}", PATIENCE)
    if said:
        raise EnvironmentFault(f"QEMU: savevm: {said}")


def end(running: Running) -> None:
    savevm(running, "loop")
    running.machine.ask("quit")
    running.machine.wait_end()
