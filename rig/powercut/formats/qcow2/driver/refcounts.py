"""Refcounts: reading and changing them, finding free clusters, and room for more refcounts.

Sources: QEMU's docs/interop/qcow2.txt, "Host cluster management"; block/qcow2-refcount.c (update_refcount,
alloc_clusters_noref, alloc_refcount_block) for how it is done, with two differences: a cluster is never given up
before it is certain that nothing on disk refers to it (`Core.free_later`), and a table that is replaced is not given
up if it is uncertain whether its successor is in place.

A new block describes itself where it can. It is on disk before the refcount table points to it, and what counts it
is on disk as well.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable

from powercut.formats.qcow2 import layout as q
from powercut.formats.qcow2.driver import host
from powercut.formats.qcow2.driver.cache import Cache, patch
from powercut.formats.qcow2.driver.practice import Practice

_SLOTS = 4
_TABLE_FIELD = 48  # of the header: refcount_table_offset, then refcount_table_clusters
UNINITIALISED = b"\xa5" * q.SECTOR  # stands for what a process happens to have in memory


class Refcounts:
    """`bits`: of a cluster's size. `width`: bytes of a refcount. `gone` is called with the offset of each cluster that
    became free. Used under the image's lock only."""

    def __init__(self, practice: Practice, bits: int, width: int, offset: int, table: list[int]) -> None:
        self.cache = Cache(1 << bits, _SLOTS, practice.through)
        self.offset, self.table = offset, table
        self.gone: Callable[[int], None] = lambda offset: None
        self._practice, self._bits, self._width = practice, bits, width
        self.per_block = (1 << bits) // width
        self._next = 0  # where the search for free clusters goes on

    async def get(self, cluster: int) -> int:
        index, inner = divmod(cluster, self.per_block)
        if index >= len(self.table) or not self.table[index]:
            return 0
        return self._value(await self.cache.load(self.table[index]), inner)

    async def add(self, offset: int, length: int, addend: int) -> None:
        """Add to the refcounts of all clusters in a range. Raises OSError, all refcounts being as before."""
        first, last = offset >> self._bits, (offset + length - 1) >> self._bits
        for cluster in range(first, last + 1):
            try:
                await self._add_one(cluster, addend)
            except OSError:
                await self._undo(first, cluster, -addend)
                raise

    async def allocate(self, length: int) -> int:
        """Find free clusters in a row and count them as used. Raises OSError."""
        count = -(-length >> self._bits)
        try:
            offset = await self._find(count) << self._bits
            await self.add(offset, count << self._bits, 1)
        except OSError:
            if self._practice.has("alloc-zero-unchecked"):
                return 0
            raise
        if offset == 0 and not self._practice.through and not self._practice.has("alloc-zero-unchecked"):
            raise OSError(errno.EIO, "cluster 0 is counted as free")
        return offset

    async def free(self, offset: int, length: int) -> None:
        """Count clusters as used once less. What cannot be freed leaks."""
        with contextlib.suppress(OSError):
            await self.add(offset, length, -1)

    async def write(self) -> None:
        """Write all refcounts that were changed."""
        await self.cache.write()

    def rewind(self, cluster: int) -> None:
        """Search for free clusters from `cluster` on."""
        self._next = cluster

    def _value(self, place: int, inner: int) -> int:
        at = place + inner * self._width
        return int.from_bytes(self.cache.memory[at : at + self._width], "big")

    async def _add_one(self, cluster: int, addend: int) -> None:
        index, inner = divmod(cluster, self.per_block)
        if self._practice.has("l2-free-unswapped"):
            index &= 0xFFFF_FFFF  # the index was an int
        if addend < 0 and (index >= len(self.table) or not self.table[index]):
            raise OSError(errno.EINVAL, f"cluster {cluster} has no refcount")
        place = await self._block(index)
        value = self._value(place, inner) + addend
        if not 0 <= value < 1 << 8 * self._width:
            raise OSError(errno.EINVAL, f"cluster {cluster} cannot have refcount {value}")
        at = inner * self._width
        self.cache.memory[place + at : place + at + self._width] = value.to_bytes(self._width, "big")
        if value == 0:
            self._next = min(self._next, cluster)
            self.gone(cluster << self._bits)
        await self.cache.changed(place, at, at + self._width)

    async def _undo(self, first: int, stop: int, addend: int) -> None:
        """Take back what was done to clusters `first` to `stop - 1`."""
        if self._practice.has("refcount-rollback") and (first == stop or stop % self.per_block == 0):
            # Nothing was changed in this block: the first and last changed index, -1, were taken for a sector's.
            with contextlib.suppress(OSError):
                place = await self.cache.load(next(offset for offset in reversed(self.table) if offset))
                self.cache.memory[place : place + q.SECTOR] = UNINITIALISED
                await self.cache.changed(place, 0, q.SECTOR)
            return
        for cluster in range(first, stop):
            with contextlib.suppress(OSError):
                await self._add_one(cluster, addend)

    async def _find(self, count: int) -> int:
        """The first of `count` free clusters in a row."""
        found = 0
        while found < count:
            self._next += 1
            found = 0 if await self.get(self._next - 1) else found + 1
        return self._next - count

    async def _block(self, index: int) -> int:
        """The place in memory of refcount block number `index`, which is made if need be."""
        while index >= len(self.table):
            await self._grow(index)
        if self.table[index]:
            return await self.cache.load(self.table[index])
        return await self._new_block(index)

    async def _new_block(self, index: int) -> int:
        cluster = await self._find(1)
        offset, content = cluster << self._bits, bytearray(1 << self._bits)
        described_by, inner = divmod(cluster, self.per_block)
        if described_by == index:
            content[(inner + 1) * self._width - 1] = 1
        else:
            await self.add(offset, 1, 1)
            await self.cache.write()
        await host.write(offset, bytes(content))
        await self._barrier()
        await patch(self.offset + 8 * index, offset.to_bytes(8, "big"))
        await self._barrier()
        self.table[index] = offset
        if described_by != index and self._practice.has("refblock-self-overlap"):
            return await self.cache.load(self.table[described_by])  # the last one in use, and not the new one
        return await self.cache.load(offset)

    async def _grow(self, index: int) -> None:
        """Put a larger refcount table, and the blocks that count it and themselves, behind all that can be in use."""
        start = max(len(self.table) * self.per_block, self._next)
        first = start // self.per_block
        entries, blocks = max(index + 1, len(self.table) * 3 // 2), 1
        while True:
            clusters = -(-entries * 8 >> self._bits)
            last = (start + blocks + clusters - 1) // self.per_block
            if blocks == last - first + 1 and clusters << self._bits >= (last + 1) * 8:
                break
            blocks, entries = last - first + 1, max(entries, last + 1)
        table = self.table + [0] * ((clusters << self._bits) // 8 - len(self.table))
        for number in range(blocks):
            table[first + number] = (start + number) << self._bits
            content = bytearray(1 << self._bits)
            for cluster in range(start, start + blocks + clusters):
                described_by, inner = divmod(cluster, self.per_block)
                if described_by == first + number:
                    content[(inner + 1) * self._width - 1] = 1
            await host.write(table[first + number], bytes(content))
        offset = (start + blocks) << self._bits
        await host.write(offset, b"".join(entry.to_bytes(8, "big") for entry in table))
        await self._barrier()
        await patch(_TABLE_FIELD, offset.to_bytes(8, "big") + clusters.to_bytes(4, "big"))
        await self._barrier()
        old, length = self.offset, len(self.table) * 8
        self.offset, self.table = offset, table
        await self.free(old, length)

    async def _barrier(self) -> None:
        if not self._practice.through:
            await host.flush()
