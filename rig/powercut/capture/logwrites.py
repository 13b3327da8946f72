"""Reading dm-log-writes files, as the kernel's target and QEMU's `blklogwrites` driver write them.

Format (Linux, Documentation/admin-guide/device-mapper/log-writes.rst and drivers/md/dm-log-writes.c): one sector
holds the superblock, then each entry is a sector with four little-endian 64-bit numbers (sector, count of
sectors, flags, length of a mark), followed by its data unless it is a discard. Sectors are as large as the
superblock says.

What such a log cannot tell, and what QEMU 7.2 does to it:

* Entries are in the order in which requests completed. A write that completed while a flush was running looks
  covered by it; the trace made of it has the scope "completion-order", and hides those crash states.
* Ranges written as zeros arrive as full writes; there is no truncate and no FUA.
* The superblock's count of entries is updated at flushes only. After a kill it is too small, and without
  flushes it stays 0 (or there is no superblock at all): so the log is scanned up to the first all-zero header,
  and an entry whose data is cut off ends it.

There is no common clock with the guest either. If the writes carry stamps (`powercut.stamp`), the guest's side
is told from them: a stamp of epoch E proves that everything of an earlier epoch had been flushed, provided that
the workload drained its requests before each flush.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from powercut.errors import InputError
from powercut.stamp import decode
from powercut.trace import MAX_SIZE, SECTOR, Flag, Kind, TraceWriter

MAGIC = 0x6A736677736872
VERSION = 1
_SUPER = struct.Struct("<QQQI")
_ENTRY = struct.Struct("<QQQQ")
_FLUSH, _FUA, _DISCARD, _MARK, _METADATA = 1, 2, 4, 8, 16


class Entry(NamedTuple):
    """One entry of a log: `offset` and `length` in bytes; `data` is None for a discard or a bare flush."""

    flush: bool
    fua: bool
    offset: int
    length: int
    data: memoryview | None


class Log:
    """A dm-log-writes file. Iterating yields its entries; `truncated` then says why the last is missing, or None.

    Raises InputError if the file cannot be such a log.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self.truncated: str | None = None
        try:
            with open(self.path, "rb") as file:
                self._size = os.fstat(file.fileno()).st_size
                if self._size < SECTOR:
                    raise InputError(f"{self.path}: not a dm-log-writes file: only {self._size} bytes long")
                self._map = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        except OSError as error:
            raise InputError(f"{self.path}: {error.strerror}") from None
        magic, version, _, self.sector = _SUPER.unpack_from(self._map)
        if magic == 0 and not any(self._map[:SECTOR]):
            self.sector = SECTOR  # QEMU writes the superblock with the first flush
        elif magic != MAGIC or version != VERSION:
            raise InputError(f"{self.path}: not a dm-log-writes file: magic {magic:#x}, version {version}, at byte 0")
        if self.sector < SECTOR or self.sector & (self.sector - 1) or self.sector > 1 << 16:
            raise InputError(
                f"{self.path}: sector size {self.sector} at byte 24 is not a power of two from 512 to 65536"
            )

    def __iter__(self) -> Iterator[Entry]:
        view, place, size = memoryview(self._map), self.sector, self.sector
        while place + _ENTRY.size <= self._size:
            sector, count, flags, mark = _ENTRY.unpack_from(self._map, place)
            if not (sector or count or flags or mark):
                return
            if flags & ~(_FLUSH | _FUA | _DISCARD | _MARK | _METADATA) or (sector + count) * size > MAX_SIZE:
                what = f"sector {sector}, count {count}, flags {flags:#x}"
                raise InputError(f"{self.path}: entry at byte {place} makes no sense: {what}")
            start = place + size
            stored = -(-mark // size) * size if flags & _MARK else 0 if flags & _DISCARD else count * size
            if start + stored > self._size:
                self.truncated = f"{self.path}: ends within the data of the entry at byte {place}; read up to there"
                return
            place = start + stored
            if flags & _MARK:
                continue
            data = view[start : start + stored] if stored else None
            yield Entry(bool(flags & _FLUSH), bool(flags & _FUA), sector * size, count * size, data)


def import_log(log: Log, writer: TraceWriter, image: int, guest_size: int) -> int:
    """Write the events of `log`, made on file `image`, into a trace, with the guest's side as far as stamps tell it
    (a guest file is declared if there are any). `guest_size` is 0 if it is not known: no log tells it. Returns the
    number of events."""
    marks = _GuestMarks(log, writer, guest_size)
    count = 0
    for entry in log:
        if entry.flush:
            writer.complete(writer.issue(Kind.FLUSH, image))
            count += 1
        if not entry.length:
            continue
        count += 1
        if entry.data is None:
            writer.complete(writer.issue(Kind.DISCARD, image, entry.offset, entry.length))
            continue
        marks.before(entry.data)
        flags = int(Flag.FUA) if entry.fua else 0
        writer.complete(writer.issue(Kind.WRITE, image, entry.offset, entry.length, data=entry.data, flags=flags))
    return count


class _GuestMarks:
    """The guest's operations, as marks placed where their stamps first show up in the log."""

    def __init__(self, log: Log, writer: TraceWriter, guest_size: int) -> None:
        self._writer = writer
        self._range: dict[int, tuple[int, int]] = {}  # operation: first and last sector
        self._epoch = 0
        self._open: dict[int, int] = {}  # operation in flight: position of its mark
        self._seen: set[int] = set()
        for entry in log:
            if entry.data is not None:
                for operation, _, first, last in _stamped(entry.data):
                    low, high = self._range.get(operation, (first, last))
                    self._range[operation] = (min(low, first), max(high, last))
        self._guest = writer.file("guest", guest_size, "guest") if self._range else -1

    def before(self, data: memoryview) -> None:
        """Mark what the guest must have done before `data` was written."""
        for operation, epoch, _, _ in _stamped(data):
            if operation in self._seen:
                continue
            if epoch > self._epoch:
                for number in sorted(self._open):
                    self._complete(number)
                self._writer.complete(self._writer.issue(Kind.FLUSH, self._guest))
                self._epoch = epoch
            first, last = self._range[operation]
            for number in [n for n in self._open if self._range[n][0] <= last and first <= self._range[n][1]]:
                self._complete(number)  # operations that overlap are never in flight together
            self._seen.add(operation)
            self._open[operation] = self._writer.issue(
                Kind.WRITE, self._guest, first * SECTOR, (last - first + 1) * SECTOR, ref=operation
            )

    def _complete(self, operation: int) -> None:
        self._writer.complete(self._open.pop(operation))


def _stamped(data: memoryview) -> list[tuple[int, int, int, int]]:
    """The operations stamped into `data`: (operation, epoch, first sector, last sector), ascending."""
    whole = len(data) // SECTOR * SECTOR
    stamps = decode(np.frombuffer(data[:whole], dtype=np.uint8).reshape(-1, SECTOR))
    found: list[tuple[int, int, int, int]] = []
    valid = (stamps.op >= 0) & (stamps.sector >= 0) & (stamps.sector < MAX_SIZE // SECTOR)
    for operation in np.unique(stamps.op[valid]).tolist():
        mine: Any = valid & (stamps.op == operation)
        sectors = stamps.sector[mine]
        found.append((operation, int(stamps.epoch[mine][0]), int(sectors.min()), int(sectors.max())))
    return found
