"""A recording export: under any hypervisor that speaks NBD, everything it asks of its image goes into a trace.

The image is a file; the server (`quire.nbd`) shows every request when it was read (issued) and
just before its reply is sent (completed), so the trace keeps what overlapped. A device served this way cannot
grow: the file must already have the size that the format may need.
"""

from __future__ import annotations

import itertools
import mmap
import os
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np

from powercut.sparse import sparse_zeros
from powercut.trace import SECTOR, Flag, Kind, TraceWriter
from quire.nbd_protocol import Command, Data, Request

_KINDS = {
    Command.WRITE: Kind.WRITE,
    Command.WRITE_ZEROES: Kind.ZERO,
    Command.TRIM: Kind.DISCARD,
    Command.FLUSH: Kind.FLUSH,
}
_FILE, _ZEROS = 0, -1  # where a sector is, if not in the trace
_AT_ONCE = 2048  # sectors


class Recorder:
    """The side of an export that records: whatever is asked of it becomes an event of file `file` in the trace that
    `writer` writes.

    `lie` names what is acknowledged and not done, as a control. "flush": every flush; the event is recorded with the
    flag LIED and counts for nothing in exploration. "order": a flush is done only when the next change was issued, or
    another flush, so that what was to come first and what was to come after may reach the disk in either order.
    """

    block_size = SECTOR

    def __init__(self, writer: TraceWriter, file: int, lie: frozenset[str] = frozenset()) -> None:
        self._writer = writer
        self._file = file
        self._flush_flags = int(Flag.LIED) if "flush" in lie else 0
        self._late = "order" in lie
        self._owed = False  # a flush was acknowledged and is still to be done

    def received(self, request: Request) -> None:
        kind = _KINDS.get(request.kind)
        if kind is None:
            return
        flags = (Flag.FUA if request.fua else 0) | (Flag.MAY_UNMAP if request.may_unmap else 0)
        if kind is Kind.FLUSH:
            self._owed = self._late and not self._owed
            flags = int(Flag.LIED) if self._owed else self._flush_flags
        elif self._flush_flags:
            flags &= ~Flag.FUA  # FUA is a flush of one write: a liar lies about both
        where = (self._file, request.offset, request.length)
        if kind is Kind.WRITE:
            request.note, place = self._writer.issue_stored(kind, *where, request.data, int(flags))
            self.stored(request, place)
        else:
            request.note = self._writer.issue(kind, *where, flags=int(flags))
        if self._owed and kind is not Kind.FLUSH:
            self._owed = False
            self._writer.complete(self._writer.issue(Kind.FLUSH, self._file))

    def stored(self, request: Request, place: int) -> None:
        """The payload of a write begins at byte `place` of the trace file. For exports that read it from there."""

    def finishing(self, request: Request, error_number: int) -> None:
        if request.note is not None:
            self._writer.complete(request.note, error_number)


class RecordingExport(Recorder):
    """Serves the file at `path` and records it.

    What is written is kept once, in the trace, and read from there: else recording would cost a second copy of it all.
    The file is only read, until `write_back` puts into it what it would hold by now.
    """

    def __init__(self, path: str | os.PathLike[str], writer: TraceWriter, file: int, lie: frozenset[str]) -> None:
        super().__init__(writer, file, lie)
        self._path = path
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            self.size = os.fstat(fd).st_size
            self._map = mmap.mmap(fd, self.size, prot=mmap.PROT_READ)
        finally:
            os.close(fd)
        self._view = memoryview(self._map)
        # Of each sector, where its content begins in the trace file; _FILE: in the file at `path`, as it was.
        self._where: Any = sparse_zeros(-(-self.size // SECTOR), np.int64)
        self._lock = threading.Lock()
        self._places: dict[tuple[int, int], list[int]] = {}  # of payloads that have no effect yet, by offset and length

    def stored(self, request: Request, place: int) -> None:
        with self._lock:
            self._places.setdefault((request.offset, request.length), []).append(place)

    def read(self, offset: int, length: int) -> Data:
        first = offset // SECTOR
        where = self._where[first : first + length // SECTOR]
        if not where.any():
            return self._view[offset : offset + length]
        return b"".join(self._pieces(offset, where))

    def _pieces(self, offset: int, where: Any) -> Iterator[Data]:
        """The contents of the sectors from byte `offset` on, which begin at `where`, as few pieces."""
        step = np.diff(where)
        held = where > 0
        goes_on = np.where(held[1:] & held[:-1], step == SECTOR, step == 0)
        begins = [0, *(np.flatnonzero(~goes_on) + 1).tolist(), len(where)]
        for begin, end in itertools.pairwise(begins):
            place, length = int(where[begin]), (end - begin) * SECTOR
            if place > 0:
                yield self._writer.read(place, length)
            elif place == _ZEROS:
                yield bytes(length)
            else:
                yield self._view[offset + begin * SECTOR :][:length]

    def write(self, offset: int, data: Data, fua: bool) -> None:
        with self._lock:
            waiting = self._places[offset, len(data)]
            place = waiting[0]
            if len(waiting) > 1:  # a write that was held back, and a later one to the same place
                place = next(place for place in waiting if self._writer.read(place, len(data)) == data)
            waiting.remove(place)
            if not waiting:
                del self._places[offset, len(data)]
        first = offset // SECTOR
        self._where[first : first + len(data) // SECTOR] = np.arange(place, place + len(data), SECTOR)

    def zero(self, offset: int, length: int, may_unmap: bool, fua: bool) -> None:
        first = offset // SECTOR
        self._where[first : first + length // SECTOR] = _ZEROS

    def discard(self, offset: int, length: int) -> None:
        self.zero(offset, length, True, False)

    def flush(self) -> None:
        """Nothing: what counts is the trace."""

    def write_back(self) -> None:
        """Put into the file what was written, as if it had been written there at once. The trace must still be open."""
        with open(self._path, "r+b") as out:
            for begin in range(0, len(self._where), _AT_ONCE):
                where = self._where[begin : begin + _AT_ONCE]
                if where.any():
                    out.seek(begin * SECTOR)
                    out.writelines(self._pieces(begin * SECTOR, where))
        self._where[:] = _FILE
