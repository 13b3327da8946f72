"""What an L2 entry says, for whole arrays of entries at once.

Sources: QEMU's docs/interop/qcow2.txt, sections "Cluster mapping" and "Extended L2 Entries"; the kinds are
those of qcow2_get_cluster_type (block/qcow2.h), the defects those of check_refcounts_l2
(block/qcow2-refcount.c).

The zero flag is read in version 2 as in version 3, because QEMU's checker does so.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from powercut.formats.qcow2 import layout as q
from powercut.formats.qcow2.header import Header

U64 = NDArray[np.uint64]
I64 = NDArray[np.int64]
Bools = NDArray[np.bool_]


class Kind(enum.IntEnum):
    UNALLOCATED = 0
    ZERO_PLAIN = 1
    ZERO_ALLOCATED = 2
    NORMAL = 3  # with extended L2 entries: has a host cluster; the bitmap says what each subcluster is
    COMPRESSED = 4


def kind(entry: U64, header: Header) -> NDArray[np.uint8]:
    """The `Kind` of each entry."""
    has_offset = entry & q.OFFSET_MASK != 0
    # Offset 0 is a valid place in an external data file; there the copied flag tells it from nothing.
    normal = has_offset | (entry & q.COPIED != 0) if header.data_file else has_offset
    out = np.where(normal, np.uint8(Kind.NORMAL), np.uint8(Kind.UNALLOCATED))
    if not header.extended_l2:
        zero = entry & q.ZERO != 0
        out[zero] = Kind.ZERO_PLAIN
        out[zero & has_offset] = Kind.ZERO_ALLOCATED
    out[entry & q.COMPRESSED != 0] = Kind.COMPRESSED
    return out


def host_offset(entry: U64) -> I64:
    """Where the host cluster of a normal or zero-allocated entry starts (0: nowhere, or a data file's start)."""
    return (entry & q.OFFSET_MASK).view(np.int64)


def compressed_extent(entry: U64, header: Header) -> tuple[I64, I64]:
    """Byte offset and length of the compressed data of each (compressed) entry."""
    shift = 62 - (header.cluster_bits - 8)
    offset = (entry & ((1 << shift) - 1)).view(np.int64)
    sectors = ((entry >> shift) & ((1 << (header.cluster_bits - 8)) - 1)).view(np.int64) + 1
    return offset, sectors * q.SECTOR - (offset & (q.SECTOR - 1))


@dataclass(slots=True)
class Examined:
    """Entries taken apart. Clusters `first`..`last` are referenced where `refers`."""

    defects: list[tuple[str, Bools]]
    allocated: Bools  # normal or zero-allocated: those whose copied flag means something
    refers: Bools
    first: I64
    last: I64

    def references(self) -> Iterator[tuple[I64, I64]]:
        """Pairs of arrays: index of an entry, cluster it refers to. No pair comes twice."""
        index = np.flatnonzero(self.refers)
        first, last = self.first[index], self.last[index]
        while len(index):
            yield index, first
            more = first < last
            index, first, last = index[more], first[more] + 1, last[more]


# Defects that QEMU's checker does not count. The driver fails to read such a cluster (version 2: an I/O error).
UNCOUNTED = frozenset({"v2-zero-flag"})

DEFECTS = {
    "l2-reserved": "reserved bits are set",
    "l2-unaligned": "the host offset is not cluster aligned",
    "beyond-end": "the host range ends a cluster or more beyond the end of the file",
    "compressed-copied": "a compressed cluster bears the copied flag",
    "compressed-data-file": "a compressed cluster in an image with an external data file",
    "compressed-bitmap": "a compressed cluster has a subcluster bitmap",
    "subcluster-both": "a subcluster is allocated and reads as zeros",
    "subcluster-nowhere": "subclusters are allocated, and there is no host cluster",
    "v2-zero-flag": "the zero flag is set in a version 2 image",
}


def plain_clusters(entry: U64, bitmap: U64 | None, header: Header, length: int) -> I64 | None:
    """The cluster of each entry, 0 for unallocated ones; None unless all are free of defects and not compressed.

    One OR over all words tells whether a bit is set that a plain entry does not have.
    """
    odd = q.COMPRESSED | q.L2_STANDARD_RESERVED | (q.OFFSET_MASK & (header.cluster_size - 1))
    if header.version < 3:
        odd |= q.ZERO
    if header.data_file or not entry.size or int(np.bitwise_or.reduce(entry, axis=None)) & odd:
        return None
    clusters = ((entry & q.OFFSET_MASK) >> header.cluster_bits).view(np.int64)
    if int(clusters.max()) << header.cluster_bits >= length:
        return None
    if bitmap is None:
        return clusters
    broken = (bitmap >> 32 & bitmap).any() or ((clusters == 0) & (bitmap & q.SUB_ALLOCATED != 0)).any()
    return None if broken else clusters


def examine(entry: U64, bitmap: U64 | None, header: Header, length: int) -> Examined:
    """Take entries apart. `length` is that of the file, in bytes."""
    clusters = plain_clusters(entry, bitmap, header, length)
    if clusters is not None:
        return Examined([], clusters != 0, clusters != 0, clusters, clusters)
    cluster = header.cluster_size
    kinds = kind(entry, header)
    compressed = kinds == Kind.COMPRESSED
    allocated = (kinds == Kind.NORMAL) | (kinds == Kind.ZERO_ALLOCATED)
    defects = [("l2-reserved", ~compressed & (entry & q.L2_STANDARD_RESERVED != 0))]
    offset = host_offset(entry)
    size = np.full(entry.shape, cluster, dtype=np.int64)
    defects.append(("l2-unaligned", allocated & (offset & (cluster - 1) != 0)))
    refers = compressed | allocated
    if compressed.any():
        at, extent = compressed_extent(entry, header)
        offset, size = np.where(compressed, at, offset), np.where(compressed, extent, size)
        defects.append(("compressed-copied", compressed & (entry & q.COPIED != 0)))
        if header.data_file:
            defects.append(("compressed-data-file", compressed))
        elif bitmap is not None:
            has_bitmap = compressed & (bitmap != 0)
            defects.append(("compressed-bitmap", has_bitmap))
            refers &= ~has_bitmap
    if header.data_file:
        refers = np.zeros_like(refers)
    if bitmap is not None:
        defects.append(("subcluster-both", allocated & (bitmap >> 32 & bitmap != 0)))
        defects.append(("subcluster-nowhere", (kinds == Kind.UNALLOCATED) & (bitmap & q.SUB_ALLOCATED != 0)))
    elif header.version < 3:
        defects.append(("v2-zero-flag", (kinds == Kind.ZERO_PLAIN) | (kinds == Kind.ZERO_ALLOCATED)))
    beyond = refers & (offset + size - length >= cluster)
    defects.append(("beyond-end", beyond))
    refers &= ~beyond
    first = offset >> header.cluster_bits
    last = (offset + size - 1) >> header.cluster_bits
    return Examined([(name, mask) for name, mask in defects if mask.any()], allocated, refers, first, last)
