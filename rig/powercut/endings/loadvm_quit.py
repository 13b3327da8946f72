"""savevm, more work, loadvm, then quit: the disk is as it was when the snapshot was taken."""

import copy

from powercut.endings import Running
from powercut.endings.savevm_quit import PATIENCE, savevm
from powercut.errors import EnvironmentFault, InputError
from powercut.guest.ledger import Keeps

KEEPS = Keeps.COMPLETED
HEADER = True
AGENT = True
_MORE = 20  # answers of the guest's disk between the two


def end(running: Running) -> None:
    machine, writing = running.machine, running.writing
    if writing is None:
        raise InputError("ending loadvm-quit does not go with --filesystem")
    writing.drain()
    then = copy.deepcopy(writing.ledgers)
    savevm(running, "loop")
    writing.run(_MORE)
    said = machine.monitor("loadvm loop", PATIENCE)
    if said:
        raise EnvironmentFault(f"QEMU: loadvm: {said}")
    writing.forget(then)
    machine.ask("quit")
    machine.wait_end()
