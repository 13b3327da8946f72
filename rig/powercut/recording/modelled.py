"""A history, driven through the model of the qcow2 driver instead of a real QEMU: into a trace, or into a file.

The model runs in this process, so a history takes a millisecond, the order in which overlapping requests complete is
drawn from the scenario's seed, and defects can be planted in it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from powercut import __version__, stamp
from powercut.errors import InputError
from powercut.formats.qcow2.driver import snapshots
from powercut.formats.qcow2.driver.create import create
from powercut.formats.qcow2.driver.host import File, MemoryFile, Recorded, run
from powercut.formats.qcow2.driver.image import Backing, Image
from powercut.formats.qcow2.driver.opening import open_image
from powercut.formats.qcow2.driver.practice import Practice
from powercut.formats.qcow2.driver.schedule import Together
from powercut.guest.past import Content, Past
from powercut.guest.workload import Operation, Verb
from powercut.recording.operations import operations
from powercut.scenario import Scenario, parse_size
from powercut.trace import SECTOR, Kind, TraceWriter

KINDS = ("zero", "discard", "snapshot")  # of operations, besides writes, flushes and reopens
_ROOM = 1 << 20  # bytes behind a new image: in a trace its file cannot grow


class Stamped:
    """A backing file full of stamps of operation 0."""

    def __init__(self, size: int) -> None:
        self.content = stamp.make(0, 0, 0, size // SECTOR)

    def read(self, offset: int, length: int) -> bytes:
        data = self.content[offset : offset + length]
        return data + bytes(length - len(data))


def new_image(scenario: Scenario) -> bytes:
    """The image that a scenario starts from. Raises InputError for what the model does not do."""
    unknown = scenario.options.keys() - {"cluster_size", "compat", "lazy_refcounts"}
    if scenario.format != "qcow2" or unknown:
        what = f"option {sorted(unknown)[0]}" if unknown else f"format {scenario.format}"
        raise InputError(f"the model of the driver does not know {what}")
    options = scenario.options
    return create(
        parse_size(scenario.size),
        cluster_bits=parse_size(options.get("cluster_size", "64k")).bit_length() - 1,
        version=2 if options.get("compat") in ("0.10", "v2") else 3,
        lazy=options.get("lazy_refcounts") == "on",
        backing=None if scenario.backing is None else "base",
    )


def record(scenario: Scenario, practice: Practice, out: str | os.PathLike[str]) -> None:
    """Record `scenario` into the trace file `out`. Raises InputError; OSError where the driver fails."""
    size, image = parse_size(scenario.size), new_image(scenario)
    backing = None if scenario.backing is None else Stamped(parse_size(scenario.backing))
    host = len(image) + 2 * size + _ROOM
    meta = {
        "powercut": __version__,
        "recorder": "model",
        "scope": "overlap",
        "format": "qcow2",
        "options": scenario.options,
        "size": size,
        "defects": sorted(practice.defects),
        "era": practice.era.value,
    }
    with TraceWriter(out, meta) as writer:
        of_image = writer.file("image", host, "image")
        writer.base(of_image, 0, image)
        if backing is not None:
            of_base = writer.file("base", len(backing.content), "backing")
            writer.base(of_base, 0, backing.content)
        guest = writer.file("guest", size, "guest")
        if backing is not None:
            writer.complete(writer.issue(Kind.WRITE, guest, 0, min(size, len(backing.content)), ref=0))
            writer.complete(writer.issue(Kind.FLUSH, guest))
        file = Recorded(MemoryFile(image, host), writer, of_image)
        Drive(file, practice, backing, scenario, writer, guest).all(operations(scenario))


@dataclass
class _Running:
    operation: Operation
    mark: int


class Drive:
    """Drives operations through the driver over `file`; with a writer, each is marked in its trace. `closed` is called
    whenever the image was closed."""

    def __init__(
        self,
        file: File,
        practice: Practice,
        backing: Backing | None,
        scenario: Scenario,
        writer: TraceWriter | None = None,
        guest: int = -1,
        closed: Callable[[], None] = lambda: None,
    ) -> None:
        self._file, self._practice, self._backing = file, practice, backing
        self._writer, self._guest, self.closed = writer, guest, closed
        self._depth = scenario.workload.depth
        size = parse_size(scenario.size)
        self._past = Past(size, size, min(size, parse_size(scenario.backing or "0")))
        self._together = Together(file, scenario.workload.seed)
        self._running: dict[int, _Running] = {}
        self._epoch = 0
        self.errors: dict[int, OSError] = {}  # what failed, by the operation's number
        self.uncertain = np.zeros(size // SECTOR, dtype=np.bool_)  # sectors that a failed request may have changed
        self._uncertain_then: dict[str, NDArray[np.bool_]] = {}  # by snapshot
        self.image = self._open()

    @property
    def content(self) -> Content:
        """What the guest's disk should hold."""
        return self._past.now

    def all(self, work: Iterable[Operation]) -> None:
        """Run all operations, in order, as many at once as the scenario says, and close the image. Raises OSError."""
        for number, operation in enumerate(work, 1):
            self.one(number, operation)
        self.close()
        for error in self.errors.values():
            raise error

    def close(self) -> None:
        """Wait for what is in flight and close the image in an orderly way."""
        self._together.drain()
        run(self.image.close(), self._file)
        self.closed()

    def one(self, number: int, operation: Operation) -> None:
        """Start one operation; what the host does to the image is done when this returns."""
        if operation.verb is not None:
            self._together.drain()
            self._manage(number, operation)
            return
        while len(self._running) >= self._depth or self._conflicts(operation):
            self._together.step()
        while self._running and self._together.coin():
            self._together.step()
        mark = -1
        if self._writer is not None:
            mark = self._writer.issue(operation.kind, self._guest, operation.offset, operation.length, ref=number)
        self._running[number] = _Running(operation, mark)
        self._together.start(self._request(number, operation), lambda _, error: self._done(number, error))

    async def _request(self, number: int, operation: Operation) -> None:
        offset, length = operation.offset, operation.length
        match operation.kind:
            case Kind.WRITE:
                await self.image.write(offset, stamp.make(number, self._epoch, offset // SECTOR, length // SECTOR))
            case Kind.ZERO:
                await self.image.zero(offset, length)
            case Kind.DISCARD:
                await self.image.discard(offset, length)
            case _:
                await self.image.flush_all()

    def _done(self, number: int, error: OSError | None) -> None:
        running = self._running.pop(number)
        if self._writer is not None:
            self._writer.complete(running.mark, 0 if error is None else error.errno or 5)
        operation = running.operation
        where = slice(operation.offset // SECTOR, (operation.offset + operation.length) // SECTOR)
        self.uncertain[where] = error is not None
        if error is not None:
            self.errors[number] = error
        else:
            self._past.done(number, operation)
            self._epoch += operation.kind is Kind.FLUSH

    def _conflicts(self, operation: Operation) -> bool:
        end = operation.offset + operation.length
        others = [running.operation for running in self._running.values()]
        return any(other.offset < end and operation.offset < other.offset + other.length for other in others)

    def _open(self) -> Image:
        return run(open_image(self._practice, self._backing), self._file)

    def _manage(self, number: int, operation: Operation) -> None:
        name = operation.name
        changes = self._past.changes(number, operation)
        marks = []
        if self._writer is not None:
            marks = [self._writer.issue(c.kind, self._guest, c.offset, c.length, ref=c.ref) for c in changes]
        match operation.verb:
            case Verb.CREATE:
                run(snapshots.create(self.image, name), self._file)
                self._uncertain_then[name] = self.uncertain.copy()
            case Verb.APPLY:
                run(snapshots.apply(self.image, name), self._file)
                self.uncertain[:] = self._uncertain_then[name]
            case Verb.DELETE:
                run(snapshots.delete(self.image, name), self._file)
            case Verb.REOPEN:
                self.close()
                self.image = self._open()
            case _:
                raise InputError(f"the model of the driver does not {operation.verb}")
        for mark in marks:
            assert self._writer is not None
            self._writer.complete(mark)
