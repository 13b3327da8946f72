"""A table over the header, into which the header's snapshot count and offset were patched: what its entries were.

Bytes 60 to 71 are the low half of the eighth word and the ninth. A refcount that is higher than the references found
says that something else refers to the cluster: perhaps an entry that is gone. That makes an entry likely which
follows its neighbours and which nothing else claims, and one which another layer has in the same place. Neither is
certain: the defect that freed cluster 0 left refcounts too high.
"""

from __future__ import annotations

import numpy as np

from powercut.disk import Disk
from powercut.formats.qcow2 import layout as q
from powercut.formats.qcow2.entries import I64, U64
from powercut.formats.qcow2.forensics.anatomy import Anatomy
from powercut.formats.qcow2.forensics.layers import Layer, Layers, all_references, clean, of
from powercut.formats.qcow2.forensics.notes import Note, guessed, guest_range, lost
from powercut.formats.qcow2.forensics.overlay import Overlaid

_OFFSET = np.uint64(q.OFFSET_MASK)
_SLOTS = (7, 8)


def is_patched(anatomy: Anatomy, words: U64) -> bool:
    """Whether bytes 60 to 71 hold the count and the offset of the snapshots that there are."""
    saved = anatomy.saved
    return bool(saved) and int(words[7]) & 0xFFFF_FFFF == len(saved) and int(words[8]) == saved[0].where


def restore_l2(anatomy: Anatomy, words: U64, homes: list[tuple[int, int]]) -> tuple[U64, list[Note]]:
    """The L2 table without the header's fields in it."""
    header = anatomy.header
    words, high = _without(words)
    place = -(-anatomy.disk.size >> header.cluster_bits) << header.cluster_bits
    layers = of(anatomy)
    clean(layers, anatomy, homes)
    for number, index in homes:
        layers[number].l1[index] = place
    owed = _Owed(anatomy, Overlaid(anatomy.disk, {place: words.astype(q.BE64).tobytes()}), layers)
    notes: list[Note] = []
    for slot in _SLOTS:
        what = f"entry {slot} of the table at offset 0"
        if homes:
            start = (homes[0][1] * header.l2_entries + slot) * header.cluster_size
            what += f" ({guest_range(start, start + header.cluster_size)})"
        near = [o for o in _by_neighbours(words, slot, header.cluster_size) if owed(o) and not owed.refs(o)]
        same = [o for o in (_same_place(anatomy, layers, homes[0][1], slot) if homes else ()) if owed(o)]
        fits = [o for o in near + same if slot != 7 or o >> 32 == high]
        if fits:
            words[slot] = fits[0]
            why = "it follows its neighbours" if fits[0] in near else "another layer has it"
            notes.append(guessed("overwritten entry", f"{what}: {fits[0]:#x}, for {why}, and its refcount has room"))
        elif words[slot - 1] & _OFFSET or words[9] & _OFFSET:
            notes.append(lost("overwritten entry", f"{what}: nothing tells what it was"))
    return words, notes


def restore_l1(anatomy: Anatomy, number: int, words: U64) -> tuple[U64, list[Note]]:
    """The L1 table of snapshot `number` without the header's fields in it."""
    words, high = _without(words)
    layers = of(anatomy)
    layers[number + 1].l1 = words.copy()
    clean(layers, anatomy, [])
    owed = _Owed(anatomy, anatomy.disk, layers)
    notes: list[Note] = []
    for slot in _SLOTS:
        others = [int(layer.l1[slot] & _OFFSET) for layer in layers if slot < len(layer.l1) and layer.l1[slot]]
        fits = [o for o in others if owed(o) and (slot != 7 or o >> 32 == high)]
        what = f"L1 entry {slot} of {layers[number + 1].name}"
        if fits:
            words[slot] = fits[0]
            notes.append(guessed("overwritten entry", f"{what}: {fits[0]:#x}, for another layer has it"))
        elif others:
            notes.append(lost("overwritten entry", f"{what}: nothing tells what it was"))
    return words, notes


def _without(words: U64) -> tuple[U64, int]:
    """The words with the patched ones emptied, and what is left of the offset in the first: its high half."""
    words, high = words.copy(), (int(words[7]) & q.OFFSET_MASK) >> 32
    words[list(_SLOTS)] = 0
    return words, high


class _Owed:
    """Whether the refcount of the cluster at an offset is higher than the references that are left."""

    def __init__(self, anatomy: Anatomy, disk: Disk, layers: list[Layer]) -> None:
        header = anatomy.header
        self._bits, self._geometry = header.cluster_bits, anatomy.geometry
        working = Layers(disk, header, layers, anatomy.disk.size)
        self._refs = all_references(working, -(-disk.size >> header.cluster_bits))
        self._refs[[c for c in anatomy.metadata() if 0 <= c < len(self._refs)]] = 1 << 30

    def refs(self, offset: int) -> int:
        cluster = offset >> self._bits
        return int(self._refs[cluster]) if 0 < cluster < len(self._refs) else 0

    def __call__(self, offset: int) -> bool:
        cluster = offset >> self._bits
        if not 0 < cluster < len(self._refs) or offset % (1 << self._bits):
            return False
        count = int(self._geometry.count(np.array([cluster], dtype=np.int64))[0])
        return count > int(self._refs[cluster])


def _same_place(anatomy: Anatomy, layers: list[Layer], index: int, slot: int) -> list[int]:
    """Where other layers' tables for the same part of the disk have this guest cluster."""
    tables = [int(layer.l1[index] & _OFFSET) for layer in layers if index < len(layer.l1)]
    raw = [anatomy.disk.read(table + 8 * slot, 8) for table in tables if table]
    found = [int.from_bytes(entry.tobytes(), "big") & q.OFFSET_MASK for entry in raw]
    return [offset for offset in found if offset]


def _by_neighbours(words: U64, slot: int, cluster: int) -> list[int]:
    hosts: I64 = (words & _OFFSET).view(np.int64)
    before = [int(hosts[slot - d]) + d * cluster for d in (1, 2) if hosts[slot - d]]
    behind = [int(hosts[slot + d]) - d * cluster for d in (1, 2) if slot + d < len(hosts) and hosts[slot + d]]
    return before + behind
