"""One case of an error under a format: run against a real QEMU, and judged.

A case is a history and, perhaps, a failure (`powercut.faults`). The image is opened over it in a live storage daemon; a
guest that repeats what fails (`powercut.guest.stubborn`) carries out the history and reads its disk; the image is
closed, opened again with nothing in the way, read, closed, and checked with qemu-img. Content comes first, the checker
second.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from powercut import stamp
from powercut.errors import EnvironmentFault, InputError
from powercut.faults import NODE, Armed, Failure, blkdebug, unharmed
from powercut.faults.blkdebug import Counter
from powercut.faults.reopened import SAID, Fault, Reopened, content, judged, whole
from powercut.faults.target import Target
from powercut.guest.control import Control, Guest
from powercut.guest.daemon import create_image
from powercut.guest.expectation import Expectation, Range
from powercut.guest.stubborn import TRIES, Seen, Served, Stubborn
from powercut.guest.workload import Operation, Verb
from powercut.oracles.readback import first_wrong
from powercut.scratch import scratch
from powercut.stamp import SECTOR
from powercut.verdict import Severity


class Case(NamedTuple):
    history: tuple[Operation, ...]
    failure: Failure | None = None


@dataclass(slots=True)
class Ran:
    """What one run of a case showed. `opened`: whether the image could be opened at all, sooner or later; `legal`: what
    the guest may expect in the end."""

    faults: list[Fault] = field(default_factory=list)
    legal: list[Range] = field(default_factory=list)
    seen: Seen = field(default_factory=Seen)
    opened: bool = False
    leaks: int = 0


class Rig:
    """A storage daemon used for one case after the other, in a directory of its own (`scratch`); a context manager.

    Raises EnvironmentFault if QEMU's tools are missing, or do not know the format."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self._stack = ExitStack()
        self.scratch = self._stack.enter_context(scratch())
        self._path, self._template = self.scratch / "image", self.scratch / "template"
        base = None
        if target.backing:
            base = self.scratch / "base"
            base.write_bytes(stamp.make(0, 0, 0, target.backing // SECTOR))
        try:
            create_image(self._template, target.format, target.size, target.all_options, base)
        except EnvironmentFault:
            self._stack.close()
            raise
        self._control: Control | None = None
        self.reopened = Reopened(target, self._daemon, self._lose, self.scratch)

    def __enter__(self) -> Rig:
        return self

    def __exit__(self, *_: object) -> None:
        self._lose()
        self._stack.close()

    def _daemon(self) -> Control:
        if self._control is None:
            self._control = Control()
        return self._control

    def _lose(self) -> None:
        if self._control is not None:
            self._control.close()
            self._control = None

    # ---- counting

    def count(self, history: tuple[Operation, ...], event: str) -> int:
        """How often `event` is raised while the history is carried out, without any error, from open to close.

        The guest reads nothing then: that raises the event with which a `Counter` asks."""
        control = self._daemon()
        for most in blkdebug.AT_MOST:
            with unharmed(self._template, self._path) as plain:
                below = blkdebug.node(plain.node, blkdebug.counting(event, most))
                control.ask("blockdev-add", **{**below, "node-name": NODE})
                with Counter(control, self.scratch / "overlay", event) as counter:
                    self._use(history, Ran(), self._expectation(history), reads=False)
                    number = counter.read(most)
                control.when_free("blockdev-del", node_name=NODE)
            if number is not None:
                return number
        raise InputError(f"{event} is raised more than {most} times: choose a shorter history")

    def occasions(self, history: tuple[Operation, ...], harmless: Failure) -> int:
        """How many occasions to fail there are while the history is carried out, from open to close, by the count of a
        failure that does not come to pass."""
        with harmless.armed(self._template, self._path) as armed:
            self.carry_out(armed, history, Ran(), self._expectation(history))
            return armed.occasions()

    # ---- running

    def run(self, case: Case, keep: Path | None = None) -> Ran:
        """Run a case once. `keep`: where to put the image as the guest left it. Raises EnvironmentFault only for what
        is no fault of QEMU's."""
        ran = Ran()
        expectation = self._expectation(case.history)
        arm = case.failure.armed if case.failure else unharmed
        with arm(self._template, self._path) as armed:
            self.carry_out(armed, case.history, ran, expectation)
        if keep is not None:
            shutil.copyfile(self._path, keep)
        after = self.reopened.look(self._path)
        ran.leaks, ran.legal = after.leaks, expectation.kept
        ran.faults += judged(case.history, after, ran.legal)
        return ran

    def carry_out(self, armed: Armed, history: tuple[Operation, ...], ran: Ran, expectation: Expectation) -> None:
        """What a guest does with an image, from the opening of its file to the end."""
        control = self._daemon()
        control.ask("blockdev-add", **{**armed.node, "node-name": NODE})
        try:
            self._use(history, ran, expectation, armed.noticed)
            control.when_free("blockdev-del", node_name=NODE)
        except EnvironmentFault as fault:
            ran.faults.append(_lost(control, fault))
            self._lose()

    def _expectation(self, history: tuple[Operation, ...]) -> Expectation:
        borders = [end for op in history for end in (op.offset, op.offset + op.length)]
        return Expectation(self.target.size, borders, min(self.target.backing, self.target.size))

    def _use(
        self,
        history: tuple[Operation, ...],
        ran: Ran,
        expectation: Expectation,
        noticed: Callable[[], None] = lambda: None,
        *,
        reads: bool = True,
    ) -> None:
        """What a guest does from its start to its end. It `reads` its disk before each end."""
        number = 1
        for part in parts(history):
            guest = self._open(noticed)
            if guest is None:
                return
            if guest.size < self.target.size:
                raise InputError(f"size: of {self.target.size} bytes QEMU made a disk of {guest.size}")
            ran.opened = True
            stubborn = Stubborn(Served(guest), expectation, ran.seen, noticed, self.target.depth)
            stubborn.run(part, number)
            number += len(part) + 1
            if reads:
                self._look(guest, history, ran, expectation)
            self._daemon().shut(guest)

    def _look(self, guest: Guest, history: tuple[Operation, ...], ran: Ran, expectation: Expectation) -> None:
        try:
            wrong = first_wrong(whole(guest), 0, expectation.now)
        except OSError:  # where everything fails, reads do
            return
        if wrong:
            ran.faults.append(content("live", wrong, history, Severity.SILENT))

    def _open(self, noticed: Callable[[], None]) -> Guest | None:
        """Open the image. That fails too if its requests do: try again, as people do."""
        for _ in range(TRIES):
            try:
                return self._daemon().open(self.target.node(NODE))
            except EnvironmentFault:
                if self._daemon().ended:
                    raise
                noticed()
        return None


def parts(history: tuple[Operation, ...]) -> list[tuple[Operation, ...]]:
    """A history between its reopens."""
    parts: list[tuple[Operation, ...]] = [()]
    for operation in history:
        if operation.verb is Verb.REOPEN:
            parts.append(())
        else:
            parts[-1] += (operation,)
    return parts


def _lost(control: Control, fault: EnvironmentFault) -> Fault:
    """The daemon is gone, or does not answer."""
    if control.ended:
        return Fault("alive", "crash", Severity.LOSS, f"QEMU ended by itself: {control.said[-SAID:]}")
    return Fault("alive", "hang", Severity.LOSS, f"QEMU does not answer: {fault}")
