"""A power cut. QEMU is killed at some moment; what it had asked of the image until then was recorded below the format,
and every state that a power cut at any moment could leave is explored."""

import signal

from powercut.endings import Running
from powercut.guest.ledger import Keeps

KEEPS = Keeps.FLUSHED
LEAKS = True
RECORDED = True


def end(running: Running) -> None:
    running.machine.send(signal.SIGKILL)
    running.machine.wait_end()
