"""What is left of an image once its guest is gone and nothing fails any more: opened again, read, checked, and judged.

Content comes first, the checker second.
"""

from __future__ import annotations

import json
import subprocess
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import xxhash

from powercut import stamp
from powercut.errors import EnvironmentFault
from powercut.faults.target import CHECKED, Target
from powercut.guest.control import Control, Guest
from powercut.guest.daemon import tool
from powercut.guest.expectation import Range
from powercut.guest.workload import Operation
from powercut.oracles.readback import Wrong, first_wrong
from powercut.stamp import GARBAGE, ZERO
from powercut.trace import Kind
from powercut.verdict import Severity

SAID = 300  # characters of what QEMU said that go into a finding
_REMEMBERED = 16  # images whose content and check are kept
_PIECE = 16 << 20  # bytes that are read at once: NBD allows twice as many


class Fault(NamedTuple):
    """What was wrong. `kind` is a word for the machine, `text` a sentence. `missing`: what a sector should hold and
    does not, as the operation that wrote it and the sector; only if one operation alone may be there."""

    rule: str  # opens, structure, acknowledged, alive
    kind: str
    severity: Severity
    text: str
    missing: tuple[int, int] | None = None


class After(NamedTuple):
    """An image after everything. `refused`: why it did not open; then `content` is what it holds after a repair, None
    if that did not help. `corruptions` and `leaks` are qemu-img check's."""

    content: bytes | None
    refused: str
    corruptions: int
    leaks: int
    said: str


class Reopened:
    """Looks at images with the storage daemon of `control`; `lose` gives it up, with whatever it has open."""

    def __init__(self, target: Target, control: Callable[[], Control], lose: Callable[[], None], scratch: Path) -> None:
        self._target, self._control, self._lose, self._scratch = target, control, lose, scratch
        self._seen: OrderedDict[bytes, After] = OrderedDict()

    def look(self, path: Path) -> After:
        """What QEMU makes of an image when nothing fails any more; asked once for equal images. May repair it."""
        digest = xxhash.xxh3_128_digest(path.read_bytes())
        if digest in self._seen:
            self._seen.move_to_end(digest)
            return self._seen[digest]
        found = self._read(path)
        corruptions, leaks, said = self._check(path)
        refused = found if isinstance(found, str) else ""
        if refused and self._target.format in CHECKED:
            self._check(path, "-r", "all")
            found = self._read(path)
        content = found if isinstance(found, bytes) else None
        self._seen[digest] = After(content, refused, corruptions, leaks, said)
        if len(self._seen) > _REMEMBERED:
            self._seen.popitem(last=False)
        return self._seen[digest]

    def _read(self, path: Path) -> bytes | str:
        """What an image holds, or why it does not open. It is opened as for a guest that goes on writing."""
        try:
            guest = self._control().open(self._target.node({"driver": "file", "filename": str(path)}))
            size, content = guest.size, whole(guest)
            self._control().shut(guest)
        except (EnvironmentFault, OSError) as error:
            self._lose()  # with whatever it has open
            return str(error)
        return content if size >= self._target.size else f"the disk has {size} bytes only"

    def _check(self, path: Path, *more: str) -> tuple[int, int, str]:
        if self._target.format not in CHECKED:
            return 0, 0, ""
        command = [tool("qemu-img"), "check", "--output=json", *more, "-f", self._target.format, str(path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        try:
            found = json.loads(done.stdout)
        except ValueError:
            return 1, 0, f"qemu-img check ended with {done.returncode}: {done.stderr.strip()[:SAID]}"
        corruptions = found.get("corruptions", 0) + found.get("check-errors", 0)
        return corruptions, found.get("leaks", 0), f"{corruptions} corruptions, says qemu-img check"

    def agrees(self, kept: Path, legal: list[Range], fault: Fault) -> str:
        """Which other reader of QEMU's, in a process of its own, sees the fault in an image that was kept, or ""."""
        if fault.rule == "opens":
            command = [tool("qemu-io"), "-f", self._target.format, "-c", "quit", str(kept)]
            return "qemu-io" if subprocess.run(command, capture_output=True, timeout=60).returncode else ""
        if fault.rule == "structure":
            return "qemu-img check" if self._check(kept)[0] else ""
        if fault.kind.startswith("reopened"):
            out = self._scratch / "converted"
            command = [tool("qemu-img"), "convert", "-f", self._target.format, "-O", "raw", str(kept), str(out)]
            done = subprocess.run(command, capture_output=True, timeout=60)
            return "qemu-img convert" if not done.returncode and first_wrong(out.read_bytes(), 0, legal) else ""
        return ""

    def lies_at(self, kept: Path, fault: Fault) -> int | None:
        """The byte of a kept image at which a sector lies that is missing from the disk: nothing leads there."""
        if fault.missing is None or self._target.format == "raw":
            return None
        op, sector = fault.missing
        at = kept.read_bytes().find(stamp.make(op, 0, sector, 1))
        return at if at >= 0 else None


def whole(guest: Guest) -> bytes:
    """What a disk holds."""
    pieces = range(0, guest.size, _PIECE)
    return b"".join(guest.read(at, min(_PIECE, guest.size - at)) for at in pieces)


def judged(history: tuple[Operation, ...], after: After, legal: list[Range]) -> list[Fault]:
    """What is wrong with an image of which a guest may expect so much."""
    faults = []
    complained = bool(after.corruptions or after.refused)
    if after.content is None:
        faults.append(Fault("opens", "refused", Severity.UNOPENABLE, after.refused))
    elif wrong := first_wrong(after.content, 0, legal):
        severity = Severity.LOSS if complained else Severity.SILENT
        faults.append(content("reopened", wrong, history, severity))
    if after.refused and after.content is not None:
        text = f"opens only after qemu-img check -r all: {after.refused}"
        faults.append(Fault("opens", "repair", Severity.CORRUPT, text))
    elif after.corruptions:
        faults.append(Fault("structure", "check", Severity.CORRUPT, after.said))
    return faults


def content(where: str, wrong: Wrong, history: tuple[Operation, ...], severity: Severity) -> Fault:
    """A sector that holds what it may not."""
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
