"""savevm, then quit: the loop of the report of 2009. The snapshot has the same name each time and replaces the last."""

from powercut.endings import Running
from powercut.errors import EnvironmentFault
from powercut.guest.ledger import Keeps

KEEPS = Keeps.COMPLETED
HEADER = True
PATIENCE = 300.0  # seconds: all of the guest's memory is written


def savevm(running: Running, name: str) -> None:
    """Raises EnvironmentFault: savevm tells of its failures as text."""
    said = running.machine.monitor(f"savevm {name}", PATIENCE)
    if said:
        raise EnvironmentFault(f"QEMU: savevm: {said}")


def end(running: Running) -> None:
    savevm(running, "loop")
    running.machine.ask("quit")
    running.machine.wait_end()
