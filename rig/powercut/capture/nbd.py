"""A recording export: under any hypervisor that speaks NBD, everything it asks of its image goes into a trace.

The image is a file, memory mapped; the server (`quire.nbd`) shows every request when it was read (issued) and
just before its reply is sent (completed), so the trace keeps what overlapped. A device served this way cannot
grow: the file must already have the size that the format may need.
"""

from __future__ import annotations

import mmap
import os

from powercut.trace import SECTOR, Flag, Kind, TraceWriter
from quire.nbd_protocol import Command, Data, Request

_KINDS = {
    Command.WRITE: Kind.WRITE,
    Command.WRITE_ZEROES: Kind.ZERO,
    Command.TRIM: Kind.DISCARD,
    Command.FLUSH: Kind.FLUSH,
}


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
        data = request.data if kind is Kind.WRITE else None
        request.note = self._writer.issue(kind, self._file, request.offset, request.length, data=data, flags=int(flags))
        if self._owed and kind is not Kind.FLUSH:
            self._owed = False
            self._writer.complete(self._writer.issue(Kind.FLUSH, self._file))

    def finishing(self, request: Request, error_number: int) -> None:
        if request.note is not None:
            self._writer.complete(request.note, error_number)


class RecordingExport(Recorder):
    """Serves the file at `path` and records it."""

    def __init__(self, path: str | os.PathLike[str], writer: TraceWriter, file: int, lie: frozenset[str]) -> None:
        super().__init__(writer, file, lie)
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            self.size = os.fstat(fd).st_size
            self._map = mmap.mmap(fd, self.size)
        finally:
            os.close(fd)
        self._view = memoryview(self._map)

    def read(self, offset: int, length: int) -> Data:
        return self._view[offset : offset + length]

    def write(self, offset: int, data: Data, fua: bool) -> None:
        self._view[offset : offset + len(data)] = data

    def zero(self, offset: int, length: int, may_unmap: bool, fua: bool) -> None:
        self._view[offset : offset + length] = bytes(length)

    def discard(self, offset: int, length: int) -> None:
        self.zero(offset, length, True, False)

    def flush(self) -> None:
        """Nothing: the file is scratch, and what counts is the trace."""
