"""The parts of an image, with or without its header: geometry, L1 tables, snapshots, and the header as it was.

Where the header is whole, it says where everything is. Where it is gone, each part is found by its structure, and
what cannot be found is guessed; the notes tell which is which.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from powercut.disk import Disk
from powercut.formats.qcow2 import layout as q
from powercut.formats.qcow2.entries import U64
from powercut.formats.qcow2.forensics import geometry as geometries
from powercut.formats.qcow2.forensics import snapshots
from powercut.formats.qcow2.forensics.geometry import Geometry
from powercut.formats.qcow2.forensics.guest import Guest, told_size
from powercut.formats.qcow2.forensics.notes import Note, guessed, recovered
from powercut.formats.qcow2.forensics.roots import Candidate, Tables, any_extended, l1_candidates, whole_tables
from powercut.formats.qcow2.forensics.scan import SECTOR, Scan
from powercut.formats.qcow2.forensics.snapshots import Saved
from powercut.formats.qcow2.header import Header


@dataclass
class Anatomy:
    disk: Disk
    header: Header  # as it is, or as it was as far as the rest shows
    intact: bool  # whether it is there
    geometry: Geometry
    l1: U64  # the active L1 table
    saved: list[Saved]
    saved_l1: list[U64]  # the L1 table of each snapshot
    notes: list[Note] = field(default_factory=list)
    found: tuple[Tables, Candidate] | None = None  # where the active L1 table was found by its structure

    @property
    def coverage(self) -> int:
        """Guest bytes that one L2 table maps."""
        return self.header.l2_entries * self.header.cluster_size

    def resize(self, size: int) -> None:
        """Say that the guest's disk has `size` bytes. What is mapped behind its end stays."""
        needed = max(-(-size // self.coverage), len(self.l1), *(one.l1_size for one in self.saved), 1)
        self.l1 = np.concatenate([self.l1, np.zeros(needed - len(self.l1), dtype=np.uint64)])
        self.header = replace(self.header, size=size, l1_size=needed)

    def metadata(self) -> set[int]:
        """The clusters of the L1 tables, the refcount table and its blocks, and the snapshot table."""
        header, bits = self.header, self.header.cluster_bits
        places = [(header.l1_table_offset, header.l1_size * 8), (self.geometry.refcount_table, 1)]
        places += [(block, 1) for block in self.geometry.blocks[self.geometry.blocks > 0].tolist()]
        for one in self.saved:
            places += [(one.where, one.end - one.where), (one.l1_table_offset, one.l1_size * 8)]
        return {cluster for offset, length in places for cluster in _clusters(offset, length, bits)}


def by_header(disk: Disk, header: Header, intact: bool, notes: list[Note]) -> Anatomy:
    """The parts as this header has them."""
    size = max(0, min(header.refcount_table_clusters * header.cluster_size, disk.size - header.refcount_table_offset))
    table = disk.read(header.refcount_table_offset, size // 8 * 8).view(q.BE64)
    blocks = (table & q.REFCOUNT_TABLE_OFFSET_MASK).astype(np.uint64).view(np.int64)
    counts = geometries.read_counts(disk, blocks, header.cluster_bits, header.refcount_order)
    geometry = Geometry(header.cluster_bits, header.refcount_order, header.refcount_table_offset, blocks, counts)
    length = max(0, min(header.l1_size * 8, disk.size - header.l1_table_offset))
    l1 = np.zeros(header.l1_size, dtype=np.uint64)
    l1[: length // 8] = disk.read(header.l1_table_offset, length // 8 * 8).view(q.BE64)
    saved = []
    offset = header.snapshots_offset
    for _ in range(min(header.nb_snapshots, q.MAX_SNAPSHOTS)):
        one = snapshots.parse(disk, offset)
        if one is None or one.l1_size > q.MAX_L1_BYTES // 8:
            break
        saved.append(one)
        offset = one.end
    return Anatomy(disk, header, intact, geometry, l1, saved, [snapshots.entries(disk, s) for s in saved], notes)


def by_structure(disk: Disk, found: Scan, geometry: Geometry) -> list[Anatomy]:
    """Anatomies with this geometry, one for each of the likely L1 tables."""
    tables = whole_tables(disk, found, geometry)
    bare = _bare(geometry)
    saved = _snapshot_table(disk, found, geometry, bare)
    without_l1 = np.zeros(0, dtype=np.uint64)
    taken = Anatomy(disk, bare, False, geometry, without_l1, saved, []).metadata() - {0}
    candidates = l1_candidates(disk, found, geometry, tables, taken)
    best: list[Candidate | None] = [c for c in candidates[:3] if c.share >= candidates[0].share - 0.2]
    return [_assembled(disk, geometry, tables, bare, saved, candidate) for candidate in best or [None]]


def begun_earlier(anatomy: Anatomy, clusters: int) -> Anatomy:
    """The same, if the active L1 table that was found begins so many clusters earlier."""
    assert anatomy.found is not None
    tables, active = anatomy.found
    first = active.cluster - clusters
    lead = anatomy.disk.read(first << anatomy.geometry.cluster_bits, clusters << anatomy.geometry.cluster_bits)
    entries = np.concatenate([lead.view(q.BE64).astype(np.uint64), active.entries])
    longer = replace(active, cluster=first, entries=entries)
    return _assembled(anatomy.disk, anatomy.geometry, tables, _bare(anatomy.geometry), anatomy.saved, longer)


def _clusters(offset: int, length: int, bits: int) -> range:
    return range(offset >> bits, -(-(offset + length) >> bits))


def _bare(geometry: Geometry) -> Header:
    order = geometry.refcount_order
    return Header(3, 0, geometry.cluster_bits, 0, 0, 0, geometry.refcount_table, 1, 0, 0, 0, 0, 0, order, 112, 0)


def _snapshot_table(disk: Disk, found: Scan, geometry: Geometry, bare: Header) -> list[Saved]:
    """The current snapshot table. The one that bytes 60 to 71 tell of, if they do: QEMU of 2009 patches its header
    there whatever has come to lie on it."""
    count, offset = (int.from_bytes(disk.read(at, n).tobytes(), "big") for at, n in ((60, 4), (64, 8)))
    if 0 < count <= q.MAX_SNAPSHOTS and offset and offset % geometry.cluster == 0 and offset < disk.size:
        patched = snapshots.table_at(disk, offset, bare, count)
        if len(patched) == count:
            return patched
    best: list[Saved] = []
    starts = found.snapshots[found.snapshots * SECTOR % geometry.cluster == 0]
    for start in starts[geometry.in_use(starts * SECTOR >> geometry.cluster_bits)][:10_000].tolist():
        table = snapshots.table_at(disk, start * SECTOR, bare)
        used = geometry.in_use(np.array([s.l1_table_offset >> geometry.cluster_bits for s in table], dtype=np.int64))
        table = table[: len(table) if used.all() else int(used.argmin())]
        best = max(best, table, key=lambda t: (len(t), max((s.date for s in t), default=(0, 0))))
    return best


def _assembled(
    disk: Disk, geometry: Geometry, tables: Tables, bare: Header, saved: list[Saved], active: Candidate | None
) -> Anatomy:
    saved_l1 = [snapshots.entries(disk, one) for one in saved]
    extended, sure = any_extended(disk, [active.entries] if active is not None else saved_l1, tables, geometry)
    l1 = active.entries if active is not None else np.zeros(0, dtype=np.uint64)
    header = replace(
        bare,
        version=2 if any(len(one.extra) < q.SNAPSHOT_EXTRA.itemsize for one in saved) else 3,
        incompatible=q.INCOMPATIBLE_EXTENDED_L2 if extended else 0,
        l1_table_offset=active.cluster << geometry.cluster_bits if active is not None else 0,
        nb_snapshots=len(saved),
        snapshots_offset=saved[0].where if saved else 0,
    )
    anatomy = Anatomy(disk, header, False, geometry, l1, saved, saved_l1)
    anatomy.found = (tables, active) if active is not None else None
    size, note = _size(anatomy)
    anatomy.resize(size)
    if not sure:
        width = 16 if extended else 8
        anatomy.notes.append(guessed("L2 entries", f"of {width} bytes: there are too few of them to tell"))
    anatomy.notes += [*_notes(anatomy, active), note]
    return anatomy


def _size(anatomy: Anatomy) -> tuple[int, Note]:
    """The size of the guest's disk."""
    used = np.flatnonzero(anatomy.l1)
    coverage, mapped = anatomy.coverage, 0
    known = [one.disk_size for one in anatomy.saved if one.disk_size]
    ends = [one.vm_state_index(coverage) for one in anatomy.saved]
    vm_state = any(one.vm_state_size for one in anatomy.saved)
    for index in reversed(used.tolist()):
        end = _mapped_end(anatomy, index)
        if end and not (vm_state and index >= max(ends)):
            mapped = index * coverage + end
            break
    told = told_size(Guest(anatomy.disk, anatomy.header, anatomy.l1).read(0, 4096))
    limit = q.MAX_L1_BYTES // 8 * coverage
    if told and mapped <= told[0] <= limit:
        return told[0], guessed("size", f"{told[0]:,} bytes: {told[1]}")
    if known and max(known) >= mapped:
        return max(known), guessed("size", f"{max(known):,} bytes, as when the largest snapshot was taken")
    if ends and not known and mapped <= max(ends) * coverage:
        size = max(ends) * coverage
        why = f"a snapshot's L1 table has room for {max(ends)} times {coverage:,} bytes of it, or less"
        return size, guessed("size", f"{size:,} bytes: {why}")
    return mapped, guessed("size", f"{mapped:,} bytes: the last mapped cluster ends there; the disk may be larger")


def _mapped_end(anatomy: Anatomy, index: int) -> int:
    """Where the last mapped cluster of the L2 table of this L1 entry ends, within what the table maps."""
    offset = int(anatomy.l1[index]) & q.OFFSET_MASK
    if offset % anatomy.header.cluster_size or offset >= anatomy.disk.size:
        return 0
    words = anatomy.disk.read(offset, anatomy.header.cluster_size).view(q.BE64)
    used = np.flatnonzero(words[:: anatomy.header.l2_entry_size // 8])
    return (int(used[-1]) + 1) * anatomy.header.cluster_size if len(used) else 0


def _notes(anatomy: Anatomy, active: Candidate | None) -> list[Note]:
    header, geometry = anatomy.header, anatomy.geometry
    notes = []
    if geometry.counts is not None:
        place = f"{geometry.refcount_table:#x}"
        notes += [
            recovered("cluster size", f"{geometry.cluster:,} bytes: the refcount table at {place} describes itself"),
            recovered("refcounts", f"{header.refcount_bits} bits wide, the table at {place}"),
        ]
    else:
        text = f"{geometry.cluster:,} bytes: all offsets in tables are multiples of it; no refcount table was found"
        notes.append(guessed("cluster size", text))
    if active is not None:
        used = int(np.count_nonzero(active.entries))
        text = f"at {header.l1_table_offset:#x}, {used} of its entries in use"
        notes.append(recovered("L1 table", text) if active.share == 1 else guessed("L1 table", text))
    else:
        notes.append(guessed("L1 table", "none was found: empty, or gone"))
    if header.version == 2:
        notes.append(recovered("version", "2: a snapshot lacks what version 3 wants"))
    elif header.refcount_order != 4 or header.extended_l2:
        notes.append(recovered("version", "3: version 2 has no such refcounts or L2 entries"))
    else:
        notes.append(guessed("version", "3: nothing that is left tells it from 2"))
    for one in anatomy.saved:
        text = f"{one.called}, its L1 table of {one.l1_size} entries at {one.l1_table_offset:#x}"
        notes.append(recovered("snapshot", text))
    return notes


def header_document(anatomy: Anatomy) -> dict[str, Any]:
    """The header as it is, or as it was as far as the rest shows."""
    header = anatomy.header
    return {
        "intact": anatomy.intact,
        "version": header.version,
        "size": header.size,
        "cluster_size": header.cluster_size,
        "refcount_bits": header.refcount_bits,
        "extended_l2": header.extended_l2,
        "l1_table_offset": header.l1_table_offset,
        "l1_size": header.l1_size,
        "refcount_table_offset": header.refcount_table_offset,
        "nb_snapshots": header.nb_snapshots,
        "snapshots_offset": header.snapshots_offset,
    }
