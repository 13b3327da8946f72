"""An open image: its header, its L1 table, its caches; what must be on disk before what; clusters given up later.

The rules that no crash may break, and how they are kept:

    a refcount is on disk before whatever refers to the cluster      `tables.before`, and barriers at each table
    a guest's data is on disk before the L2 entry that points to it  the same barrier
    an L2 table is on disk before the L1 entry that points to it     `Mapping.own_table`
    a cluster is given up only when nothing on disk refers to it     `free_later`, `flush`
    copied flags and refcounts agree                                 the dirty bit, while snapshots change (version 3)

With lazy refcounts the first rule is replaced by the dirty bit: refcounts are rebuilt at the next open.
"""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import NamedTuple

from powercut.formats.qcow2 import layout as q
from powercut.formats.qcow2.driver import host
from powercut.formats.qcow2.driver.cache import Cache, patch
from powercut.formats.qcow2.driver.practice import Practice
from powercut.formats.qcow2.driver.refcounts import Refcounts
from powercut.formats.qcow2.header import Header

_SLOTS = 16
_L1_SIZE_FIELD, _INCOMPATIBLE_FIELD = 36, 72  # of the header: l1_size, then l1_table_offset
ROW = q.SECTOR // 8  # L1 entries that are written together


@dataclass(frozen=True, slots=True)
class Snapshot:
    l1_offset: int
    l1_size: int
    id: str
    name: str
    vm_state_size: int
    disk_size: int


@dataclass(frozen=True, slots=True)
class SnapshotTable:
    offset: int
    length: int
    snapshots: list[Snapshot]


class Given(NamedTuple):
    """Clusters that are given up, and the number that the next request had at that time."""

    offset: int
    length: int
    request: int


class Core:
    """See the module. `l1` are the entries of the active L1 table. Raises OSError where the file does."""

    def __init__(self, practice: Practice, header: Header, l1: list[int], refcount_table: list[int]) -> None:
        self.practice = practice
        self.header = header
        self.bits = header.cluster_bits
        self.cluster = 1 << self.bits
        self.l2_entries = self.cluster // 8
        self.size = header.size
        self.lazy = bool(header.compatible & q.COMPATIBLE_LAZY_REFCOUNTS)
        self.dirty = header.dirty
        self.l1_offset = header.l1_table_offset
        self.l1 = l1
        self.lock = host.Lock()
        width = header.refcount_bits // 8
        self.refcounts = Refcounts(practice, self.bits, width, header.refcount_table_offset, refcount_table)
        self.tables = Cache(self.cluster, _SLOTS, practice.through)
        self.refcounts.gone = self.tables.forget
        self.tables.before = self._before_tables
        self.snapshot_table: SnapshotTable | None = None
        self._given: list[Given] = []
        self._requests = 0
        self._running: set[int] = set()

    # ---- order -------------------------------------------------------------------------------------------

    async def barrier(self) -> None:
        if not self.practice.through:
            await host.flush()

    async def _before_tables(self) -> None:
        if self.practice.has("l2-before-refcount"):
            return
        if not self.lazy:
            await self.refcounts.write()
        if not self.practice.has("no-flush-before-l2"):
            await self.barrier()

    async def flush(self) -> None:
        """Everything that was done is on disk; then clusters that were given up are free."""
        await self.tables.write()
        if not self.lazy:
            await self.refcounts.write()
        await self.barrier()
        oldest = min(self._running, default=self._requests)
        free = [given for given in self._given if given.request <= oldest]
        self._given = [given for given in self._given if given.request > oldest]
        for given in free:
            await self.refcounts.free(given.offset, given.length)

    async def free_later(self, offset: int, length: int) -> None:
        """Give up clusters as soon as nothing on disk refers to them, and no request uses them."""
        if self.practice.through or self.practice.has("l2-before-refcount"):
            await self.refcounts.free(offset, length)
        else:
            self._given.append(Given(offset, length, self._requests))

    @asynccontextmanager
    async def request(self) -> AsyncIterator[None]:
        """While a request runs, what it may use is not given to others."""
        number, self._requests = self._requests, self._requests + 1
        self._running.add(number)
        try:
            yield
        finally:
            self._running.remove(number)

    # ---- header ------------------------------------------------------------------------------------------

    async def patch_header(self, offset: int, data: bytes) -> None:
        """Change bytes of the header: of one sector, so at once."""
        await self.barrier()
        await patch(offset, data)
        await self.barrier()

    async def set_dirty(self, dirty: bool) -> None:
        """From here on refcounts and copied flags on disk may be wrong; or they are right again."""
        if self.header.version < 3 or self.dirty == dirty:
            return
        bits = self.header.incompatible & ~q.INCOMPATIBLE_DIRTY | (q.INCOMPATIBLE_DIRTY if dirty else 0)
        await self.patch_header(_INCOMPATIBLE_FIELD, bits.to_bytes(8, "big"))
        self.dirty = dirty

    async def will_allocate(self) -> None:
        """Called before refcounts change that are not written in order."""
        if self.lazy and not self.practice.has("lazy-refcounts-no-dirty-bit"):
            await self.set_dirty(True)

    @asynccontextmanager
    async def rebuilding(self) -> AsyncIterator[None]:
        """Refcounts and copied flags change all over the image, which stays dirty if that fails. With version 2 nothing
        can say so."""
        await self.flush()
        await self.set_dirty(True)
        yield
        await self.flush()
        if not self.lazy:
            await self.refcounts.write()
            await self.set_dirty(False)

    # ---- L1 ----------------------------------------------------------------------------------------------

    async def write_l1(self, index: int) -> None:
        """Write the sector of the active L1 table that holds entry `index`."""
        first = index - index % ROW
        row = self.l1[first : first + ROW]
        await host.write(self.l1_offset + 8 * first, pack(row + [0] * (ROW - len(row))))

    async def write_whole_l1(self) -> None:
        await host.write(self.l1_offset, pack(self.l1 + [0] * (-len(self.l1) % ROW)))

    async def grow_l1(self, entries: int) -> None:
        """Make room for as many L1 entries, in another place."""
        count = len(self.l1)
        while count < entries:
            count = (count * 3 + 1) // 2
        await self.will_allocate()
        length = count * 8
        offset = await self.refcounts.allocate(length)
        grown = self.l1 + [0] * (count - len(self.l1))
        await host.write(offset, pack(grown + [0] * (-count % ROW)))
        await self.refcounts.write()
        await self.patch_header(_L1_SIZE_FIELD, count.to_bytes(4, "big") + offset.to_bytes(8, "big"))
        old, old_length = self.l1_offset, max(1, len(self.l1)) * 8
        self.l1, self.l1_offset = grown, offset
        await self.refcounts.free(old, old_length)

    # ---- closing -----------------------------------------------------------------------------------------

    async def close(self) -> None:
        """Write what waits in the caches. The image is then as if it had never been open."""
        async with self.lock:
            if self.practice.has("close-drops-cache"):
                return
            await self.flush()
            await self.refcounts.write()
            await self.barrier()
            await self.set_dirty(False)


def pack(entries: list[int]) -> bytes:
    return struct.pack(f">{len(entries)}Q", *entries)


def unpack(data: bytes) -> list[int]:
    return list(struct.unpack(f">{len(data) // 8}Q", data))
