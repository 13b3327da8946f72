"""The guest flushes and switches itself off, without having been asked through the hypervisor."""

from powercut.endings import Running
from powercut.guest.ledger import Keeps

KEEPS = Keeps.COMPLETED
AGENT = True


def end(running: Running) -> None:
    running.machine.agent.poweroff()
    running.machine.wait_end()
