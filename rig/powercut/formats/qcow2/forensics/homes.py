"""Where the L2 table at offset 0 belongs.

An L1 entry with the copied flag and offset 0 says it. Taking a snapshot clears that flag, and the entry is 0 like
any that points nowhere: then a snapshot with VM state and no table for it tells, or a table of another layer that
shares clusters with this one.
"""

from __future__ import annotations

import numpy as np

from powercut.formats.qcow2 import layout as q
from powercut.formats.qcow2.entries import U64
from powercut.formats.qcow2.forensics.anatomy import Anatomy
from powercut.formats.qcow2.forensics.layers import of

_OFFSET = np.uint64(q.OFFSET_MASK)


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
