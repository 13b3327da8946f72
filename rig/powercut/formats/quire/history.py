"""Histories of a Quire set: done for real on a recorded store, and promised sector by sector.

A history is a list of lines; sizes and offsets in bytes, with units as everywhere:

    write HEAD OFFSET LENGTH [fua]    zero HEAD OFFSET LENGTH    discard HEAD OFFSET LENGTH    flush HEAD
    snapshot HEAD NAME    clone SNAPSHOT HEAD    revert HEAD SNAPSHOT    rename OLD NEW    delete NAME
    resize HEAD SIZE      reopen    seal SNAPSHOT
    race HEAD OFFSET LENGTH    flush the head, and write while the flush syncs
    kill HEAD                  flush the head, but the program is killed before the sync; then reopen

The set has one head, "main", at first. Marks in the trace say when each line began and ended, and which leaf each name
had then. What a crash may leave follows from them alone: lines run one after the other.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from powercut.capture.store import RecordingStore
from powercut.crash.store import in_memory
from powercut.errors import InputError
from powercut.formats.quire.disturbed import disturbed
from powercut.scenario import parse_size
from powercut.trace import SECTOR, TraceWriter
from quire import sets
from quire.errors import ReadOnly, Unusable
from quire.image import Image
from quire.sets import FEATURES, Set
from quire.store import Store

_SHAPES = {  # what the words of a line are
    "write": "nssf",
    "zero": "nss",
    "discard": "nss",
    "flush": "n",
    "snapshot": "nn",
    "clone": "nn",
    "revert": "nn",
    "rename": "nn",
    "delete": "n",
    "resize": "ns",
    "reopen": "",
    "seal": "n",
    "race": "nss",
    "kill": "n",
}
TELLING = 16  # bytes by which contents differ
_SHORT = 0.02  # seconds that a flush waits for a write which may be waiting for the flush
_LONG = 30.0

Candidates = list[tuple[bytes, ...]]  # of each sector: what it may hold


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a history, understood. `stamp`: which of the history's writes it is, from 1."""

    what: str
    names: tuple[str, ...] = ()
    numbers: tuple[int, ...] = ()
    fua: bool = False
    stamp: int = 0


def parse(lines: Sequence[str]) -> list[Line]:
    """Raises InputError, naming the line."""
    found = []
    stamps = itertools.count(1)
    for number, text in enumerate(lines, 1):
        what, *words = text.split() or [""]
        shape = _SHAPES.get(what)
        fua = shape is not None and shape.endswith("f") and words[-1:] == ["fua"]
        if shape is None or len(words) - fua != len(shape.rstrip("f")):
            raise InputError(f"line {number} of the history: {text!r} is not one of its lines")
        pairs = list(zip(shape, words, strict=False))
        names = tuple(word for kind, word in pairs if kind == "n")
        numbers = tuple(parse_size(word) for kind, word in pairs if kind == "s")
        found.append(Line(what, names, numbers, fua, next(stamps) if what in ("write", "race") else 0))
    return found


