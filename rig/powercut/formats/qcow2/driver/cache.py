"""Tables of one kind (L2 tables, or refcount blocks) in memory, a few at a time.

All lie in one stretch of memory, as in QEMU before 2010: behind the end of one table comes the next in the cache,
whatever it is. A table that was changed is written before it leaves; what must be on disk before any of these tables
is written is the business of `before` (QEMU since 2011: qcow2-cache.c, qcow2_cache_set_dependency).

Used under the image's lock only.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from powercut.formats.qcow2.driver import host
from powercut.formats.qcow2.layout import SECTOR


class Cache:
    """`size`: bytes of a table. `through`: changes are written at once, as before 2011."""

    def __init__(self, size: int, slots: int, through: bool) -> None:
        self.size = size
        self.memory = bytearray(size * slots)
        self.before: Callable[[], Awaitable[None]] | None = None
        self._through = through
        self._at: list[int | None] = [None] * slots
        self._changed: list[tuple[int, int] | None] = [None] * slots  # bytes of the table, whole sectors
        self._used = [0] * slots
        self._clock = 0

    async def load(self, offset: int) -> int:
        """The place in `memory` of the table at `offset` of the file. It stays until the next `load` or `new`."""
        if offset in self._at:
            slot = self._at.index(offset)
            self._touch(slot)
        else:
            slot = await self._free_slot()
            self.memory[slot * self.size : (slot + 1) * self.size] = await host.read(offset, self.size)
            self._take(slot, offset)
        return slot * self.size

    async def new(self, offset: int, content: bytes) -> int:
        """A table at `offset` that is not on disk yet, all of it changed. Its place in `memory`."""
        self.forget(offset)
        slot = await self._free_slot()
        place = slot * self.size
        self.memory[place : place + self.size] = content
        if self._through:
            await host.write(offset, content)
        self._take(slot, offset)
        self._changed[slot] = None if self._through else (0, self.size)
        return place

    async def changed(self, place: int, first: int, last: int) -> None:
        """Bytes `first` to `last` of the table at `place` were changed."""
        slot = place // self.size
        if self._through:
            at = self._at[slot]
            assert at is not None
            await patch(at + first, bytes(self.memory[place + first : place + last]))
            return
        begin, end = first - first % SECTOR, last + -last % SECTOR
        was = self._changed[slot]
        self._changed[slot] = (begin, end) if was is None else (min(begin, was[0]), max(end, was[1]))

    @property
    def dirty(self) -> bool:
        return any(self._changed)

    async def write(self) -> None:
        """Write all that was changed."""
        if self.dirty and self.before is not None:
            await self.before()
        for slot in sorted(range(len(self._at)), key=lambda slot: self._at[slot] or 0):
            await self._write(slot)

    async def drop(self) -> None:
        """Forget everything, changed or not."""
        for offset in self._at:
            if offset is not None:
                self.forget(offset)

    def forget(self, offset: int) -> None:
        """The table at `offset` is no more: it is not written."""
        if offset in self._at:
            slot = self._at.index(offset)
            self._at[slot] = self._changed[slot] = None

    async def _write(self, slot: int) -> None:
        span, at = self._changed[slot], self._at[slot]
        if span is None or at is None:
            return
        first, last = span
        place = slot * self.size
        await host.write(at + first, bytes(self.memory[place + first : place + last]))
        self._changed[slot] = None

    async def _free_slot(self) -> int:
        slot = min(range(len(self._at)), key=lambda slot: (self._at[slot] is not None, self._used[slot]))
        if self._changed[slot] is not None:
            await self.write()
        self._at[slot] = None
        return slot

    def _take(self, slot: int, offset: int) -> None:
        self._at[slot] = offset
        self._touch(slot)

    def _touch(self, slot: int) -> None:
        self._clock += 1
        self._used[slot] = self._clock


async def patch(offset: int, data: bytes) -> None:
    """Change bytes of the file, whole sectors being read, changed and written."""
    begin, end = offset - offset % SECTOR, offset + len(data) + -(offset + len(data)) % SECTOR
    sectors = bytearray(await host.read(begin, end - begin))
    sectors[offset - begin : offset - begin + len(data)] = data
    await host.write(begin, bytes(sectors))
