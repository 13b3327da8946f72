"""What is lost though nothing contradicts itself: clusters that refcounts call used and nothing refers to.

To `qemu-img check` they are leaks, and harmless. They are not, where a table was zeroed: what it pointed to is then
in use and unreachable. Three traces of that are looked for.

- A free-floating L2 table: a leaked cluster of entries, which point to leaked clusters. Its L1 entry is gone.
- A shared L2 table or cluster whose refcount counts one reference more than there is, while the active layer has
  nothing in its place. Its entry is gone, and known.
- An L2 table of zeros, beside leaked clusters that hold data.

A crash can leave the same (a snapshot half deleted, a discard half done), so this is suspicion and not proof. Where the
leaked clusters of the third are the last of the file, it is hardly that: so looks any new table that a crash kept from
being filled. Then the loss is `faint`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from powercut.formats.qcow2 import layout as q
from powercut.formats.qcow2.entries import I64, U64
from powercut.formats.qcow2.forensics.anatomy import Anatomy
from powercut.formats.qcow2.forensics.layers import Layers, Refs
from powercut.formats.qcow2.forensics.notes import guest_range
from powercut.formats.qcow2.forensics.scan import plausible, reach

_MOST = 1 << 16  # leaked clusters, or empty tables, that are looked into
_LOOKED_AT = 1 << 30  # bytes of leaked clusters that are read
_OFFSET = np.uint64(q.OFFSET_MASK)


@dataclass(frozen=True, slots=True)
class Loss:
    """`entry`: an L1 entry (layer, index) and the table it should point to. `table`: an L2 table's offset, and what it
    should hold. With neither, nothing tells how to mend it."""

    kind: str
    text: str
    entry: tuple[int, int, int] | None = None
    table: tuple[int, U64] | None = None
    faint: bool = False

    @property
    def mended(self) -> bool:
        return self.entry is not None or self.table is not None


def losses(anatomy: Anatomy, working: Layers, refs: Refs) -> list[Loss]:
    """`refs`: references by cluster, to data and to L2 tables."""
    counts = anatomy.geometry.counts
    if counts is None or anatomy.header.dirty:
        return []
    known = refs[: len(counts)].copy()
    own = [cluster for cluster in (0, *anatomy.metadata()) if 0 <= cluster < len(known)]
    known[own] = 1 << 31
    owed = counts[: len(known)] > known
    if not owed.any():
        return []
    found = _shared_tables(anatomy, working, owed)
    leaked = np.flatnonzero(owed & (known == 0))[: min(_MOST, max(64, _LOOKED_AT >> anatomy.header.cluster_bits))]
    found += _floating_tables(anatomy, working, leaked, owed, {loss.entry[:2] for loss in found if loss.entry})
    return found + _empty_tables(anatomy, working, leaked, owed)


def _is_owed(owed: NDArray[np.bool_], offsets: U64, bits: int) -> NDArray[np.bool_]:
    clusters = (offsets >> np.uint64(bits)).view(np.int64)
    inside = (clusters > 0) & (clusters < len(owed))
    return inside & owed[np.where(inside, clusters, 0)]


def _shared_tables(anatomy: Anatomy, working: Layers, owed: NDArray[np.bool_]) -> list[Loss]:
    """L1 entries of the active layer that are gone, where a snapshot shares the table."""
    active, found = working.layers[0], []
    for other in working.layers[1:]:
        length = min(len(active.l1), len(other.l1))
        offsets = other.l1[:length] & _OFFSET
        gone = (active.l1[:length] == 0) & _is_owed(owed, offsets, anatomy.header.cluster_bits)
        for index in np.flatnonzero(gone).tolist():
            owed[int(offsets[index]) >> anatomy.header.cluster_bits] = False
            start = index * anatomy.coverage
            where = guest_range(start, start + anatomy.coverage)
            text = f"the L1 entry of {where} is empty, and the table {other.name} has there is owed one reference"
            found.append(Loss("l1-entry", text, (0, index, int(offsets[index]))))
    return found


def _floating_tables(
    anatomy: Anatomy, working: Layers, leaked: I64, owed: NDArray[np.bool_], taken: set[tuple[int, int]]
) -> list[Loss]:
    header, disk, found = anatomy.header, working.disk, []
    per = header.l2_entry_size // 8
    for cluster in leaked.tolist():
        words = disk.read(cluster << header.cluster_bits, header.cluster_size).view(q.BE64).astype(np.uint64)
        entry = words[::per]
        if not entry.any() or not plausible(entry, reach(disk.size)).all():
            continue
        offsets = entry[entry & q.COMPRESSED == 0] & _OFFSET
        offsets = offsets[offsets != 0]
        if not len(offsets) or _is_owed(owed, offsets, header.cluster_bits).mean() < 0.5:
            continue
        if not any(disk.read(int(offset), header.cluster_size).any() for offset in offsets[:_MOST]):
            continue  # it maps nothing but zeros, or it is an L1 table of empty tables
        index = _home(anatomy, working, words, taken)
        text = f"an L2 table at {cluster << header.cluster_bits:#x} of {np.count_nonzero(entry)} entries, "
        if index is None:
            found.append(Loss("floating-table", text + "to which nothing points, and nothing tells where it belongs"))
            continue
        taken.add((0, index))
        start = index * anatomy.coverage
        text += f"to which nothing points: it fits {guest_range(start, start + anatomy.coverage)}"
        found.append(Loss("floating-table", text, (0, index, cluster << header.cluster_bits)))
    return found


def _home(anatomy: Anatomy, working: Layers, words: U64, taken: set[tuple[int, int]]) -> int | None:
    """The L1 index of an active table: where a snapshot's table is most like it, or the only one there is."""
    active, own = working.layers[0].l1, words & _OFFSET
    free = [index for index in np.flatnonzero(active == 0).tolist() if (0, index) not in taken]
    best, found = 0, None
    for other in working.layers[1:]:
        for index in free[:_MOST]:
            offset = int(other.l1[index] & _OFFSET) if index < len(other.l1) else 0
            if not offset:
                continue
            table = working.disk.read(offset, anatomy.header.cluster_size).view(q.BE64).astype(np.uint64) & _OFFSET
            alike = int(np.count_nonzero((table == own) & (own != 0)))
            if alike > best:
                best, found = alike, index
    return free[0] if found is None and len(active) == 1 and free else found


