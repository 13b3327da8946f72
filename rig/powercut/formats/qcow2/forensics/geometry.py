"""How large clusters are, and where the refcounts: told by structures that vouch for themselves.

A refcount table and its blocks describe themselves: each of them lies in a cluster whose refcount is 1. Cluster
size, refcount width and place are taken together, all that describe themselves are collected, and the best is the one
whose refcounts agree with what all tables of the file point to: an entry points to a cluster in use, and what is in
use ends where the file ends. Source: QEMU's docs/interop/qcow2.txt, section "Host cluster management".

Without refcounts, the cluster size is the largest power of two of which all offsets in tables are multiples.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from powercut.disk import Disk
from powercut.formats.qcow2 import layout as q
from powercut.formats.qcow2.entries import I64, U64
from powercut.formats.qcow2.forensics.scan import SECTOR, Scan, Sectors
from powercut.formats.qcow2.refcounts import decode

Counts = NDArray[np.uint16]

MOST_CLUSTERS = 1 << 28  # of a file; more are not worth 2 GiB of memory
_CANDIDATES = 2000  # refcount tables of one cluster size that are looked at closely
_KEPT = 3  # geometries that are tried out
_BLOCKS = 256  # refcount blocks that are asked whether they describe themselves
_COMPARED = 1000  # entries that are compared with the refcounts
_SAMPLE = 1 << 16  # words of tables, of which these are taken


@dataclass(frozen=True)
class Geometry:
    """`counts` are the refcounts by cluster, at most 65535 each; None if they are lost."""

    cluster_bits: int
    refcount_order: int = 4
    refcount_table: int = 0  # byte offset; 0: not found
    blocks: I64 = field(default_factory=lambda: np.zeros(0, dtype=np.int64))  # byte offsets, 0 for none
    counts: Counts | None = None
    merit: tuple[float, float] = (0.0, 0.0)  # see `_merit`

    @property
    def cluster(self) -> int:
        return 1 << self.cluster_bits

    def in_use(self, clusters: I64) -> NDArray[np.bool_]:
        """Whether the refcounts say so; everything is, if they are lost."""
        return self.count(clusters) > 0

    def one(self, disk: Disk, cluster: int) -> int | None:
        """The refcount of one cluster, read from its block; None if it lies beyond the blocks."""
        block, index = divmod(cluster, self.cluster * 8 >> self.refcount_order)
        if block >= len(self.blocks):
            return None
        if not self.blocks[block]:
            return 0
        bits = 1 << self.refcount_order
        raw = disk.read(int(self.blocks[block]) + index * bits // 8, max(1, bits // 8))
        return int(decode(raw, self.refcount_order)[index * bits % 8 // bits if bits < 8 else 0])

    def count(self, clusters: I64) -> I64:
        if self.counts is None:
            return np.ones(len(clusters), dtype=np.int64)
        inside = (clusters >= 0) & (clusters < len(self.counts))
        out = np.zeros(len(clusters), dtype=np.int64)
        out[inside] = self.counts[clusters[inside]]
        return out


def read_counts(disk: Disk, blocks: I64, bits: int, order: int) -> Counts:
    """Refcounts by cluster out of blocks at these offsets. Blocks that are not there count nothing."""
    cluster, total = 1 << bits, -(-disk.size >> bits)
    per_block = cluster * 8 >> order
    if total > MOST_CLUSTERS:
        return np.zeros(0, dtype=np.uint16)
    counts = np.zeros(min(total, len(blocks) * per_block), dtype=np.uint16)
    for number in np.flatnonzero(blocks).tolist():
        offset = int(blocks[number])
        start, stop = number * per_block, min(len(counts), (number + 1) * per_block)
        if 0 < offset < disk.size and offset % cluster == 0 and start < stop:
            counts[start:stop] = np.minimum(decode(disk.read(offset, cluster), order)[: stop - start], 65535)
    return counts


def find(disk: Disk, scan: Scan) -> list[Geometry]:
    """What the geometry may be, the best first. Empty if nothing in the file tells."""
    sectors = Sectors(disk)
    offsets = _sample(sectors, scan)
    found: list[Geometry] = []
    for bits in range(q.MAX_CLUSTER_BITS, q.MIN_CLUSTER_BITS - 1, -1):
        if scan.size >> bits > MOST_CLUSTERS:
            continue
        for table, words in _candidates(sectors, scan, bits):
            found += _describing_themselves(disk, table, words, bits, offsets)
    bits = _by_alignment(offsets)
    if found:
        best = sorted(found, key=lambda g: (g.merit, g.cluster_bits), reverse=True)
        best = [g for g in best if sum(g.merit) > sum(best[0].merit) - 0.2][:_KEPT]
        other = [] if bits in (0, *(g.cluster_bits for g in best)) else [Geometry(bits)]
        return [replace(g, counts=read_counts(disk, g.blocks, g.cluster_bits, g.refcount_order)) for g in best] + other
    return [Geometry(bits)] if bits else []


def _sample(sectors: Sectors, scan: Scan) -> I64:
    """Offsets that tables hold, from all over the file."""
    every = np.union1d(scan.tables, scan.extended)
    some = every[:: max(1, len(every) * 64 // _SAMPLE)]
    words = sectors.words(some)
    words[~np.isin(some, scan.tables), 1::2] = 0  # bitmaps
    words = words[(words & q.COMPRESSED == 0) & (words & q.OFFSET_MASK != 0)]
    offsets = (words & q.OFFSET_MASK).view(np.int64)
    return np.asarray(offsets[offsets < scan.size], dtype=np.int64)


def _candidates(sectors: Sectors, scan: Scan, bits: int) -> list[tuple[int, U64]]:
    """Clusters that may be the first of a refcount table: distinct aligned offsets without flags, as many as the
    file may need. With them, the words of their first sector."""
    cluster = 1 << bits
    starts = scan.tables[scan.tables * SECTOR % cluster == 0]
    most = -(-scan.size >> bits) // (cluster // 8) + 2  # blocks of 64-bit refcounts
    out: list[tuple[int, U64]] = []
    for at in range(0, len(starts), 1 << 16):
        part = starts[at : at + (1 << 16)]
        words = sectors.words(part)
        good = (words[:, 0] != 0) & (words & np.uint64(cluster - 1) == 0).all(axis=1)
        good &= (words < np.uint64(scan.size)).all(axis=1)
        if most < words.shape[1]:
            good &= (words[:, most:] == 0).all(axis=1)
        out += [(int(part[i]) * SECTOR, words[i]) for i in np.flatnonzero(good)[:_CANDIDATES]]
        if len(out) >= _CANDIDATES:
            break
    return out[:_CANDIDATES]


def _describing_themselves(disk: Disk, table: int, words: U64, bits: int, offsets: I64) -> list[Geometry]:
    """The refcount widths with which the table and its blocks have refcount 1."""
    cluster, total, out = 1 << bits, -(-disk.size >> bits), []
    for order in range(q.MAX_REFCOUNT_ORDER + 1):
        needed = -(-total // (cluster * 8 >> order))
        near = Geometry(bits, order, table, words[:needed].view(np.int64))
        if near.one(disk, table >> bits) not in (1, None) or near.one(disk, int(words[0]) >> bits) not in (1, None):
            continue
        entries = words[:needed] if needed <= len(words) else _entries(disk, table, needed)
        used = entries[entries != 0]
        if (used >= disk.size).any() or (used & np.uint64(cluster - 1)).any() or (used == table).any():
            continue
        if len(np.unique(used)) < len(used):
            continue
        geometry = Geometry(bits, order, table, entries.view(np.int64))
        own = used[:: max(1, len(used) // _BLOCKS)].view(np.int64) >> bits
        if sum(geometry.one(disk, place) == 1 for place in [table >> bits, *own.tolist()]) < 0.9 * (len(own) + 1):
            continue
        out.append(replace(geometry, merit=_merit(disk, geometry, offsets)))
    return out


def _entries(disk: Disk, table: int, count: int) -> U64:
    return disk.read(table, count * 8).view(q.BE64).astype(np.uint64)


def _merit(disk: Disk, geometry: Geometry, offsets: I64) -> tuple[float, float]:
    """Of what tables point to, the part that is in use; then how near to the file's end the clusters in use end."""
    some = offsets[:: max(1, len(offsets) // _COMPARED)]
    aligned = some[some & (geometry.cluster - 1) == 0] >> geometry.cluster_bits
    agreeing = sum(bool(geometry.one(disk, cluster)) for cluster in aligned.tolist())
    total = -(-disk.size >> geometry.cluster_bits)
    return round(agreeing / max(1, len(some)), 2), round(-abs(total - _end(disk, geometry)) / max(1, total), 2)


def _end(disk: Disk, geometry: Geometry) -> int:
    """The first cluster behind all that are in use."""
    for number in np.flatnonzero(geometry.blocks)[::-1].tolist():
        counts = decode(disk.read(int(geometry.blocks[number]), geometry.cluster), geometry.refcount_order)
        if counts.any():
            return int(number) * len(counts) + int(np.flatnonzero(counts)[-1]) + 1
    return 0


def _by_alignment(offsets: I64) -> int:
    """The largest cluster size of which nearly all offsets are multiples; 0 if there are none."""
    if not len(offsets):
        return 0
    for bits in range(q.MAX_CLUSTER_BITS, q.MIN_CLUSTER_BITS - 1, -1):
        if np.count_nonzero(offsets & ((1 << bits) - 1) == 0) >= 0.98 * len(offsets):
            return bits
    return 0
