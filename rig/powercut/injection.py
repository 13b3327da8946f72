"""One case of an error under a format: run against a real QEMU, and judged.

A case is a history and, perhaps, a failure (`powercut.faults`). The image is opened over it in a live storage daemon; a
guest that repeats what fails (`powercut.guest.stubborn`) carries out the history and reads its disk; the image is
closed, opened again with nothing in the way, read, closed, and checked with qemu-img. Content comes first, the checker
second.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections import OrderedDict
from collections.abc import Callable, Collection
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

import xxhash

from powercut import stamp
from powercut.errors import EnvironmentFault, InputError
from powercut.faults import NODE, Armed, Failure, blkdebug, unharmed
from powercut.faults.blkdebug import Counter
from powercut.guest.control import Control, Guest
from powercut.guest.daemon import create_image, tool
from powercut.guest.expectation import Expectation, Range
from powercut.guest.scratch import scratch
from powercut.guest.stubborn import TRIES, Seen, Served, Stubborn
from powercut.guest.workload import Operation, Verb
from powercut.oracles.readback import Wrong, first_wrong
from powercut.scenario import parse_size
from powercut.stamp import GARBAGE, SECTOR, ZERO
from powercut.trace import Kind
from powercut.verdict import Severity

_REMEMBERED = 16  # images whose content and check are kept
_PIECE = 16 << 20  # bytes that are read at once: NBD allows twice as many
_FIRST_LINES = 300  # characters of what QEMU said that go into a finding
_CLUSTER = "cluster_size"


class Layout(NamedTuple):
    """How an image is made: options beside the user's, the option that sets the cluster size, and that size."""

    options: dict[str, str]
    cluster_option: str | None
    cluster: str


LAYOUTS: Final = {  # every format that QEMU 7.2 writes in place
    "qcow2": Layout({}, _CLUSTER, "64k"),
    "qed": Layout({}, _CLUSTER, "64k"),
    "vdi": Layout({}, None, "1M"),
    "vmdk": Layout({}, None, "64k"),
    "vpc": Layout({"force_size": "on"}, None, "2M"),  # or the size is rounded to what old BIOSes can express
    "vhdx": Layout({"block_size": "1M"}, "block_size", "1M"),  # QEMU's own choice would be 8M
    "parallels": Layout({}, _CLUSTER, "1M"),
    "raw": Layout({}, None, "64k"),
}
CHECKED: Final = frozenset({"qcow2", "qed", "vdi", "vmdk", "vhdx", "parallels"})  # by qemu-img check


@dataclass(frozen=True, slots=True)
class Target:
    """What is under test: an image of `size` bytes, over `backing` bytes of something else (0: none); its guest has
    `depth` requests in flight at once."""

    format: str
    size: int
    options: tuple[tuple[str, str], ...] = ()
    backing: int = 0
    depth: int = 1

    @property
    def all_options(self) -> dict[str, str]:
        return {**LAYOUTS[self.format].options, **dict(self.options)}

    @property
    def cluster(self) -> int:
        return cluster(self.format, self.options)


def cluster(format: str, options: Collection[tuple[str, str]]) -> int:
    """Bytes of a cluster, or what the format calls so."""
    layout = LAYOUTS[format]
    return parse_size(dict(options).get(layout.cluster_option or "", layout.cluster))


class Case(NamedTuple):
    history: tuple[Operation, ...]
    failure: Failure | None = None


class Fault(NamedTuple):
    """What was wrong. `kind` is a word for the machine, `text` a sentence. `missing`: what a sector should hold and
    does not, as the operation that wrote it and the sector; only if one operation alone may be there."""

    rule: str  # opens, structure, acknowledged, alive
    kind: str
    severity: Severity
    text: str
    missing: tuple[int, int] | None = None


@dataclass(slots=True)
class Ran:
    """What one run of a case showed. `opened`: whether the image could be opened at all, sooner or later; `legal`: what
    the guest may expect in the end."""

    faults: list[Fault] = field(default_factory=list)
    legal: list[Range] = field(default_factory=list)
    seen: Seen = field(default_factory=Seen)
    opened: bool = False
    leaks: int = 0


