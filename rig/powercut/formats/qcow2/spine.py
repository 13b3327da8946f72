"""The spine of an image: everything that says where the L2 tables and the refcount blocks are.

It is read with `Disk.read`: on a crash disk that decides, and the search comes back for the other answers.
Tables are read only as far as the file reaches, whatever length they claim; the rest reads as zeros.

References are collected here as cluster ranges, to be counted when it is known how far they go.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from powercut.disk import Disk
from powercut.formats.qcow2 import bitmaps, snapshots
from powercut.formats.qcow2 import layout as q
from powercut.formats.qcow2.entries import I64, U64, Bools
from powercut.formats.qcow2.findings import Findings
from powercut.formats.qcow2.header import Header


class Overlapping(Exception):
    """The tables together are many times larger than the file: they overlap, and reading them has no end."""


@dataclass(slots=True)
class Ledger:
    """References from the spine, as clusters with a weight; and the bytes of tables that may still be read."""

    header: Header
    length: int  # of the file, in whole sectors, as QEMU counts it
    budget: int
    found: Findings
    ranges: list[tuple[int, int, int]] = field(default_factory=list)  # first, last, weight
    top: int = 0  # the last cluster referenced

    def refer(self, what: str, offset: int, size: int, weight: int = 1) -> None:
        if size <= 0:
            return
        cluster = self.header.cluster_size
        if offset + size - self.length >= cluster:
            text = f"{what}: {offset:#x}+{size:#x} ends a cluster or more beyond the end of the file"
            self.found.corrupt("beyond-end", offset, text, weight)
            return
        last = (offset + size - 1) // cluster
        self.ranges.append((offset // cluster, last, weight))
        self.top = max(self.top, last)

    def read(self, disk: Disk, offset: int, entries: int) -> U64:
        """A table of 64-bit entries, as far as the file reaches."""
        size = min(entries * 8, max(0, self.length - offset))
        self.budget -= size
        if self.budget < 0:
            raise Overlapping
        return disk.read(offset, size).view(q.BE64).astype(np.uint64)


@dataclass(slots=True)
class L1:
    offset: int  # byte offset of the table
    entry: U64
    weight: int  # how many L1 tables are in this place: snapshots may share one, when broken
    active: bool


@dataclass(slots=True)
class Spine:
    ledger: Ledger
    tables: list[L1]  # the active one first
    refcount_table: U64


def read_spine(disk: Disk, header: Header, found: Findings) -> Spine:
    length = -(-disk.size // q.SECTOR) * q.SECTOR
    # A sound image has no table twice. Twice the file, and something for small files, is ample.
    ledger = Ledger(header, length, 2 * length + (16 << 20), found)
    ledger.refer("header", 0, header.cluster_size)
    tables = [_l1(disk, ledger, "active L1 table", header.l1_table_offset, header.l1_size, 1, True)]
    if header.nb_snapshots or header.snapshots_offset:
        tables += _snapshots(disk, ledger)
    table_entries = header.refcount_table_clusters * header.cluster_size // 8
    ledger.refer("refcount table", header.refcount_table_offset, table_entries * 8)
    if header.crypto_header:
        offset, size = header.crypto_header
        if offset > q.MAX_LENGTH or size > q.MAX_LENGTH:
            _out_of_reach(ledger, "encryption header", offset)
        else:
            ledger.refer("encryption header", offset, size)
    if header.bitmaps:
        _bitmaps(disk, ledger)
    return Spine(ledger, tables, ledger.read(disk, header.refcount_table_offset, table_entries))


def _l1(disk: Disk, ledger: Ledger, what: str, offset: int, entries: int, weight: int, active: bool) -> L1:
    ledger.refer(what, offset, entries * 8, weight)
    return L1(offset, ledger.read(disk, offset, entries), weight, active)


def _out_of_reach(ledger: Ledger, what: str, offset: int) -> None:
    """QEMU has not compared this place with its limits before it goes there, and gives up."""
    ledger.found.check_errors += 1
    ledger.found.aborted = f"{what} at {offset:#x}: out of reach"
    ledger.found.corrupt("beyond-end", offset, ledger.found.aborted, 0)


def _snapshots(disk: Disk, ledger: Ledger) -> list[L1]:
    header, found = ledger.header, ledger.found
    table = snapshots.read_snapshots(disk, header)
    if table.broken:
        found.check_errors += 1
        found.aborted = table.broken
        found.unopenable("snapshot-table", header.snapshots_offset, table.broken)
        return []
    if header.data_file and table.snapshots:
        text = f"{len(table.snapshots)} snapshots in an image with an external data file"
        found.corrupt("snapshot-data-file", header.snapshots_offset, text)
    places: dict[tuple[int, int], int] = {}
    for number, s in enumerate(table.snapshots):
        if header.version >= 3 and s.extra_size < q.SNAPSHOT_EXTRA.itemsize:
            text = f"snapshot table entry {number} is incomplete: {s.extra_size} bytes of extra data"
            found.corrupt("snapshot-extra", s.where, text)
        if s.l1_table_offset % header.cluster_size:
            text = f"snapshot {number}: L1 table at {s.l1_table_offset:#x} is not cluster aligned"
            found.corrupt("snapshot-l1", s.where, text)
        elif s.l1_size > q.MAX_L1_BYTES // 8:
            found.corrupt("snapshot-l1", s.where, f"snapshot {number}: {s.l1_size} L1 entries are too many")
        elif s.l1_table_offset + s.l1_size * 8 > q.MAX_LENGTH and s.l1_size:
            _out_of_reach(ledger, f"snapshot {number}: L1 table", s.l1_table_offset)
        elif s.l1_size:
            places[s.l1_table_offset, s.l1_size] = places.get((s.l1_table_offset, s.l1_size), 0) + 1
    ledger.refer("snapshot table", header.snapshots_offset, table.size)
    return [
        _l1(disk, ledger, "snapshot's L1 table", offset, size, weight, False)
        for (offset, size), weight in places.items()
    ]


def _bitmaps(disk: Disk, ledger: Ledger) -> None:
    header, found = ledger.header, ledger.found
    assert header.bitmaps is not None
    where = header.bitmaps.directory_offset
    directory = bitmaps.read_directory(disk, header, header.bitmaps)
    if directory.broken:
        found.aborted = directory.broken
        found.unopenable("bitmap-directory", where, directory.broken)
        return
    ledger.refer("bitmap directory", where, header.bitmaps.directory_size)
    known: dict[tuple[int, int], U64 | None] = {}
    for bitmap in directory.bitmaps:
        place = bitmap.table_offset, bitmap.table_size
        if place not in known:
            known[place] = _bitmap_table(disk, ledger, bitmap)
        table = known[place]
        if table is None or (not bitmap.in_use and bitmap.table_size != bitmaps.expected_table_size(bitmap, header)):
            found.aborted = f"bitmap {bitmap.name!r}: broken bitmap table"
            if bitmap.in_use:
                found.corrupt("bitmap-table", bitmap.where, found.aborted)
            else:
                found.unopenable("bitmap-table", bitmap.where, found.aborted)
            continue
        ledger.refer("bitmap table", bitmap.table_offset, bitmap.table_size * 8)
        for offset in (table & q.BITMAP_TABLE_OFFSET_MASK).tolist():
            if offset:
                ledger.refer("bitmap data", offset, header.cluster_size)


def _bitmap_table(disk: Disk, ledger: Ledger, bitmap: bitmaps.Bitmap) -> U64 | None:
    """The table, or None when QEMU cannot load it."""
    if bitmap.table_offset + bitmap.table_size * 8 > q.MAX_LENGTH:
        return None
    table = ledger.read(disk, bitmap.table_offset, bitmap.table_size)
    offset = table & q.BITMAP_TABLE_OFFSET_MASK
    bad = (table & q.BITMAP_TABLE_RESERVED != 0) | ((offset != 0) & (table & q.BITMAP_TABLE_ALL_ONES != 0))
    bad |= offset & (ledger.header.cluster_size - 1) != 0
    return None if bad.any() else table


def l2_places(spine: Spine) -> tuple[I64, I64, I64]:
    """Offsets of all distinct L2 tables, how many L1 entries refer to each, and how many active ones.

    Defects of L1 entries are reported on the way. An entry that has flags and no offset refers, to QEMU's
    checker, to an L2 table at offset 0; but there it looks at no copied flags, so the table is not active.
    """
    ledger = spine.ledger
    cluster = ledger.header.cluster_size
    offsets: list[I64] = []
    weights: list[I64] = []
    actives: list[I64] = []
    for table in spine.tables:
        index = np.flatnonzero(table.entry)
        entry = table.entry[index]
        offset = (entry & q.OFFSET_MASK).view(np.int64)
        _defects(spine, table, index, "l1-reserved", entry & q.L1_RESERVED != 0, "reserved bits are set")
        _defects(spine, table, index, "l1-unaligned", offset & (cluster - 1) != 0, "not cluster aligned")
        beyond = offset + cluster - ledger.length >= cluster
        _defects(spine, table, index, "beyond-end", beyond, "the L2 table is beyond the end of the file")
        offsets.append(offset)
        weights.append(np.full(len(index), table.weight))
        actives.append(table.active * (offset != 0).astype(np.int64))
    if len(offsets) == 1 and len(offsets[0]) <= 1:
        return offsets[0], weights[0], actives[0]
    places, back = np.unique(np.concatenate(offsets), return_inverse=True)
    count = len(places)
    weight = np.bincount(back, np.concatenate(weights), minlength=count).astype(np.int64)
    active = np.bincount(back, np.concatenate(actives), minlength=count).astype(np.int64)
    return places, weight, active


def _defects(spine: Spine, table: L1, index: I64, kind: str, bad: Bools, text: str) -> None:
    if not bad.any():
        return
    found = spine.ledger.found
    found.corruptions += int(np.count_nonzero(bad)) * table.weight
    which = index[bad]
    found.corrupt_many(
        kind,
        (table.offset + which * 8).tolist(),
        lambda i: f"L1 entry {int(table.entry[which[i]]):#x} (index {int(which[i])}): {text}",
    )
