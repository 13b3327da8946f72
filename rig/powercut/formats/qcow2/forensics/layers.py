"""The layers of an image (the active one and each snapshot) and their L2 tables, read table by table.

An entry that cannot be right is found here: it would make QEMU refuse, or read what is not there. Source: the
defects that check_refcounts_l2 knows (block/qcow2-refcount.c), see `powercut.formats.qcow2.entries`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from powercut.disk import Disk
from powercut.formats.qcow2 import layout as q
from powercut.formats.qcow2.entries import DEFECTS, I64, U64, Bools, Examined, Kind, examine, kind
from powercut.formats.qcow2.forensics.anatomy import Anatomy
from powercut.formats.qcow2.forensics.notes import Note, guest_range, lost
from powercut.formats.qcow2.header import Header

_TOLD = 20  # damaged L1 entries of a layer that are told one by one
_BATCH = 1 << 20  # entries that are looked at together
_HARMLESS = {"compressed-copied", "v2-zero-flag"}  # a flag that is wrong, beside a mapping that is right
_DEFECTS = {
    **DEFECTS,
    "in-header": "the host range is the header's",
    "cut-off": "the host range reaches beyond the end of the file",
}


Refs = NDArray[np.uint32]


@dataclass
class Layer:
    name: str
    l1: U64


@dataclass(slots=True)
class Batch:
    """Some L2 tables. `damaged` entries are already emptied."""

    offsets: I64
    weight: I64  # how many L1 entries point to each
    words: U64  # (tables, cluster / 8), as they should be, but for the copied flags
    examined: Examined
    changed: Bools  # by table


@dataclass
class Layers:
    disk: Disk
    header: Header
    layers: list[Layer]
    size: int  # of the damaged file: what points beyond it points to nothing
    notes: list[Note] = field(default_factory=list)

    def places(self) -> tuple[I64, I64, I64]:
        """Distinct L2 tables: byte offset, how many L1 entries point there, and the first of them (its number
        among all L1 entries of all layers)."""
        every = np.concatenate([layer.l1 for layer in self.layers]) & q.OFFSET_MASK
        index = np.flatnonzero(every)
        offsets, first, counts = np.unique(every[index], return_index=True, return_counts=True)
        return offsets.view(np.int64), counts.astype(np.int64), index[first]

    def batches(self) -> Iterator[Batch]:
        """All L2 tables once, their damaged entries emptied; what was damaged is not told."""
        for batch, _ in self._batches():
            yield batch

    def tell_damage(self) -> Iterator[Batch]:
        """The same, with notes of what is damaged."""
        for batch, damage in self._batches():
            self.notes += damage
            yield batch

    def _batches(self) -> Iterator[tuple[Batch, list[Note]]]:
        header = self.header
        offsets, weight, first = self.places()
        step = max(1, _BATCH // header.l2_entries)
        per = header.l2_entry_size // 8
        for at in range(0, len(offsets), step):
            part = offsets[at : at + step]
            words = np.stack([self.disk.read(o, header.cluster_size).view(q.BE64) for o in part.tolist()])
            words = words.astype(np.uint64)
            entry = np.ascontiguousarray(words[:, ::per])
            bitmap = np.ascontiguousarray(words[:, 1::2]) if per == 2 else None
            examined = examine(entry.reshape(-1), None if bitmap is None else bitmap.reshape(-1), header, self.size)
            damage = [(name, mask) for name, mask in examined.defects if name not in _HARMLESS]
            beyond = examined.last >= -(-self.size >> header.cluster_bits)
            damage += [("in-header", examined.refers & (examined.first == 0)), ("cut-off", examined.refers & beyond)]
            damage = [(name, mask) for name, mask in damage if mask.any()]
            notes = [self._damage(name, mask, first[at : at + step]) for name, mask in damage]
            changed = np.zeros(len(part), dtype=np.bool_)
            for _, mask in damage:
                rows = mask.reshape(len(part), -1)
                changed |= rows.any(axis=1)
                words[np.repeat(rows, per, axis=1)] = 0
                examined.refers &= ~mask
            yield Batch(part, weight[at : at + step], words, examined, changed), notes

    def _damage(self, name: str, mask: Bools, first: I64) -> Note:
        bad = np.flatnonzero(mask)
        cluster, per_table = self.header.cluster_size, self.header.l2_entries
        table, slot = divmod(int(bad[0]), per_table)
        layer, index = self.home(int(first[table]))
        start = (index * per_table + slot) * cluster
        more = f" and {len(bad) - 1:,} more" if len(bad) > 1 else ""
        where = f"{layer.name}: {guest_range(start, start + cluster)}{more}"
        return lost("guest data", f"{where}: {_DEFECTS[name]}; emptied")

    def home(self, number: int) -> tuple[Layer, int]:
        """The layer and the index of an L1 entry that `places` numbers."""
        for layer in self.layers:
            if number < len(layer.l1):
                return layer, number
            number -= len(layer.l1)
        raise IndexError(number)


def of(anatomy: Anatomy) -> list[Layer]:
    snapshots = zip(anatomy.saved, anatomy.saved_l1, strict=True)
    return [Layer("the active layer", anatomy.l1.copy()), *(Layer(s.called, l1.copy()) for s, l1 in snapshots)]


def clean(layers: list[Layer], anatomy: Anatomy, homes: list[tuple[int, int]]) -> list[Note]:
    """Empty the L1 entries that point to no place for a table, but for `homes` (layer, index), and take off the flags
    of the others. What was emptied."""
    notes = []
    for number, layer in enumerate(layers):
        offset = layer.l1 & q.OFFSET_MASK
        bad = (layer.l1 & q.L1_RESERVED != 0) | (offset & np.uint64(anatomy.header.cluster_size - 1) != 0)
        bad |= (offset >= np.uint64(anatomy.disk.size)) | ((offset == 0) & (layer.l1 != 0))
        bad[[index for owner, index in homes if owner == number]] = False
        for index in np.flatnonzero(bad)[:_TOLD].tolist():
            start = index * anatomy.coverage
            where = f"{layer.name}: {guest_range(start, start + anatomy.coverage)}"
            notes.append(lost("guest data", f"{where}: L1 entry {int(layer.l1[index]):#x} points to no L2 table"))
        if (more := int(np.count_nonzero(bad)) - _TOLD) > 0:
            notes.append(lost("guest data", f"{layer.name}: {more:,} more L1 entries point to no L2 table"))
        layer.l1[bad] = 0
        layer.l1 &= q.OFFSET_MASK
        if not len(layer.l1):
            layer.l1 = np.zeros(1, dtype=np.uint64)
    return notes


def count_references(layers: Layers, total: int, *, tell: bool = False) -> Refs:
    """How often L2 entries refer to each of the first `total` clusters, by the paths that lead there."""
    refs = np.zeros(total, dtype=np.uint32)
    for batch in layers.tell_damage() if tell else layers.batches():
        for index, clusters in batch.examined.references():
            weight = batch.weight[index // layers.header.l2_entries].astype(np.uint32)
            inside = clusters < total
            np.add.at(refs, clusters[inside], weight[inside])
    return refs


def all_references(layers: Layers, total: int, *, tell: bool = False) -> Refs:
    """The same with the references of L1 entries to L2 tables."""
    refs = count_references(layers, total, tell=tell)
    places, weight, _ = layers.places()
    np.add.at(refs, places >> layers.header.cluster_bits, weight.astype(np.uint32))
    return refs


def set_copied(batch: Batch, header: Header, refs: Refs) -> None:
    """The copied flag where the only reference to a cluster is this one, and nowhere else."""
    per = header.l2_entry_size // 8
    entry = batch.words[:, ::per]
    kinds = kind(entry, header)
    host = ((entry & q.OFFSET_MASK) >> header.cluster_bits).view(np.int64)
    plain = (kinds == Kind.NORMAL) | (kinds == Kind.ZERO_ALLOCATED)
    alone = plain & (refs[np.where(plain, host, 0)] == 1)
    new = np.where(alone, entry | q.COPIED, entry & ~np.uint64(q.COPIED))
    batch.changed |= (new != entry).any(axis=1)
    batch.words[:, ::per] = new