def content(stamp: int, sector: int) -> bytes:
    """What write number `stamp` of a history writes into a sector: never the same, never zeros."""
    return (b"%8d%8d" % (stamp, sector)) * (SECTOR // 16)


@contextmanager
def repeatable(first: int = 1) -> Iterator[None]:
    """Ids and times count from `first`, so that the same calls make the same bytes."""
    ids = (number.to_bytes(16, "big") for number in itertools.count(first))
    times = itertools.count(first)
    with mock.patch.object(sets, "new_id", ids.__next__), mock.patch.object(sets, "now", times.__next__):
        yield


class Killed(BaseException):
    """The program is no more."""


class Session:
    """A set on a store, and the lines of a history done on it."""

    def __init__(self, store: Store, features: int) -> None:
        self._store = disturbed(store, self._before)
        self._features = features
        self._meanwhile: Callable[[], None] | None = None
        self.quire: Set

    def create(self, size: int, slots: int) -> None:
        self.quire = Set.create(self._store, size, slots=slots, features=self._features)

    def perform(self, line: Line) -> None:
        """Do a line. Heads are opened when they are first used."""
        quire, names = self.quire, line.names
        if line.what == "reopen":
            quire.close()
            self._open()
        elif line.what == "kill":
            image = opened(quire, names[0])
            self._meanwhile = self._kill
            with contextlib.suppress(Killed):
                image.flush()
            self._meanwhile = None
            assert quire._lock is not None
            quire._lock.close()  # all that a dead process lets go of
            self._open()
        elif line.what == "race":
            image = opened(quire, names[0])
            writer = threading.Thread(target=self._write, args=(image, line))
            self._meanwhile = lambda: self._start(writer)
            image.flush()
            if writer.ident is None:  # there was nothing to sync
                self._meanwhile = None
                self._write(image, line)
            else:
                writer.join(_LONG)
        elif line.what == "write":
            self._write(opened(quire, names[0]), line)
        elif line.what in ("zero", "discard", "flush"):
            getattr(opened(quire, names[0]), line.what)(*line.numbers)
        else:
            if line.what in ("revert", "rename", "delete") and (image_ := quire.opened(names[0])):
                image_.close()
            getattr(quire, line.what)(*names, *line.numbers)

    def _open(self) -> None:
        self.quire = Set.open(self._store, write=True, features=self._features)

    def _write(self, image: Image, line: Line) -> None:
        offset, length = line.numbers
        sectors = range(offset // SECTOR, (offset + length) // SECTOR)
        image.write(offset, b"".join(content(line.stamp, sector) for sector in sectors), line.fua)

    def _before(self, call: str, file: str) -> None:
        if call == "sync" and file.endswith(".leaf") and self._meanwhile is not None:
            self._meanwhile()

    def _kill(self) -> None:
        raise Killed

    def _start(self, writer: threading.Thread) -> None:
        """Let a write run while the sync has not begun; if it has to wait for the sync, it may."""
        self._meanwhile = None
        writer.start()
        writer.join(_SHORT)


def opened(quire: Set, head: str) -> Image:
    """The image of a head."""
    there = quire.opened(head)
    return there if there is not None else quire.image(head)


def record(
    lines: Sequence[Line],
    size: int,
    slots: int,
    path: Path,
    features: int = FEATURES,
    before: Callable[[str, str], None] | None = None,
) -> None:
    """Do a history on a new set in memory, and write the trace. `before` is called before each call to the disk,
    once the set is made, with the call's name and its file; what it raises is how the call fails."""
    with TraceWriter(path, {"format": "quire", "size": size}) as writer, repeatable():
        noticed: list[Callable[[str, str], None]] = []
        inner = disturbed(in_memory(), lambda call, file: noticed[0](call, file) if noticed else None)
        session = Session(RecordingStore(inner, writer), features)
        writer.mark("begin", line=-1)
        session.create(size, slots)
        _done(writer, -1, session.quire)
        if before is not None:
            noticed.append(before)
        for number, line in enumerate(lines):
            writer.mark("begin", line=number)
            try:
                session.perform(line)
            except OSError as error:
                if before is None:
                    raise
                writer.mark("failed", line=number, error=str(error), tried=not isinstance(error, (ReadOnly, Unusable)))
            else:
                _done(writer, number, session.quire, line)
        writer.mark("begin", line=len(lines))
        try:
            session.quire.close()
        except OSError as error:
            if before is None:
                raise
            writer.mark("failed", line=len(lines), error=str(error), tried=True)
        else:
            _done(writer, len(lines), session.quire)


def _done(writer: TraceWriter, number: int, quire: Set, line: Line | None = None) -> None:
    names = {name: [value.leaf.hex(), value.writable] for name, value in quire.manifest.names.items()}
    seen = {}
    if line is not None and line.what == "kill":
        for name, (_, writable) in names.items():
            image = opened(quire, name)
            data = bytes(image.read(0, image.size))
            if not writable:
                image.close()
            seen[name] = [data[place : place + TELLING].hex() for place in range(0, len(data), SECTOR)]
    writer.mark("end", line=number, names=names, seen=seen)
