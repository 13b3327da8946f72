"""SIGTERM: QEMU shuts down as for quit."""

import signal

from powercut.endings import Running
from powercut.guest.ledger import Keeps

KEEPS = Keeps.COMPLETED


def end(running: Running) -> None:
    running.machine.send(signal.SIGTERM)
    running.machine.wait_end()
