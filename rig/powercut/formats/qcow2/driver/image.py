"""The guest's requests on an open image: read, write, zero, discard, flush; and the state of a machine, kept behind the
disk.

Source: block/qcow2.c, block/qcow2-cluster.c. An allocating write goes in three steps: clusters are found and counted
(under the lock), data is written with what a partial write leaves of the old content (not under the lock), the
clusters are put into the L2 table (under the lock). Another request for the same guest clusters waits meanwhile.
"""

from __future__ import annotations

import errno
import zlib
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Protocol

from powercut.formats.qcow2 import layout as q
from powercut.formats.qcow2.driver import host
from powercut.formats.qcow2.driver.host import Until
from powercut.formats.qcow2.driver.mapping import Mapping, Run, is_plain, offset_of
from powercut.formats.qcow2.driver.practice import Practice
from powercut.formats.qcow2.header import Header


class Backing(Protocol):
    """What lies below an image. Bytes beyond its end read as zeros."""

    def read(self, offset: int, length: int) -> bytes: ...


@dataclass(eq=False)
class Allocation:
    """Guest clusters `cluster` to `cluster + count - 1` are about to be at `offset` of the file."""

    cluster: int
    count: int
    offset: int
    done: bool = False


class Image(Mapping):
    """An open image, made by `open_image`. Offsets and lengths are bytes, whole sectors for
    writes. Methods are coroutines, for `powercut.formats.qcow2.driver.host.run`."""

    backing: Backing | None = None

    def __init__(self, practice: Practice, header: Header, l1: list[int], refcount_table: list[int]) -> None:
        super().__init__(practice, header, l1, refcount_table)
        self._allocating: list[Allocation] = []
        covered = self.cluster * self.l2_entries
        self.vmstate_start = -(-self.size // covered) * covered

    # ---- requests ----------------------------------------------------------------------------------------

    async def read(self, offset: int, length: int) -> bytes:
        parts = []
        async with self.request():
            while length:
                inner = offset % self.cluster
                async with self.lock:
                    run = await self.run(offset >> self.bits, -(-(inner + length) >> self.bits))
                size = min(length, (run.clusters << self.bits) - inner)
                parts.append(await self._read_run(run, offset, size))
                offset, length = offset + size, length - size
        return b"".join(parts)

    async def write(self, offset: int, data: bytes) -> None:
        async with self.request():
            view = memoryview(data)
            while view:
                done = await self._write_some(offset, view)
                offset, view = offset + done, view[done:]

    async def zero(self, offset: int, length: int) -> None:
        """Whole clusters are unmapped, in one way or another; the rest is written."""
        await self._unmap(offset, length, self._zero_entry(), write_edges=True)

    async def discard(self, offset: int, length: int) -> None:
        """Whole clusters are unmapped, and read as zeros. With version 2 that is not possible above a backing file."""
        entry = self._zero_entry()
        if entry is not None:
            await self._unmap(offset, length, entry, write_edges=False)

    async def flush_all(self) -> None:
        """What was done is there after a crash."""
        async with self.lock:
            await self.flush()

    async def write_vmstate(self, offset: int, data: bytes) -> None:
        """Write the state of a machine, `offset` counted from its beginning; snapshots take it with them."""
        await self.write(self.vmstate_start + offset, data)

    async def discard_vmstate(self, size: int) -> None:
        """Forget the state of a machine of `size` bytes: from now on only a snapshot has it."""
        await self._unmap(self.vmstate_start, -(-size >> self.bits) << self.bits, 0, write_edges=False)

    async def read_vmstate(self, offset: int, length: int) -> bytes:
        return await self.read(self.vmstate_start + offset, length)

    # ---- reading -----------------------------------------------------------------------------------------

    async def _read_run(self, run: Run, offset: int, length: int) -> bytes:
        """Bytes of the guest's disk, all in `run`."""
        inner = offset % self.cluster
        if run.entry & q.COMPRESSED:
            return (await self._decompressed(run.entry))[inner : inner + length]
        if is_plain(run.entry):
            return await host.read(offset_of(run.entry) + inner, length)
        if run.entry & q.ZERO or self.backing is None or offset >= self.size:
            return bytes(length)
        return self.backing.read(offset, length)

    async def _decompressed(self, entry: int) -> bytes:
        packed = await host.read(*self.extent(entry))
        return zlib.decompressobj(-12).decompress(packed, self.cluster)

    async def _old(self, offset: int, length: int) -> bytes:
        """What a part of a cluster holds, before it is written elsewhere."""
        if not length:
            return b""
        async with self.lock:
            run = await self.run(offset >> self.bits, 1)
        return await self._read_run(run, offset, length)

    # ---- writing -----------------------------------------------------------------------------------------

    @asynccontextmanager
    async def _undisturbed(self, cluster: int, count: int) -> AsyncIterator[None]:
        """The lock, once nothing is being allocated for these guest clusters."""
        while True:
            async with self.lock:
                others = [a for a in self._allocating if a.cluster < cluster + count and cluster < a.cluster + a.count]
                if not others:
                    yield
                    return
            other = others[0]
            await Until(lambda other=other: other.done)  # type: ignore[misc]

    async def _write_some(self, offset: int, data: memoryview) -> int:
        """Write what goes in one piece. Returns how much."""
        cluster, inner = divmod(offset, self.cluster)
        wanted = -(-(inner + len(data)) >> self.bits)
        async with self._undisturbed(cluster, wanted):
            l1_index, index = self.split(cluster)
            place = await self.own_table(l1_index)
            count = self.writable_run(place, index, wanted)
            target = offset_of(self.entry(place, index)) + inner
            if not count:
                allocation = await self._allocate(cluster, self.new_run(place, index, wanted))
        if count:
            size = min(len(data), (count << self.bits) - inner)
            await host.write(target, bytes(data[:size]))
            return size
        size = min(len(data), (allocation.count << self.bits) - inner)
        try:
            await self._write_new(allocation, offset, data[:size])
        finally:
            self._allocating.remove(allocation)
            allocation.done = True
        return size

    async def _allocate(self, cluster: int, count: int) -> Allocation:
        await self.will_allocate()
        allocation = Allocation(cluster, count, await self.refcounts.allocate(count << self.bits))
        if allocation.offset == 0:  # to data, that always meant that the allocation failed
            raise OSError(errno.EIO, "data was allocated at offset 0")
        self._allocating.append(allocation)
        return allocation

    async def _write_new(self, allocation: Allocation, offset: int, data: memoryview) -> None:
        """Write data to new clusters, around it what was there before, and put them into the L2 table."""
        begin, end = allocation.cluster << self.bits, (allocation.cluster + allocation.count) << self.bits
        stop = offset + len(data)
        try:
            head, tail = await self._old(begin, offset - begin), await self._old(stop, end - stop)
            if self.practice.has("l2-before-refcount"):
                await self._link(allocation)
                await self.tables.write()
            await host.write(allocation.offset, head + bytes(data) + tail)
        except OSError:
            async with self.lock:
                await self.refcounts.free(allocation.offset, allocation.count << self.bits)
            raise
        if not self.practice.has("l2-before-refcount"):
            await self._link(allocation)

    async def _link(self, allocation: Allocation) -> None:
        """Put new clusters into the L2 table, and give up what was there."""
        async with self.lock:
            l1_index, index = self.split(allocation.cluster)
            place = await self.own_table(l1_index)
            old = [self.entry(place, index + i) for i in range(allocation.count)]
            new = [allocation.offset + (i << self.bits) | q.COPIED for i in range(allocation.count)]
            await self.set_entries(place, index, new)
            await self._give_up(old, swapped=not self.practice.has("l2-free-unswapped"))

    async def _give_up(self, entries: Sequence[int], *, swapped: bool = True) -> None:
        """Give up the clusters that L2 entries pointed to. Not `swapped`: the entries are taken as they are on disk."""
        for entry in entries:
            offset, length = self.extent(entry)
            if length and not swapped:
                offset = int.from_bytes(entry.to_bytes(8, "big"), "little") & ~q.COPIED
            if length:
                await self.free_later(offset, length)

    # ---- unmapping ---------------------------------------------------------------------------------------

    def _zero_entry(self) -> int | None:
        """The L2 entry of a cluster that reads as zeros, if there is one."""
        if self.backing is None:
            return 0
        return q.ZERO if self.header.version >= 3 else None

    async def _unmap(self, offset: int, length: int, entry: int | None, *, write_edges: bool) -> None:
        stop = offset + length
        begin = -(-offset // self.cluster) * self.cluster
        end = stop if stop == self.size else stop - stop % self.cluster
        if entry is None or begin >= end:
            if write_edges:
                await self.write(offset, bytes(length))
            return
        if write_edges and offset < begin:
            await self.write(offset, bytes(begin - offset))
        async with self.request():
            for cluster in range(begin >> self.bits, -(-end >> self.bits)):
                await self._unmap_one(cluster, entry)
        if write_edges and end < stop:
            await self.write(end, bytes(stop - end))

    async def _unmap_one(self, cluster: int, entry: int) -> None:
        async with self._undisturbed(cluster, 1):
            old = (await self.run(cluster, 1)).entry
            if old == entry or (not old and not entry):
                return
            l1_index, index = self.split(cluster)
            place = await self.own_table(l1_index)
            if self.practice.has("discard-keeps-mapping") and offset_of(old):
                await self.refcounts.free(offset_of(old), self.cluster)
                await self.refcounts.write()
                await self.barrier()
                await self.set_entries(place, index, [entry])
                return
            await self.will_allocate()
            await self.set_entries(place, index, [entry])
            await self._give_up([old])
