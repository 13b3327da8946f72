"""From guest clusters to L2 entries: finding a table, making one, copying one that a snapshot shares.

Source: block/qcow2-cluster.c (get_cluster_table, l2_allocate, count_contiguous_clusters and its neighbours).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from powercut.formats.qcow2 import layout as q
from powercut.formats.qcow2.driver.core import Core
from powercut.formats.qcow2.entries import compressed_extent


def offset_of(entry: int) -> int:
    return entry & q.OFFSET_MASK


def is_plain(entry: int) -> bool:
    """Whether an L2 entry points to a whole cluster of data."""
    return offset_of(entry) != 0 and not entry & (q.COMPRESSED | q.ZERO)


def writable(entry: int) -> bool:
    """Whether data may be written where the entry points to."""
    return is_plain(entry) and bool(entry & q.COPIED)


@dataclass(frozen=True, slots=True)
class Run:
    """Guest clusters in a row, all unallocated (`entry` 0), all zeros, all compressed, or one after the other in the
    file; `entry` is the first's."""

    entry: int
    clusters: int


class Mapping(Core):
    """The part of the driver that knows L2 tables. Under the image's lock only."""

    def split(self, cluster: int) -> tuple[int, int]:
        """L1 index and L2 index of a guest cluster."""
        return divmod(cluster, self.l2_entries)

    async def table(self, l1_index: int) -> int | None:
        """Where in memory the L2 table is, for reading; None if there is none."""
        if l1_index >= len(self.l1) or not self.l1[l1_index]:
            return None
        return await self.tables.load(offset_of(self.l1[l1_index]))

    async def own_table(self, l1_index: int) -> int:
        """Where in memory the L2 table is, for writing: it is not shared with a snapshot."""
        if l1_index >= len(self.l1):
            await self.grow_l1(l1_index + 1)
        old = self.l1[l1_index]
        if old & q.COPIED:
            return await self.tables.load(offset_of(old))
        await self.will_allocate()
        early = self.practice.through or self.practice.has("l2-cow-order")
        if old and early:
            await self.refcounts.free(offset_of(old), self.cluster)
        new = await self.refcounts.allocate(self.cluster)
        self.l1[l1_index] = new | q.COPIED
        try:
            if self.practice.through:
                await self.write_l1(l1_index)
            content = bytes(self.cluster)
            if old:
                place = await self.tables.load(offset_of(old))
                content = bytes(self.tables.memory[place : place + self.cluster])
            place = await self.tables.new(new, content)
            if not self.practice.through:
                await self.tables.write()
                await self.barrier()
                await self.write_l1(l1_index)
        except OSError:
            self.l1[l1_index] = old  # the new table leaks: on disk it may be in use
            raise
        if old and not early:
            await self.free_later(offset_of(old), self.cluster)
        return place

    def entry(self, place: int, index: int) -> int:
        """Entry `index` of the table at `place` in memory. Behind its end lies what comes next in memory, if anything
        does."""
        at = place + 8 * index
        return int.from_bytes(self.tables.memory[at : at + 8], "big")

    async def entries(self, offset: int) -> list[tuple[int, int]]:
        """Index and value of the entries that are not 0 in the L2 table at `offset` of the file."""
        place = await self.tables.load(offset)
        words = np.frombuffer(bytes(self.tables.memory[place : place + self.cluster]), q.BE64)
        return [(int(index), int(words[index])) for index in np.flatnonzero(words)]

    def extent(self, entry: int) -> tuple[int, int]:
        """Offset and length of what an L2 entry refers to in the file; the length is 0 if that is nothing."""
        if entry & q.COMPRESSED:
            at, length = compressed_extent(np.array([entry], dtype=np.uint64), self.header)
            return int(at[0]), int(length[0])
        return offset_of(entry), self.cluster if offset_of(entry) else 0

    async def set_entries(self, place: int, index: int, entries: list[int]) -> None:
        at = 8 * index
        data = b"".join(entry.to_bytes(8, "big") for entry in entries)
        self.tables.memory[place + at : place + at + len(data)] = data
        await self.tables.changed(place, at, at + len(data))

    async def run(self, cluster: int, most: int) -> Run:
        """What guest cluster `cluster` is, and how many of the `most` from there on go with it."""
        l1_index, index = self.split(cluster)
        inside = min(most, self.l2_entries - index)
        place = await self.table(l1_index)
        if place is None:
            return Run(0, inside)
        if self.practice.has("l2-scan-past-end"):
            inside = most
        first = self.entry(place, index)
        if first & q.COMPRESSED:
            return Run(first, 1)
        count = 1
        while count < inside and self._goes_on(first, self.entry(place, index + count), count):
            count += 1
        return Run(first, count)

    def _goes_on(self, first: int, entry: int, distance: int) -> bool:
        if is_plain(first):
            return is_plain(entry) and offset_of(entry) == offset_of(first) + distance * self.cluster
        if first & q.ZERO:
            return bool(entry & q.ZERO) and not entry & q.COMPRESSED
        return not entry

    def writable_run(self, place: int, index: int, most: int) -> int:
        """How many clusters from `index` on can be written where they are, in one piece."""
        first, count = self.entry(place, index), 0
        while count < most and index + count < self.l2_entries:
            entry = self.entry(place, index + count)
            if not writable(entry):
                break
            if offset_of(entry) != offset_of(first) + count * self.cluster:
                if not self.practice.has("contiguous-chunks"):
                    break
                first = entry - count * self.cluster  # a chunk ends, the next begins, and the sum is believed
            count += 1
        return count

    def new_run(self, place: int, index: int, most: int) -> int:
        """How many clusters from `index` on cannot be written where they are."""
        count = 0
        while count < most and index + count < self.l2_entries:
            if writable(self.entry(place, index + count)):
                break
            count += 1
        return count
