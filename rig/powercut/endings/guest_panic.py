"""The guest's kernel panics and resets the machine, which ends QEMU."""

from powercut.endings import Running
from powercut.guest.ledger import Keeps

KEEPS = Keeps.COMPLETED
AGENT = True


def end(running: Running) -> None:
    running.machine.ask("set-action", reboot="shutdown")
    running.machine.agent.panic()
    running.machine.wait_event("SHUTDOWN", reason="guest-reset")
    running.machine.wait_end()
