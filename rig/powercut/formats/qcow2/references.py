"""References from L2 entries to clusters, counted over sets of contents.

An undecided slot refers, in one state, to the clusters of one of its values. The upper bound takes each of
its clusters once; distinct pairs (slot, cluster) make it so. A table that several L1 entries refer to counts
as often.

Most tables hold nothing but plain entries inside the file (`entries.plain_clusters`); what does not is taken
apart by `entries.examine`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from powercut.formats.qcow2.entries import DEFECTS, I64, U64, UNCOUNTED, Bools, Examined, examine, plain_clusters
from powercut.formats.qcow2.findings import Findings, Ranges
from powercut.formats.qcow2.header import Header
from powercut.formats.qcow2.tables import Group

_NONE = np.zeros(0, dtype=np.int64)


@dataclass(slots=True)
class Part:
    """One group of L2 tables, and where its entries point."""

    group: Group
    plain: I64 | None  # cluster of each entry, 0 for unallocated ones, when all entries are plain
    examined: Examined | None  # otherwise
    other: Examined | None  # the alternates
    undecided: I64  # slots that have alternates, ascending
    slot: I64  # distinct pairs (undecided slot, cluster) ...
    cluster: I64
    extra: Bools  # ... and which of them the first content does not have

    @property
    def top(self) -> int:
        """The last cluster that may be referred to."""
        tops = [int(self.cluster.max())] if len(self.cluster) else [0]
        if self.plain is not None:
            tops.append(int(self.plain.max()))
        elif self.examined is not None and self.examined.refers.any():
            tops.append(int(self.examined.last[self.examined.refers].max()))
        return max(tops)


def examine_group(group: Group, header: Header, length: int) -> Part:
    plain = plain_clusters(group.entry, group.bitmap, header, length)
    bitmap = None if group.bitmap is None else group.bitmap.reshape(-1)
    flat = group.entry.reshape(-1)
    examined = None if plain is not None else examine(flat, bitmap, header, length)
    alternates = group.alternates
    if alternates is None:
        return Part(group, plain, examined, None, _NONE, _NONE, _NONE, np.zeros(0, dtype=np.bool_))
    other = examine(alternates.entry, alternates.bitmap, header, length)
    undecided = np.unique(alternates.slot)
    at_first = examine(flat[undecided], None if bitmap is None else bitmap[undecided], header, length)
    stride = -(-length // header.cluster_size) + 1  # an unaligned entry may reach one cluster further
    first_pairs = _pairs(at_first, undecided, stride)
    both = np.concatenate([first_pairs, _pairs(other, alternates.slot, stride)])
    pairs, earliest = np.unique(both, return_index=True)
    extra = earliest >= len(first_pairs)
    return Part(group, plain, examined, other, undecided, pairs // stride, pairs % stride, extra)


def _pairs(examined: Examined, slot: I64, stride: int) -> I64:
    parts = [slot[index] * stride + cluster for index, cluster in examined.references()]
    return np.concatenate(parts) if parts else _NONE


def count(part: Part, size: int) -> I64:
    """How often the first content of the group refers to clusters 0..size-1."""
    if (part.group.weight == 1).all():
        return _count(part, size, slice(None))
    total = np.zeros(size, dtype=np.int64)
    for weight in np.unique(part.group.weight).tolist():
        total += _count(part, size, part.group.weight == weight) * weight
    return total


def _count(part: Part, size: int, rows: slice | Bools) -> I64:
    """The same, for some rows and without weights."""
    shape = part.group.entry.shape
    if part.plain is not None:
        out = np.bincount(part.plain[rows].reshape(-1), minlength=size)
        out[0] = 0  # unallocated entries: an aligned offset that is not 0 never lies in cluster 0
        return out
    out = np.zeros(size, dtype=np.int64)
    assert part.examined is not None
    chosen = np.zeros(shape, dtype=np.bool_)
    chosen[rows] = True
    flat = chosen.reshape(-1)
    for index, cluster in part.examined.references():
        out += np.bincount(cluster[flat[index]], minlength=size)
    return out


def count_extra(part: Part, size: int) -> I64:
    """References that only other contents have."""
    weight = part.group.weight[part.slot[part.extra] // part.group.entry.shape[1]]
    return np.bincount(part.cluster[part.extra], weight, minlength=size).astype(np.int64)


def slot_range(part: Part, slot: int, header: Header) -> tuple[int, int]:
    return int(part.group.where(np.array([slot]), header)[0]), header.l2_entry_size


def undecided_ranges(part: Part, slot: int, header: Header) -> Ranges:
    at = int(np.searchsorted(part.undecided, slot))
    found = at < len(part.undecided) and int(part.undecided[at]) == slot
    return (slot_range(part, slot, header),) if found else ()


def report_defects(part: Part, header: Header, found: Findings) -> None:
    """Defects of single entries, of every value they may have."""
    if part.examined is not None:
        _report(part, part.examined, np.arange(part.group.entry.size), part.group.entry.reshape(-1), header, found)
    if part.other is not None and part.group.alternates is not None:
        _report(part, part.other, part.group.alternates.slot, part.group.alternates.entry, header, found)


def _report(part: Part, examined: Examined, slots: I64, entry: U64, header: Header, found: Findings) -> None:
    for name, mask in examined.defects:
        which = np.flatnonzero(mask)
        slot = slots[which]
        if name not in UNCOUNTED:
            found.corruptions += int(part.group.weight[slot // part.group.entry.shape[1]].sum())
        found.corrupt_many(
            name,
            part.group.where(slot, header).tolist(),
            lambda i, name=name, which=which: f"L2 entry {int(entry[which[i]]):#x}: {DEFECTS[name]}",  # type: ignore[misc]
            lambda i, slot=slot: undecided_ranges(part, int(slot[i]), header),  # type: ignore[misc]
        )
