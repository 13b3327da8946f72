"""As `powercut.injection`, with a real guest: its disk is a device of a virtual machine, and `werror` says what the
machine does when a request fails.

"report": the guest hears of it, and repeats it. "stop": the machine stops; its host does what is to be done and lets
it go on, and QEMU itself repeats the request. "enospc": stops when the disk is full, and reports else. "ignore": the
guest hears that all is well; what it loses then is no surprise, and a control.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from powercut.errors import Crashed, EnvironmentFault, Unanswered
from powercut.faults import Armed
from powercut.guest import start
from powercut.guest.accelerator import choose
from powercut.guest.agent import Gone
from powercut.guest.expectation import Expectation
from powercut.guest.hardware import Disk, Hardware
from powercut.guest.kernel import kernel
from powercut.guest.machine import Machine
from powercut.guest.stubborn import TRIES, Stubborn
from powercut.guest.workload import Operation
from powercut.injection import Fault, Ran, Rig, Target, parts
from powercut.verdict import Severity

WERROR: Final = ("report", "stop", "enospc", "ignore")
_QEMU: Final = "qemu-system-x86_64"
_LOOK = 0.2  # seconds without an answer until somebody looks whether the machine has stopped
_PATIENCE = 30.0


class _Stuck(Exception):
    """The machine stops again and again."""


class _Device:
    """The guest's disk, one request at a time. Errors are OSErrors of the guest's."""

    def __init__(self, machine: Machine, noticed: Callable[[], None]) -> None:
        self._machine, self._noticed = machine, noticed
        self._tag = 0
        self.stops = 0

    def write(self, offset: int, data: bytes) -> None:
        """Write stamps: the guest makes them itself, from the number they bear."""
        self._tag += 1
        self._machine.agent.write(self._tag, 0, offset, len(data), int.from_bytes(data[:8], "little"), 0)
        self._wait()

    def zero(self, offset: int, length: int, may_unmap: bool = False) -> None:
        self._tag += 1
        self._machine.agent.zero(self._tag, 0, offset, length, unmap=may_unmap)
        self._wait()

    def discard(self, offset: int, length: int) -> None:
        self._tag += 1
        self._machine.agent.discard(self._tag, 0, offset, length)
        self._wait()

    def flush(self) -> None:
        self._tag += 1
        self._machine.agent.flush(self._tag, 0)
        self._wait()

    def _wait(self) -> None:
        """Wait for the answer; where the machine has stopped, mend what can be mended and let it go on."""
        deadline, stops = time.monotonic() + _PATIENCE, 0
        while True:
            try:
                answer = self._machine.agent.wait(_LOOK)
            except Unanswered:
                if self._machine.ask("query-status")["status"] == "io-error":
                    stops += 1
                    self.stops += 1
                    if stops > TRIES:
                        raise _Stuck from None
                    self._noticed()
                    self._machine.ask("cont")
                elif time.monotonic() > deadline:
                    raise
                continue
            if answer.tag == self._tag:
                break
        if answer.error:
            raise OSError(answer.error, os.strerror(answer.error))


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
        disk = Disk(self.node(armed.node), self.target.size, errors=self._werror)
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
                Stubborn(device, expectation, ran.seen, armed.noticed).run(part, first)
            ran.seen.stops += device.stops
            machine.ask("quit")
            machine.wait_end()