def _empty_tables(anatomy: Anatomy, working: Layers, leaked: I64, owed: NDArray[np.bool_]) -> list[Loss]:
    """L2 tables of zeros: what snapshots say they held, and what nobody says."""
    header, found, empty, where = anatomy.header, [], [], ""
    for batch in working.batches():
        empty += batch.offsets[~batch.words.any(axis=1)].tolist()
    places, _, first = working.places()
    for offset in empty[:_MOST]:
        layer, index = working.home(int(first[np.searchsorted(places, offset)]))
        words = np.zeros(header.cluster_size // 8, dtype=np.uint64)
        for other in working.layers:
            place = int(other.l1[index] & _OFFSET) if index < len(other.l1) else 0
            if place and place != offset:
                table = working.disk.read(place, header.cluster_size).view(q.BE64).astype(np.uint64)
                words = np.where((words == 0) & _entries_owed(table, owed, anatomy), table, words)
        start = index * anatomy.coverage
        where = f"the L2 table at {offset:#x} ({guest_range(start, start + anatomy.coverage)} of {layer.name})"
        if words.any():
            text = f"{where} is empty, and {np.count_nonzero(words)} entries of another layer's are owed one reference"
            found.append(Loss("empty-table", text, table=(offset, words)))
    data = [cluster for cluster in leaked.tolist() if _is_data(anatomy, working, cluster)]
    if empty and data:
        tables = f"{where} is" if len(empty) == 1 else f"{len(empty):,} L2 tables are"
        text = f"{tables} all zeros, and {len(data):,} clusters of data belong to nothing: they may be what was mapped"
        newest = max(int(batch.examined.last[batch.examined.refers].max(initial=0)) for batch in working.batches())
        found.append(Loss("unmapped-data", text, faint=data[len(data) // 2] > newest))
    return found


def _is_data(anatomy: Anatomy, working: Layers, cluster: int) -> bool:
    """Neither zeros nor a table, as an old L1 table is."""
    raw = working.disk.read(cluster << anatomy.header.cluster_bits, anatomy.header.cluster_size)
    return bool(raw.any()) and not plausible(raw.view(q.BE64).astype(np.uint64), reach(working.disk.size)).all()


def _entries_owed(table: U64, owed: NDArray[np.bool_], anatomy: Anatomy) -> NDArray[np.bool_]:
    """Which words of an L2 table belong to entries whose cluster is owed a reference."""
    per = anatomy.header.l2_entry_size // 8
    entry = table[::per]
    plain = entry & q.COMPRESSED == 0
    return np.repeat(plain & _is_owed(owed, entry & _OFFSET, anatomy.header.cluster_bits), per)
