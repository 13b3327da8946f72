"""The guest's view: the L2 entry of every guest cluster of the active layer.

Source: QEMU's docs/interop/qcow2.txt, section "Cluster mapping". VM state, which lies behind the guest's
disk, is not part of it. Where an L1 entry points to no place for a table (not aligned, or beyond the end of
the file), the entries are 0 and the slots -1.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from powercut.formats.qcow2 import layout as q
from powercut.formats.qcow2.entries import I64, U64
from powercut.formats.qcow2.header import Header
from powercut.formats.qcow2.spine import L1
from powercut.formats.qcow2.tables import Group


@dataclass(frozen=True)
class Others:
    """Other values of undecided slots, as parallel arrays, by guest cluster ascending."""

    guest: I64
    entry: U64
    bitmap: U64 | None
    slot: I64  # byte offset of the L2 entry


class Mapping:
    def __init__(self, header: Header, active: L1 | None, groups: list[Group]) -> None:
        self.header = header
        self._groups = groups
        per_table = header.l2_entries
        self._tables = -(-header.guest_clusters // per_table)
        # For each L2 table of the guest's disk: where it is, and in which group and row.
        self.table_offset = np.full(self._tables, -1, dtype=np.int64)
        self._rows: list[tuple[int, int, int]] = []
        if active is not None:
            self._place(active.entry[: self._tables])

    def _place(self, l1: U64) -> None:
        offsets = (l1 & q.OFFSET_MASK).view(np.int64)
        index = np.flatnonzero(offsets)
        for number, group in enumerate(self._groups):
            at = np.searchsorted(group.offsets, offsets[index])
            at[at == len(group.offsets)] = 0
            here = (group.offsets[at] == offsets[index]) & (offsets[index] % self.header.cluster_size == 0)
            for table, row in zip(index[here].tolist(), at[here].tolist(), strict=True):
                self._rows.append((table, number, row))
            self.table_offset[index[here]] = offsets[index[here]]

    @cached_property
    def entry(self) -> U64:
        """The L2 entry of each guest cluster; 0 where there is no L2 table."""
        return self._gather([group.entry for group in self._groups])

    @cached_property
    def bitmap(self) -> U64 | None:
        """With extended L2 entries, the subcluster bitmap of each guest cluster."""
        bitmaps = [group.bitmap for group in self._groups if group.bitmap is not None]
        return self._gather(bitmaps) if self.header.extended_l2 else None

    def _gather(self, words: list[U64]) -> U64:
        count = self.header.guest_clusters
        if self._tables == 1 and len(self._rows) == 1:
            _, number, row = self._rows[0]
            return words[number][row, :count]
        out = np.zeros((self._tables, self.header.l2_entries), dtype=np.uint64)
        for table, number, row in self._rows:
            out[table] = words[number][row]
        return out.reshape(-1)[:count]

    def slot(self, guest: I64) -> I64:
        """Byte offset of the L2 entry of each of these guest clusters; -1 where there is no table."""
        table, column = np.divmod(guest, self.header.l2_entries)
        offset = self.table_offset[table]
        return np.where(offset < 0, -1, offset + column * self.header.l2_entry_size)

    @cached_property
    def others(self) -> Others:
        guest, entry, bitmap, slot = [], [], [], []
        per_table = self.header.l2_entries
        rows = [set((g.alternates.slot // per_table).tolist()) if g.alternates else () for g in self._groups]
        for table, number, row in self._rows:
            alternates = self._groups[number].alternates
            if alternates is None or row not in rows[number]:
                continue
            here = alternates.slot // per_table == row
            clusters = table * per_table + alternates.slot[here] % per_table
            guest.append(clusters)
            entry.append(alternates.entry[here])
            if alternates.bitmap is not None:
                bitmap.append(alternates.bitmap[here])
            slot.append(self._groups[number].where(alternates.slot[here], self.header))
        if not guest:
            none, words = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.uint64)
            return Others(none, words, words if self.header.extended_l2 else None, none)
        joined = np.concatenate(guest)
        keep = np.flatnonzero(joined < self.header.guest_clusters)
        keep = keep[np.argsort(joined[keep], kind="stable")]
        bitmaps = np.concatenate(bitmap)[keep] if bitmap else None
        return Others(joined[keep], np.concatenate(entry)[keep], bitmaps, np.concatenate(slot)[keep])
