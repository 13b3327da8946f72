"""As `powercut.faults.injection`, with a real guest: its disk is a device of a virtual machine, and `werror` says what
the machine does when a request fails.

"report": the guest hears of it, and repeats it. "stop": the machine stops; its host does what is to be done and lets
it go on, and QEMU itself repeats the request. "enospc": stops when the disk is full, and reports else. "ignore": the
guest hears that all is well; what it loses then is no surprise, and a control.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from powercut.errors import Crashed, EnvironmentFault, Unanswered
from powercut.faults import Armed
from powercut.faults.injection import Ran, Rig, parts
from powercut.faults.reopened import Fault
from powercut.faults.target import Target
from powercut.guest import start
from powercut.guest.accelerator import choose
from powercut.guest.agent import Gone
from powercut.guest.expectation import Expectation
from powercut.guest.hardware import Disk, Hardware
from powercut.guest.kernel import kernel
from powercut.guest.machine import Machine
from powercut.guest.stubborn import TRIES, Stubborn
from powercut.guest.workload import Operation
from powercut.trace import Kind
from powercut.verdict import Severity

WERROR: Final = ("report", "stop", "enospc", "ignore")
_QEMU: Final = "qemu-system-x86_64"
_LOOK = 0.2  # seconds without an answer until somebody looks whether the machine has stopped
_PATIENCE = 30.0


class _Stuck(Exception):
    """The machine stops again and again."""


class _Device:
    """The guest's disk."""

    def __init__(self, machine: Machine, noticed: Callable[[], None]) -> None:
        self._machine, self._noticed = machine, noticed
        self.stops = 0

    def submit(self, tag: int, operation: Operation, data: bytes) -> None:
        """The guest makes the stamps of a write itself."""
        agent, offset, length = self._machine.agent, operation.offset, operation.length
        if operation.kind is Kind.WRITE:
            agent.write(tag, 0, offset, length, tag, 0)
        elif operation.kind is Kind.ZERO:
            agent.zero(tag, 0, offset, length, unmap=operation.unmap)
        elif operation.kind is Kind.DISCARD:
            agent.discard(tag, 0, offset, length)
        else:
            agent.flush(tag, 0)

    def wait(self) -> tuple[int, int]:
        """Where the machine has stopped, mend what can be mended and let it go on."""
        deadline, stops = time.monotonic() + _PATIENCE, 0
        while True:
            with suppress(Unanswered):
                answer = self._machine.agent.wait(_LOOK)
                return answer.tag, answer.error
            if self._machine.ask("query-status")["status"] == "io-error":
                stops += 1
                self.stops += 1
                if stops > TRIES:
                    raise _Stuck
                self._noticed()
                self._machine.ask("cont")
            elif time.monotonic() > deadline:
                raise Unanswered(f"the guest gave no answer for {_PATIENCE:g} s")


class PoweredRig(Rig):
    """Cases with a virtual machine around the disk. Raises EnvironmentFault where there can be none."""

    def __init__(self, target: Target, werror: str) -> None:
        guest = kernel()
        self._hardware = Hardware(choose(_QEMU, guest).name, guest, _QEMU)
        self._werror = werror
        super().__init__(target)

    def carry_out(self, armed: Armed, history: tuple[Operation, ...], ran: Ran, expectation: Expectation) -> None:
        number = 1
        for part in parts(history):
            try:
                self._live(armed, part, number, ran, expectation)
            except Crashed as crash:
                ran.faults.append(Fault("alive", "crash", Severity.LOSS, str(crash)))
            except (Unanswered, Gone) as error:
                ran.faults.append(Fault("alive", "hang", Severity.LOSS, f"the guest does not answer: {error}"))
            number += len(part) + 1

    def _live(self, armed: Armed, part: tuple[Operation, ...], first: int, ran: Ran, expectation: Expectation) -> None:
        disk = Disk(self.target.node(armed.node), self.target.size, errors=self._werror)
        home = self.scratch / "machine"
        home.mkdir(exist_ok=True)
        machine = None
        for _ in range(TRIES):  # the image does not open while its requests fail
            with suppress(EnvironmentFault):
                machine = start.restore(self._hardware, [disk], home)
                break
            armed.noticed()
        if machine is None:
            return
        ran.opened = True
        with machine:
            device = _Device(machine, armed.noticed)
            with suppress(_Stuck):
                Stubborn(device, expectation, ran.seen, armed.noticed, self.target.depth).run(part, first)
            ran.seen.stops += device.stops
            machine.ask("quit")
            machine.wait_end()
