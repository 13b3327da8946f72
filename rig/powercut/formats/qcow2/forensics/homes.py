"""Where the L2 table at offset 0 belongs, and what its entries were that the header's fields overwrote.

An L1 entry with the copied flag and offset 0 says it. Taking a snapshot clears that flag, and the entry is 0 like
any that points nowhere: then a snapshot with VM state and no table for it tells, or a table of another layer that
shares clusters with this one.

A refcount that is higher than the references found says that something else refers to the cluster: perhaps an entry
that is gone. That makes an entry likely which follows its neighbours and which nothing else claims, and one which
another layer has in the same place. Neither is certain: the defect that freed cluster 0 left refcounts too high.
"""

from __future__ import annotations

import numpy as np

from powercut.formats.qcow2 import layout as q
from powercut.formats.qcow2.entries import I64, U64
from powercut.formats.qcow2.forensics.anatomy import Anatomy
from powercut.formats.qcow2.forensics.layers import Layers, all_references, clean, of
from powercut.formats.qcow2.forensics.notes import Note, guessed, guest_range, lost
from powercut.formats.qcow2.forensics.overlay import Overlaid

_OFFSET = np.uint64(q.OFFSET_MASK)
PATCHED = (7, 8)  # the words that bytes 60 to 71 belong to


def homes_of_first(anatomy: Anatomy, words: U64 | None) -> tuple[list[tuple[int, int]], bool]:
    """The L1 entries (number of the layer, index) that point to offset 0 or should; and whether that is sure.
    Without `words`, those that say it themselves."""
    layers = of(anatomy)
    told = [
        (number, int(index))
        for number, layer in enumerate(layers)
        for index in np.flatnonzero((layer.l1 != 0) & (layer.l1 & _OFFSET == 0))
    ]
    if told or words is None:
        return told, True
    index = _of_vm_state(anatomy)
    if index is None:
        index = _most_alike(anatomy, words)
    if index is None and anatomy.header.l1_size == 1:
        index = 0
    if index is None:
        return [], False
    number = int(anatomy.geometry.count(np.array([0]))[0]) or 1
    empty = [n for n, layer in enumerate(layers) if index < len(layer.l1) and not layer.l1[index]]
    order = sorted(empty, key=lambda n: (n != 0, -n))  # the active layer, then the newest snapshot
    return [(n, index) for n in order[:number]], False


def _of_vm_state(anatomy: Anatomy) -> int | None:
    """The L1 index at which a snapshot has VM state and no table for it."""
    for one, l1 in reversed(list(zip(anatomy.saved, anatomy.saved_l1, strict=True))):
        if not one.vm_state_size:
            continue
        index = one.vm_state_index(anatomy.coverage)
        if 0 <= index < len(l1) and not l1[index]:
            return index
    return None


def _most_alike(anatomy: Anatomy, words: U64) -> int | None:
    """The L1 index where another layer has the table that shares most clusters with this one."""
    own = words & _OFFSET
    best, found = 0, None
    for layer in of(anatomy):
        for index in np.flatnonzero(layer.l1 & _OFFSET)[:4096].tolist():
            offset = int(layer.l1[index]) & q.OFFSET_MASK
            if offset % anatomy.header.cluster_size or offset >= anatomy.disk.size:
                continue
            other = anatomy.disk.read(offset, anatomy.header.cluster_size).view(q.BE64).astype(np.uint64) & _OFFSET
            alike = int(np.count_nonzero((own == other) & (own != 0)))
            if alike > best:
                best, found = alike, index
    return found


def restore_patched(anatomy: Anatomy, words: U64, index: int | None) -> tuple[U64, list[Note]]:
    """The table without the header's fields in it. `index` is that of its L1 entry; None for an L1 table."""
    header = anatomy.header
    words = words.copy()
    high = int(words[7]) >> 32
    words[7], words[8] = 0, 0
    owed = _owed(anatomy, words)
    notes: list[Note] = []
    for slot in PATCHED:
        what = f"entry {slot} of the table at offset 0"
        if index is not None:
            start = (index * header.l2_entries + slot) * header.cluster_size
            what += f" ({guest_range(start, start + header.cluster_size)})"
        near = [o for o in _by_neighbours(words, slot, header.cluster_size) if owed(o, alone=True)]
        same = [o for o in _same_place(anatomy, index, slot) if owed(o)]
        fits = [o for o in near + same if slot != 7 or o >> 32 == high]
        if fits:
            words[slot] = fits[0]
            why = "it follows its neighbours" if fits[0] in near else "another layer has it"
            notes.append(guessed("overwritten entry", f"{what}: {fits[0]:#x}, for {why}, and its refcount has room"))
        elif words[slot - 1] & _OFFSET or words[9] & _OFFSET:
            notes.append(lost("overwritten entry", f"{what}: nothing tells what it was"))
    return words, notes


class _owed:  # noqa: N801 - a closure with a name
    """Whether the refcount of the cluster at an offset is higher than the references that are left."""

    def __init__(self, anatomy: Anatomy, words: U64) -> None:
        header, disk = anatomy.header, anatomy.disk
        self._bits, self._counts = header.cluster_bits, anatomy.geometry
        total = -(-disk.size >> header.cluster_bits)
        place = total << header.cluster_bits
        layers = of(anatomy)
        homes = homes_of_first(anatomy, words)[0]
        clean(layers, anatomy, homes)
        for number, index in homes:
            layers[number].l1[index] = place
        working = Layers(Overlaid(disk, {place: words.astype(q.BE64).tobytes()}), header, layers, disk.size)
        self._refs = all_references(working, total + 1)
        self._refs[[c for c in anatomy.metadata() if c < len(self._refs)]] = 1 << 30

    def __call__(self, offset: int, *, alone: bool = False) -> bool:
        """`alone`: and nothing at all refers to it."""
        cluster = offset >> self._bits
        if not 0 < cluster < len(self._refs) or offset % (1 << self._bits):
            return False
        count = int(self._counts.count(np.array([cluster], dtype=np.int64))[0])
        return count > int(self._refs[cluster]) and not (alone and self._refs[cluster])


def _same_place(anatomy: Anatomy, index: int | None, slot: int) -> list[int]:
    out = []
    for layer in of(anatomy):
        if index is None:
            out.append(int(layer.l1[slot]) & q.OFFSET_MASK if slot < len(layer.l1) else 0)
        elif index < len(layer.l1) and (offset := int(layer.l1[index]) & q.OFFSET_MASK):
            out.append(int.from_bytes(anatomy.disk.read(offset + 8 * slot, 8).tobytes(), "big") & q.OFFSET_MASK)
    return [offset for offset in out if offset]


def _by_neighbours(words: U64, slot: int, cluster: int) -> list[int]:
    hosts: I64 = (words & _OFFSET).view(np.int64)
    before = [int(hosts[slot - d]) + d * cluster for d in (1, 2) if hosts[slot - d]]
    behind = [int(hosts[slot + d]) - d * cluster for d in (1, 2) if slot + d < len(hosts) and hosts[slot + d]]
    return before + behind