class After(NamedTuple):
    """An image after everything. `refused`: why it did not open; then `content` is what it holds after a repair, None
    if that did not help. `corruptions` and `leaks` are qemu-img check's."""

    content: bytes | None
    refused: str
    corruptions: int
    leaks: int
    said: str


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
        self._after: OrderedDict[bytes, After] = OrderedDict()

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

    def node(self, file: str | dict[str, Any]) -> dict[str, Any]:
        """The image's node over that of its file."""
        return {"driver": self.target.format, "discard": "unmap", "file": file}

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
        after = self.after(self._path)
        ran.leaks, ran.legal = after.leaks, expectation.kept
        ran.faults += self._judged(case.history, after, ran.legal)
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
            ran.opened = True
            stubborn = Stubborn(Served(guest), expectation, ran.seen, noticed, self.target.depth)
            stubborn.run(part, number)
            number += len(part) + 1
            if reads:
                self._look(guest, history, ran, expectation)
            self._daemon().shut(guest)

    def _look(self, guest: Guest, history: tuple[Operation, ...], ran: Ran, expectation: Expectation) -> None:
        try:
            wrong = first_wrong(self._whole(guest), 0, expectation.now)
        except OSError:  # where everything fails, reads do
            return
        if wrong:
            ran.faults.append(_content("live", wrong, history, Severity.SILENT))

    def _whole(self, guest: Guest) -> bytes:
        """What the disk holds."""
        pieces = range(0, self.target.size, _PIECE)
        return b"".join(guest.read(at, min(_PIECE, self.target.size - at)) for at in pieces)

    def _open(self, noticed: Callable[[], None]) -> Guest | None:
        """Open the image. That fails too if its requests do: try again, as people do."""
        for _ in range(TRIES):
            try:
                return self._daemon().open(self.node(NODE))
            except EnvironmentFault:
                if self._daemon().ended:
                    raise
                noticed()
        return None

    # ---- judging

    def agrees(self, kept: Path, ran: Ran, fault: Fault) -> str:
        """Which other reader of QEMU's, in a process of its own, sees the fault in an image that was kept, or ""."""
        if fault.rule == "opens":
            command = [tool("qemu-io"), "-f", self.target.format, "-c", "quit", str(kept)]
            return "qemu-io" if subprocess.run(command, capture_output=True, timeout=60).returncode else ""
        if fault.rule == "structure":
            return "qemu-img check" if self._check(kept)[0] else ""
        if fault.kind.startswith("reopened"):
            out = self.scratch / "converted"
            command = [tool("qemu-img"), "convert", "-f", self.target.format, "-O", "raw", str(kept), str(out)]
            done = subprocess.run(command, capture_output=True, timeout=60)
            return "qemu-img convert" if not done.returncode and first_wrong(out.read_bytes(), 0, ran.legal) else ""
        return ""

    def lies_at(self, kept: Path, fault: Fault) -> int | None:
        """The byte of a kept image at which a sector lies that is missing from the disk: nothing leads there."""
        if fault.missing is None or self.target.format == "raw":
            return None
        op, sector = fault.missing
        at = kept.read_bytes().find(stamp.make(op, 0, sector, 1))
        return at if at >= 0 else None

    def after(self, path: Path) -> After:
        """What QEMU makes of an image when nothing fails any more; asked once for equal images. May repair it."""
        digest = xxhash.xxh3_128_digest(path.read_bytes())
        if digest in self._after:
            self._after.move_to_end(digest)
            return self._after[digest]
        found = self._read(path)
        corruptions, leaks, said = self._check(path)
        refused = found if isinstance(found, str) else ""
        if refused and self.target.format in CHECKED:
            self._check(path, "-r", "all")
            found = self._read(path)
        content = found if isinstance(found, bytes) else None
        self._after[digest] = After(content, refused, corruptions, leaks, said)
        if len(self._after) > _REMEMBERED:
            self._after.popitem(last=False)
        return self._after[digest]

    def _read(self, path: Path) -> bytes | str:
        """What an image holds, or why it does not open. It is opened as for a guest that goes on writing."""
        try:
            guest = self._daemon().open(self.node({"driver": "file", "filename": str(path)}))
            content = self._whole(guest)
            self._daemon().shut(guest)
        except (EnvironmentFault, OSError) as error:
            self._lose()  # with whatever it has open
            return str(error)
        return content

    def _check(self, path: Path, *more: str) -> tuple[int, int, str]:
        if self.target.format not in CHECKED:
            return 0, 0, ""
        command = [tool("qemu-img"), "check", "--output=json", *more, "-f", self.target.format, str(path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        try:
            found = json.loads(done.stdout)
        except ValueError:
            return 1, 0, f"qemu-img check ended with {done.returncode}: {done.stderr.strip()[:_FIRST_LINES]}"
        corruptions = found.get("corruptions", 0) + found.get("check-errors", 0)
        return corruptions, found.get("leaks", 0), f"{corruptions} corruptions, says qemu-img check"

    def _judged(self, history: tuple[Operation, ...], after: After, legal: list[Range]) -> list[Fault]:
        faults = []
        complained = bool(after.corruptions or after.refused)
        if after.content is None:
            faults.append(Fault("opens", "refused", Severity.UNOPENABLE, after.refused))
        elif wrong := first_wrong(after.content, 0, legal):
            severity = Severity.LOSS if complained else Severity.SILENT
            faults.append(_content("reopened", wrong, history, severity))
        if after.refused and after.content is not None:
            text = f"opens only after qemu-img check -r all: {after.refused}"
            faults.append(Fault("opens", "repair", Severity.CORRUPT, text))
        elif after.corruptions:
            faults.append(Fault("structure", "check", Severity.CORRUPT, after.said))
        return faults


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
        return Fault("alive", "crash", Severity.LOSS, f"QEMU ended by itself: {control.said[-_FIRST_LINES:]}")
    return Fault("alive", "hang", Severity.LOSS, f"QEMU does not answer: {fault}")


def _content(where: str, wrong: Wrong, history: tuple[Operation, ...], severity: Severity) -> Fault:
    found = _word(wrong.op, history) + (f" for sector {wrong.of}" if wrong.kind == "foreign" else "")
    legal = " or ".join(_word(op, history) for op in sorted(wrong.legal))
    text = f"{where}: guest sector {wrong.sector} holds {found}; legal: {legal}"
    only = min(wrong.legal) if len(wrong.legal) == 1 else ZERO
    missing = (only, wrong.sector) if only != ZERO else None
    return Fault("acknowledged", f"{where}-{wrong.kind}", severity, text, missing)


def _word(op: int, history: tuple[Operation, ...]) -> str:
    words = {ZERO: "zeros", GARBAGE: "garbage", 0: "what was there before"}
    if op in words:
        return words[op]
    return f"data of operation {op}" + (f" ({told(history[op - 1])})" if op <= len(history) else "")


def told(operation: Operation) -> str:
    """An operation in the words of a scenario's history."""
    if operation.kind is Kind.FLUSH:
        return "flush"
    if operation.verb is not None:
        return str(operation.verb)
    where = " ".join(f"{n >> 10}k" if n and n % 1024 == 0 else str(n) for n in (operation.offset, operation.length))
    return f"{operation.kind.name.lower()} {where}{' unmap' * operation.unmap}"
