"""A crash inside a recovery: what a checker wrote, over the crash state that it found.

A checker that writes (a repair, an open that heals) is recorded like any program. A crash inside it leaves each atom
with what it had, or with something the recovery wrote there, by the same fault model one level down. What the
recovery did not touch is the state it started from, which goes on being decided as it is read.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from powercut.crash.contents import Choice, Contents
from powercut.crash.disk import Deciding
from powercut.crash.search import Search
from powercut.crash.survival import OF_WRITES, Survival
from powercut.disk import Bytes, Variants
from powercut.trace import SECTOR

Patch = tuple[int, bytes]  # byte offset, content


def lay_over(
    content: Bytes,
    first: int,
    last: int,
    written: Contents,
    search: Search,
    number: int,
    survival: Survival | None = None,
) -> None:
    """Put what `written` records over `content`, the atoms first..last-1 as they are below (one row each). What is in
    flight is decided by `search`, on the disk called `number`, or by `survival`."""
    inside = slice(first, min(last, len(written.writer) // written.per_atom))
    writer = written.writer.reshape(-1, written.per_atom)[inside]
    rows = written.rows.reshape(-1, written.per_atom)[inside]
    if writer.any():
        here = np.flatnonzero(writer.any(axis=1))
        lasting = written.take(rows[here].reshape(-1)).reshape(len(here), -1, SECTOR)
        own = content.reshape(len(content), -1, SECTOR)[here]
        content[here] = np.where((writer[here] > 0)[:, :, None], lasting, own).reshape(len(here), -1)
    flight = written.in_flight_atoms()
    low, high = np.searchsorted(flight.atom, (first, last))
    if low == high:
        return
    others = written.take(flight.rows[low:high].reshape(-1)).reshape(high - low, -1)
    differ = (others != content[flight.atom[low:high] - first]).any(axis=1)
    entries: dict[int, list[int]] = {}
    for entry in np.flatnonzero(differ).tolist():
        entries.setdefault(int(flight.atom[low + entry]), []).append(entry)
    for atom, mine in entries.items():
        distinct = {content[atom - first].tobytes(): int(written.writer[atom * written.per_atom]) - 1}
        for entry in mine:
            distinct.setdefault(others[entry].tobytes(), int(flight.event[low + entry]))
        stacked = np.frombuffer(b"".join(distinct), dtype=np.uint8).reshape(len(distinct), -1)
        choice = Choice(atom, stacked, tuple(distinct.values()))
        if survival is not None:
            chosen = survival.content(number, choice, written.layers(choice))
        else:
            chosen = (search.decided(number, atom) or search.decide(number, choice)).chosen
        content[atom - first] = stacked[chosen]


class RecoveredDisk:
    """`below` with some of what `written` records done, as a state of its own.

    `written` are the contents of a trace that a recovery made on `below`, at the moment of the second crash. Reading
    decides, here and below. `level` tells it from the disks it stands on.
    """

    def __init__(self, below: Deciding, written: Contents, level: int) -> None:
        self.size = below.size
        self.search = below.search
        self.below = below
        self.contents = written
        self.level = level

    @property
    def written(self) -> list[tuple[int, int]]:
        """The ranges of sectors that a recovery wrote to, here or below."""
        return self.below.written + self.contents.touched

    def read(self, offset: int, length: int) -> Bytes:
        size = self.contents.atom
        first, last = offset // size, -(-(offset + length) // size)
        if not self._wrote(first * size // SECTOR, last * size // SECTOR):
            return self.below.read(offset, length)
        content = self.below.read(first * size, (last - first) * size).copy()
        written, search = self.contents, self.search
        survival = None
        if written.options.narrow:
            survival = Survival(search, written.options, written.in_flight, OF_WRITES - self.level)
        lay_over(content.reshape(-1, size), first, last, written, search, self.level, survival)
        return content[offset - first * size :][:length]

    def _wrote(self, first: int, last: int) -> bool:
        """Whether the recovery wrote to any of sectors first..last-1."""
        return any(begin < last and first < end for begin, end in self.contents.touched)

    def variants(self, offset: int, length: int) -> Variants:
        return Variants(self.read(offset, length))

    def explore(self, part: Callable[[], None]) -> None:
        """Run `part` of a check for every way its reads can turn out (`Search.explore`)."""
        self.search.explore(part)

    def patches(self) -> list[Patch]:
        """What this state has that `below` has not, as far as it is decided: durable writes of the recovery and the
        atoms that were decided here."""
        contents, size = self.contents, self.contents.atom
        here = np.flatnonzero(contents.writer)
        done = dict(zip(here.tolist(), (row.tobytes() for row in contents.take(contents.rows[here])), strict=True))
        for decision in self.search.path:
            if decision.disk == self.level and decision.event >= 0:
                done[decision.choice.atom] = decision.choice.contents[decision.chosen].tobytes()
        below = self.below.patches() if isinstance(self.below, RecoveredDisk) else []
        return below + [(atom * size, content) for atom, content in sorted(done.items())]


class Overlay:
    """A disk that takes writes and keeps them, over `disk`, which is read as it is needed."""

    def __init__(self, disk: Deciding) -> None:
        self.size = disk.size
        self._disk = disk
        self._pages: dict[int, bytearray] = {}
        self._zeros: list[tuple[int, int]] = []  # pages from the first to before the second, unless in `_pages`
        self._page = SECTOR  # what a page below holds is asked for, and so decided, only if a write leaves some of it

    def read(self, offset: int, length: int) -> bytes:
        """`length` bytes at `offset`."""
        first, last = offset // self._page, -(-(offset + length) // self._page)
        if not self._kept(first, last):
            return self._disk.read(offset, length).tobytes()
        content = b"".join(self._pages.get(page) or self._fetch(page) for page in range(first, last))
        return content[offset - first * self._page :][:length]

    def _kept(self, first: int, last: int) -> bool:
        """Whether anything of pages first..last-1 was written."""
        if any(begin < last and first < end for begin, end in self._zeros):
            return True
        return any(page in self._pages for page in range(first, last))

    def _fetch(self, page: int) -> bytes:
        if any(begin <= page < end for begin, end in self._zeros):
            return bytes(self._page)
        return self._disk.read(page * self._page, self._page).tobytes()

    def zero(self, offset: int, length: int) -> None:
        """Keep zeros at `offset`: however many they are, they cost nothing."""
        end = offset + length
        first, last = -(-offset // self._page), end // self._page
        if first >= last:
            self._put(offset, bytes(length))
            return
        self._put(offset, bytes(first * self._page - offset))
        self._put(last * self._page, bytes(end - last * self._page))
        for page in [page for page in self._pages if first <= page < last]:
            del self._pages[page]
        self._zeros.append((first, last))

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Keep `data` at `offset`."""
        self._put(offset, data)

    def _put(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        place, view = offset, memoryview(data)
        while view:
            number, inner = divmod(place, self._page)
            count = min(len(view), self._page - inner)
            page = self._pages.get(number)
            if page is None:
                page = bytearray(self._page if count == self._page else self._fetch(number))
                self._pages[number] = page
            page[inner : inner + count] = view[:count]
            place, view = place + count, view[count:]
