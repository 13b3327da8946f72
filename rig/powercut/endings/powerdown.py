"""The ACPI power button: the guest flushes, switches itself off, and QEMU ends."""

from powercut.endings import Running
from powercut.guest.ledger import Keeps

KEEPS = Keeps.COMPLETED
PATIENCE = 120.0  # seconds that a guest may take to shut down


def end(running: Running) -> None:
    running.machine.ask("system_powerdown")
    running.machine.wait_end(PATIENCE)
