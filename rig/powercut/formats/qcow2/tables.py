"""L2 tables as sets: every slot with every value it may hold.

`Disk.variants` shows all contents of a table and decides none. What comes out is one value for each slot,
and a list of alternates: pairs of a slot and another value it may have. On a decided disk there are none.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from powercut.disk import Bytes, Disk, Span, Variants, gather
from powercut.formats.qcow2 import layout as q
from powercut.formats.qcow2.entries import I64, U64
from powercut.formats.qcow2.header import Header

GROUP_SLOTS = 1 << 18  # temporaries stay within a few times this many words


@dataclass(slots=True)
class Alternates:
    """Other values of slots. Pairs are distinct, and differ from the first value of their slot."""

    slot: I64  # index into the flattened entries of the group
    entry: U64
    bitmap: U64 | None


@dataclass(slots=True)
class Group:
    """Some L2 tables, by rows."""

    offsets: I64  # where each table starts
    weight: I64  # how many L1 entries, of all L1 tables, refer to each
    active: I64  # how many of these are in the active L1 table
    entry: U64  # (tables, slots): one content
    bitmap: U64 | None  # the second word of extended L2 entries
    alternates: Alternates | None

    def where(self, slot: I64, header: Header) -> I64:
        """Byte offsets of slots."""
        row, column = np.divmod(slot, header.l2_entries)
        where: I64 = self.offsets[row] + column * header.l2_entry_size
        return where


def read_groups(disk: Disk, header: Header, offsets: I64, weight: I64, active: I64) -> list[Group]:
    step = max(1, GROUP_SLOTS // header.l2_entries)
    return [
        _read_group(disk, header, offsets[at : at + step], weight[at : at + step], active[at : at + step])
        for at in range(0, len(offsets), step)
    ]


def _read_group(disk: Disk, header: Header, offsets: I64, weight: I64, active: I64) -> Group:
    first, undecided = gather(disk, offsets, header.cluster_size)
    words = first.view(q.BE64).astype(np.uint64)
    if header.extended_l2:
        entry, bitmap = np.ascontiguousarray(words[:, ::2]), np.ascontiguousarray(words[:, 1::2])
    else:
        entry, bitmap = words, None
    alternates = _alternates(header, words, undecided) if undecided else None
    return Group(offsets, weight, active, entry, bitmap, alternates)


def _alternates(header: Header, words: U64, undecided: list[tuple[int, Variants]]) -> Alternates | None:
    per_slot = header.l2_entry_size // 8
    slots: list[I64] = []
    values: list[U64] = []
    several = False  # more than one other content somewhere: the same pair may come twice
    for row, variants in undecided:
        for start, others in aligned(variants, header.l2_entry_size):
            several |= len(others) > 1
            first = row * header.l2_entries + start // header.l2_entry_size
            run = np.arange(first, first + others.shape[1] // header.l2_entry_size)
            for other in others:
                slots.append(run)
                values.append(other.view(q.BE64).astype(np.uint64))
    slot = np.concatenate(slots)
    value = np.concatenate(values).reshape(-1, per_slot)
    differs = (value != words.reshape(-1, per_slot)[slot]).any(axis=1)
    if not differs.any():
        return None
    slot, value = slot[differs], value[differs]
    if several:
        rows = np.unique(np.column_stack([slot.view(np.uint64), value]), axis=0)
        slot, value = rows[:, 0].copy().view(np.int64), rows[:, 1:]
    bitmap = np.ascontiguousarray(value[:, 1]) if per_slot == 2 else None
    return Alternates(slot, np.ascontiguousarray(value[:, 0]), bitmap)


def aligned(variants: Variants, unit: int) -> list[tuple[int, Bytes]]:
    """The spans as pairs (start, other contents), cut so that each starts and ends between units.

    A crash disk cuts at sectors, and then this changes nothing. Where spans end inside a unit, that unit is
    taken by itself, with every combination of what the spans that touch it may put there.
    """
    out: list[tuple[int, Bytes]] = []
    shared: dict[int, list[Span]] = {}
    for span in variants.spans:
        start, stop = -(-span.start // unit) * unit, span.stop // unit * unit
        if start < stop:
            out.append((start, np.ascontiguousarray(span.others[:, start - span.start : stop - span.start])))
        if span.start % unit:
            shared.setdefault(span.start - span.start % unit, []).append(span)
        if span.stop % unit and (span.stop - span.stop % unit > span.start or not span.start % unit):
            shared.setdefault(span.stop - span.stop % unit, []).append(span)
    for at, spans in shared.items():
        out.append((at, _combinations(variants.first, at, unit, spans)))
    return out


def _combinations(first: Bytes, at: int, unit: int, spans: list[Span]) -> Bytes:
    base = first[at : at + unit]
    choices = []
    for span in spans:
        lo, hi = max(span.start, at), min(span.stop, at + unit)
        parts = {base[lo - at : hi - at].tobytes()}
        parts |= {other[lo - span.start : hi - span.start].tobytes() for other in span.others}
        choices.append([(lo - at, part) for part in sorted(parts)])
    rows = []
    for combination in itertools.product(*choices):
        row = bytearray(base.tobytes())
        for position, part in combination:
            row[position : position + len(part)] = part
        rows.append(np.frombuffer(bytes(row), dtype=np.uint8))
    return np.stack(rows)
