"""The refcounts on disk as sets: of each cluster, the least and the greatest its refcount may be.

Source: QEMU's docs/interop/qcow2.txt, section "Host cluster management". Where QEMU's driver cannot read a
refcount block (its offset is not aligned, or out of reach), the refcount is unknown, and QEMU's checker
counts an internal error for each cluster.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from powercut.disk import Bytes, Disk, gather
from powercut.formats.qcow2 import layout as q
from powercut.formats.qcow2.entries import I64, U64, Bools
from powercut.formats.qcow2.header import Header
from powercut.formats.qcow2.tables import aligned


@dataclass(slots=True)
class Refcounts:
    """Refcounts of clusters 0..len-1; `at` also knows those beyond."""

    disk: Disk
    header: Header
    table: U64  # the refcount table, as far as the file reaches
    first: I64  # one possible content
    low: I64
    high: I64  # the same object as `low` when all is decided
    unknown: Bools | None

    @property
    def decided(self) -> bool:
        return self.low is self.high

    def where(self, cluster: int) -> tuple[int, int]:
        """Byte range of the refcount of `cluster` (which must lie in a refcount block)."""
        block, index = divmod(cluster, self.header.refcounts_per_block)
        start = int(self.table[block]) & q.REFCOUNT_TABLE_OFFSET_MASK
        bits = self.header.refcount_bits
        return start + index * bits // 8, max(1, bits // 8)

    def rests_on(self, cluster: int) -> tuple[tuple[int, int], ...]:
        """The byte range of the refcount of `cluster`, if it could still be another."""
        low, high, _ = self.at(np.array([cluster]))
        return () if low[0] == high[0] else (self.where(cluster),)

    def at(self, clusters: I64) -> tuple[I64, I64, Bools]:
        """Least and greatest refcount of any clusters, and whether they are known."""
        near = clusters < len(self.low)
        index = np.where(near, clusters, 0)
        low, high = self.low[index], self.high[index]
        known = np.ones(len(clusters), dtype=np.bool_) if self.unknown is None else ~self.unknown[index]
        if not near.all():
            far, back = np.unique(clusters[~near], return_inverse=True)
            far_low, far_high, far_known = self._far(far)
            low[~near], high[~near], known[~near] = far_low[back], far_high[back], far_known[back]
        return low, high, known

    def _far(self, clusters: I64) -> tuple[I64, I64, Bools]:
        low, high = np.zeros((2, len(clusters)), dtype=np.int64)
        known = np.ones(len(clusters), dtype=np.bool_)
        per_block = self.header.refcounts_per_block
        blocks = clusters // per_block
        inside = np.flatnonzero(blocks < len(self.table))
        for block in np.unique(blocks[inside]).tolist():
            here = inside[blocks[inside] == block]
            offset = int(self.table[block]) & q.REFCOUNT_TABLE_OFFSET_MASK
            if not offset:
                continue
            if not readable(offset, self.header):
                known[here] = False
                continue
            start, stop = int(clusters[here[0]]) - block * per_block, int(clusters[here[-1]]) - block * per_block + 1
            start -= start % 8  # where eight refcounts share a byte
            least, greatest, _ = _read_block(self.disk, self.header, offset, start, stop)
            index = clusters[here] - (block * per_block + start)
            low[here], high[here] = least[index], greatest[index]
        return low, high, known


def readable(offset: Any, header: Header) -> Any:
    """Whether QEMU can read a block at `offset`, which may be an array."""
    return (offset % header.cluster_size == 0) & (offset <= q.MAX_LENGTH - header.cluster_size)


_AT_ONCE = 1 << 18  # refcounts read with one call


def read_refcounts(disk: Disk, header: Header, table: U64, count: int) -> Refcounts:
    """Refcounts of clusters 0..count-1, and of others on demand."""
    per_block = header.refcounts_per_block
    first = np.zeros(count, dtype=np.int64)
    low = high = first
    unknown: Bools | None = None
    offsets = table[: -(-count // per_block)] & np.uint64(q.REFCOUNT_TABLE_OFFSET_MASK)
    known = np.flatnonzero(offsets)
    whole = known[((known + 1) * per_block <= count) & readable(offsets[known], header)]
    left = {*known.tolist()} - {*whole.tolist()}
    blocks = first[: count // per_block * per_block].reshape(-1, per_block)
    step = max(1, _AT_ONCE // per_block)
    for begin in range(0, len(whole), step):
        part = whole[begin : begin + step]
        raw, several = gather(disk, offsets[part].astype(np.int64), header.cluster_size)
        blocks[part] = decode(raw.reshape(-1), header.refcount_order).reshape(len(part), per_block)
        left |= {int(part[i]) for i, _ in several}
    for block in sorted(left):
        offset = int(offsets[block])
        start, stop = block * per_block, min(count, (block + 1) * per_block)
        if not readable(offset, header):
            if unknown is None:
                unknown = np.zeros(count, dtype=np.bool_)
            unknown[start:stop] = True
            continue
        least, greatest, one = _read_block(disk, header, offset, 0, stop - start)
        if least is not greatest and low is high:
            low, high = first.copy(), first.copy()
        first[start:stop] = one
        if low is not high:
            low[start:stop], high[start:stop] = least, greatest
    return Refcounts(disk, header, table, first, low, high, unknown)


def _read_block(disk: Disk, header: Header, offset: int, start: int, stop: int) -> tuple[I64, I64, I64]:
    """Least, greatest and first refcounts of entries start..stop-1 of a block; the same object if decided."""
    bits = header.refcount_bits
    base = start * bits // 8
    variants = disk.variants(offset + base, -(-stop * bits // 8) - base)
    first = decode(variants.first, header.refcount_order)
    low, high = first, first
    for at, others in aligned(variants, max(1, bits // 8)) if variants.spans else ():
        if low is high:
            low, high = first.copy(), first.copy()
        begin = at * 8 // bits
        for other in others:
            values = decode(other, header.refcount_order)
            for bound, pick in ((low, np.minimum), (high, np.maximum)):
                part = bound[begin : begin + len(values)]
                pick(part, values, out=part)
    count = stop - start
    one = first[:count]
    return (one, one, one) if low is high else (low[:count], high[:count], one)


_WHOLE = {3: "u1", 4: ">u2", 5: ">u4"}


def decode(raw: Bytes, order: int) -> I64:
    """The refcounts of 2**order bits each that are packed in `raw`."""
    if order == 6:
        # No count of references comes near 2**63: greater refcounts need not be told apart.
        return np.minimum(raw.view(q.BE64), np.uint64(q.MAX_OFFSET)).astype(np.int64)
    if order >= 3:
        return raw.view(np.dtype(_WHOLE[order])).astype(np.int64)
    bits = 1 << order
    shifts = np.arange(0, 8, bits, dtype=np.uint8)  # the least significant bits come first
    return (raw[:, None] >> shifts & ((1 << bits) - 1)).reshape(-1).astype(np.int64)
