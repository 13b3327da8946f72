"""One pass over a file: which sectors may belong to a table, whatever the size of clusters.

A guest's data hardly ever looks like a table: a sector of 64 big-endian words each of which is zero or an offset
within the file with nothing but known flags. Sources: QEMU's docs/interop/qcow2.txt, sections "Cluster mapping",
"Extended L2 Entries" and "Snapshots".

The file is read piece by piece, holes are skipped, and what is kept is one number for each such sector.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from powercut.disk import Disk
from powercut.formats.qcow2 import layout as q
from powercut.formats.qcow2.entries import I64, U64, Bools

SECTOR = q.SECTOR
WORDS = SECTOR // 8
PIECE = 4 << 20
MOST = 1 << 24  # sectors that are kept: the tables of 64 TiB with clusters of 64 KiB

_NOT_STANDARD = q.COMPRESSED | q.L2_STANDARD_RESERVED
_COMPRESSED_OFFSET = (1 << 49) - 1  # the part of a compressed cluster's offset that every cluster size has
_PROBES = (0, 14, 30, 46, 62)


@dataclass(frozen=True, slots=True)
class Scan:
    """Sector numbers, ascending."""

    size: int  # of the file, in bytes
    tables: I64  # all words may be entries, and not all are zero
    extended: I64  # the same, where every other word is the bitmap of an extended L2 entry
    snapshots: I64  # a snapshot table may start here
    complete: bool  # False: there were more such sectors than are kept


def reach(size: int) -> int:
    """The offset below which an entry is credible. A file that was cut off had more to point to."""
    return 2 * size + (64 << 20)


def plausible(words: U64, limit: int) -> Bools:
    """Whether each word may be an L1, L2 or refcount table entry."""
    standard: Bools = (words & _NOT_STANDARD == 0) & (words & q.OFFSET_MASK < limit)
    compressed: Bools = (words >> 62 == 1) & (words & _COMPRESSED_OFFSET < limit)
    either: Bools = standard | compressed
    return either


def pieces(path: str, size: int) -> Iterator[tuple[int, bytes]]:
    """The file's data in pieces that start at sectors, without its holes; the last is filled up to a sector."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        at = 0
        while at < size:
            start, stop = _data(fd, at, size)
            start -= start % SECTOR
            for offset in range(start, stop, PIECE):
                piece = os.pread(fd, min(PIECE, -(-(stop - offset) // SECTOR) * SECTOR), offset)
                yield offset, piece.ljust(-(-len(piece) // SECTOR) * SECTOR, b"\0")
            at = stop
    finally:
        os.close(fd)


def _data(fd: int, at: int, size: int) -> tuple[int, int]:
    """Where the next data is. A file system or device that knows no holes has data everywhere."""
    try:
        start = os.lseek(fd, at, os.SEEK_DATA)
        return start, min(size, -(-os.lseek(fd, start, os.SEEK_HOLE) // SECTOR) * SECTOR)
    except OSError as error:
        import errno

        return (size, size) if error.errno == errno.ENXIO else (at, size)


def scan(path: str, size: int, progress: Callable[[int, int], None] = lambda done, of: None) -> Scan:
    limit = reach(size)
    tables: list[I64] = []
    extended: list[I64] = []
    snapshots: list[I64] = []
    kept = 0
    for offset, piece in pieces(path, size):
        progress(offset, size)
        if kept >= MOST:
            break
        native = np.frombuffer(piece, dtype=np.uint64).reshape(-1, WORDS)
        used = np.flatnonzero(np.bitwise_or.reduce(native, axis=1))
        first = offset // SECTOR
        snapshots.append(first + used[_snapshot_starts(piece, used, limit)])
        for probe in _PROBES:
            used = used[plausible(native[used, probe].byteswap(), limit)]
        words = native[used].byteswap()
        even = plausible(words[:, ::2], limit).all(axis=1)
        used, words = used[even], words[even]
        odd = words[:, 1::2]
        tables.append(first + used[plausible(odd, limit).all(axis=1)])
        both = (odd >> 32 & odd) != 0
        nowhere = (odd & q.SUB_ALLOCATED != 0) & (words[:, ::2] & q.OFFSET_MASK == 0)
        extended.append(first + used[~(both | nowhere).any(axis=1)])
        kept += len(used) + len(snapshots[-1])
    progress(size, size)
    return Scan(size, _joined(tables), _joined(extended), _joined(snapshots), kept < MOST)


def _joined(parts: list[I64]) -> I64:
    return np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, dtype=np.int64)


def _snapshot_starts(piece: bytes, used: I64, limit: int) -> Bools:
    """Which of these sectors begin like a snapshot table: numbers in their bounds, nothing more."""
    sectors = np.frombuffer(piece, dtype=np.uint8).reshape(-1, SECTOR)
    rows = np.ascontiguousarray(sectors[used, : q.SNAPSHOT.itemsize]).view(q.SNAPSHOT)[:, 0]
    good = (rows["l1_table_offset"] % SECTOR == 0) & (rows["l1_table_offset"] < limit)
    good &= (rows["l1_size"] >= 1) & (rows["l1_size"] <= q.MAX_L1_BYTES // 8)
    good &= (rows["id_size"] >= 1) & (rows["id_size"] < 128) & (rows["name_size"] <= 1024)
    good &= (rows["date_nanoseconds"] < 1_000_000_000) & (rows["extra_size"] <= q.MAX_SNAPSHOT_EXTRA)
    return np.asarray(good, dtype=np.bool_)


class Sectors:
    """Sectors of a disk as big-endian words, any number of them at once."""

    def __init__(self, disk: Disk) -> None:
        whole = disk.size // SECTOR
        self.size = disk.size
        self._body = disk.read(0, whole * SECTOR).view(q.BE64).reshape(-1, WORDS)
        self._tail = disk.read(whole * SECTOR, SECTOR).view(q.BE64).reshape(1, WORDS)

    def words(self, sectors: I64) -> U64:
        """(n, 64) words. Sectors beyond the end are zeros."""
        out = np.zeros((len(sectors), WORDS), dtype=np.uint64)
        inside, tail = sectors < len(self._body), sectors == len(self._body)
        out[inside] = self._body[sectors[inside]]
        out[tail] = self._tail
        return out

    def clusters(self, clusters: I64, bits: int) -> U64:
        """(n, cluster / 8) words of whole clusters."""
        per = (1 << bits) // SECTOR
        sectors = (clusters[:, None] * per + np.arange(per)).reshape(-1)
        return self.words(sectors).reshape(len(clusters), per * WORDS)
