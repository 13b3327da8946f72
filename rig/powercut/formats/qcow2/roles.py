"""What the bytes of a qcow2 image are for, in words."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from powercut.disk import Disk
from powercut.formats.qcow2 import layout as q
from powercut.formats.qcow2.check import check
from powercut.formats.qcow2.entries import Kind, host_offset, kind
from powercut.stamp import SECTOR


def roles(disk: Disk) -> Callable[[int], str]:
    """The role of any byte, as the metadata on `disk` has it; "free space" where nothing refers to it."""
    result = check(disk)
    header = result.header
    if header is None:
        return lambda offset: "the header" if offset < q.HEADER_V3.itemsize else "something unknown"
    cluster, places = header.cluster_size, [(0, header.cluster_size, "the header")]

    def add(offset: int, length: int, what: str) -> None:
        if offset:
            places.append((offset, offset + length, what))

    add(header.l1_table_offset, header.l1_size * 8, "the L1 table")
    table_length = header.refcount_table_clusters * cluster
    add(header.refcount_table_offset, table_length, "the refcount table")
    add(header.snapshots_offset, cluster, "the snapshot table")
    table = disk.read(header.refcount_table_offset, table_length).view(q.BE64)
    for index in np.flatnonzero(table).tolist():
        first = index * header.refcounts_per_block
        what = f"the refcount block of clusters {first} to {first + header.refcounts_per_block - 1}"
        add(int(table[index]) & q.REFCOUNT_TABLE_OFFSET_MASK, cluster, what)
    if result.active is not None:
        for index, offset in enumerate(result.mapping.table_offset.tolist()):
            if offset > 0:
                start = index * header.l2_entries * cluster
                add(offset, cluster, f"the L2 table of guest bytes from {start:#x} on")
        entry = result.mapping.entry
        stored = np.isin(kind(entry, header), (Kind.NORMAL, Kind.ZERO_ALLOCATED))
        guest = np.flatnonzero(stored)
        host = host_offset(entry[guest])
    else:
        guest = host = np.zeros(0, dtype=np.int64)

    def role(offset: int) -> str:
        for start, stop, what in places:
            if start <= offset < stop:
                return what
        here = np.flatnonzero(host == offset - offset % cluster)
        if len(here):
            return f"guest data at sector {(int(guest[here[0]]) * cluster + offset % cluster) // SECTOR}"
        return "free space"

    return role
