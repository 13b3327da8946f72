"""The reset button, then quit while the guest boots again."""

from powercut.endings import Running
from powercut.guest.ledger import Keeps

KEEPS = Keeps.COMPLETED


def end(running: Running) -> None:
    running.machine.ask("system_reset")
    running.machine.wait_event("RESET")
    running.machine.ask("quit")
    running.machine.wait_end()
