"""SIGKILL: QEMU is gone at once. No power cut: the host's page cache survives, and all that was written is in it."""

import signal

from powercut.endings import Running
from powercut.guest.ledger import Keeps

KEEPS = Keeps.FLUSHED
LEAKS = True


def end(running: Running) -> None:
    running.machine.send(signal.SIGKILL)
    running.machine.wait_end()
