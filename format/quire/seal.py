"""Sealed leaves: a tree of hashes over all that a leaf holds, whose root is in the manifest.

A unit is 64 KiB of the disk, 16 blocks. Its hash is xxh3-128 of its blocks' states, as the map packs them (4 bytes),
and the content of those that are data; a unit without anything of its own has no hash (zeros). 256 hashes make a page,
whose hash goes one level up, until one page is left. A page of zeros has the hash zero too and need not be stored: a
seal costs what the leaf holds, not what the disk could hold.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import numpy as np
import xxhash
from numpy.typing import NDArray

from quire.errors import Damaged
from quire.layout import BLOCK, DATA, PAGE
from quire.leaf import Leaf
from quire.store import File, Store

UNIT = 65536
_BLOCKS = UNIT // BLOCK
_HASH = 16
_FAN = PAGE // _HASH
_NOTHING = bytes(_HASH)
_EMPTY = bytes(PAGE)

Progress = Callable[[int, int], None]  # bytes done, bytes in all


def quiet(done: int, of: int) -> None:
    """A progress that nobody watches."""


def file_name(leaf: bytes) -> str:
    """The name of a leaf's seal."""
    return leaf.hex() + ".seal"


def _hash(data: bytes) -> bytes:
    return xxhash.xxh3_128_digest(data) if any(data) else _NOTHING


def levels(size: int) -> list[int]:
    """How many pages each level has for a disk of `size` bytes, the hashes of units first, the top page last."""
    counts = [-(-max(1, -(-size // UNIT)) // _FAN)]
    while counts[-1] > 1:
        counts.append(-(-counts[-1] // _FAN))
    return counts


def root(leaf: bytes, size: int, top: bytes) -> bytes:
    """What the manifest keeps: it also says whose seal it is."""
    return xxhash.xxh3_128_digest(leaf + size.to_bytes(8, "little") + top)


def words(leaf: Leaf) -> NDArray[np.uint32]:
    """The packed states of each unit of a leaf."""
    units = -(-leaf.size // UNIT)
    return leaf.states.packed()[: units * 4].view("<u4")


def unit_hash(leaf: Leaf, unit: int, word: int) -> bytes:
    """The hash of a unit whose packed states are `word`, read from the leaf's file."""
    if not word:
        return _NOTHING
    digest = xxhash.xxh3_128(word.to_bytes(4, "little"))
    held = [word >> 2 * i & 3 == DATA for i in range(_BLOCKS)]
    if any(held):
        data = leaf.file.read(unit * UNIT, UNIT).ljust(UNIT, b"\0")
        if all(held):
            digest.update(data)
        else:
            digest.update(b"".join(data[i * BLOCK : (i + 1) * BLOCK] for i in range(_BLOCKS) if held[i]))
    return digest.digest()


def write(store: Store, leaf: Leaf, progress: Progress) -> bytes:
    """Write and sync the seal of a leaf that does not change any more. Returns its root. The name is not durable before
    `store.sync_dir`. What an interrupted sealing left under the name is replaced."""
    name, counts = file_name(leaf.identity.leaf), levels(leaf.size)
    with contextlib.suppress(FileNotFoundError):
        store.unlink(name)
    file = store.create(name)
    total = sum(counts)
    start = 0  # the first page of the level that is written
    above: dict[int, bytearray] = {}  # the pages of the next level

    def put(number: int, page: bytearray) -> None:
        for copy in (0, 1):
            file.write((copy * total + start + number) * PAGE, page)
        inner = number % _FAN * _HASH
        above.setdefault(number // _FAN, bytearray(PAGE))[inner : inner + _HASH] = _hash(bytes(page))

    try:
        file.truncate(2 * total * PAGE)
        states = words(leaf)
        used = np.flatnonzero(states)
        start, above = 0, {}
        for number in np.unique(used // _FAN).tolist():
            page = bytearray(PAGE)
            low, high = np.searchsorted(used, (number * _FAN, (number + 1) * _FAN))
            for unit in used[low:high].tolist():
                inner = unit % _FAN * _HASH
                page[inner : inner + _HASH] = unit_hash(leaf, unit, int(states[unit]))
            put(number, page)
            progress(min(leaf.size, (number + 1) * _FAN * UNIT), leaf.size)
        for count in counts[:-1]:
            start, pages, above = start + count, above, {}
            for number, page in sorted(pages.items()):
                put(number, page)
        file.sync()
    except BaseException:
        file.close()
        with contextlib.suppress(OSError):
            store.unlink(name)
        raise
    file.close()
    return root(leaf.identity.leaf, leaf.size, bytes(above[0][:_HASH]) if above else _NOTHING)


class Seal:
    """A leaf's seal, opened. Each page is verified against the one above it when it is first used, and served from the
    second copy if the first is bad; `bad` lists the offsets of bad pages."""

    def __init__(self, store: Store, leaf: Leaf, expected: bytes) -> None:
        self._leaf = leaf
        self._counts = levels(leaf.size)
        self._total = sum(self._counts)
        self._expected = expected
        self._pages: dict[tuple[int, int], bytes] = {}
        self._words = words(leaf)
        self.bad: dict[int, bytes] = {}  # offset of a bad page -> what belongs there
        self._store = store
        self.name = file_name(leaf.identity.leaf)
        self._file: File = store.open(self.name, write=False)

    def close(self) -> None:
        self._file.close()

    def verify(self, offset: int, length: int) -> None:
        """Raises Damaged if the units of a range do not hold what was sealed, or the seal is bad in both copies."""
        for unit in range(offset // UNIT, -(-(offset + length) // UNIT)):
            page = self._page(0, unit // _FAN)
            inner = unit % _FAN * _HASH
            if unit_hash(self._leaf, unit, int(self._words[unit])) != page[inner : inner + _HASH]:
                raise Damaged(self._leaf.identity.file, "not what was sealed", unit * UNIT)

    def verify_all(self, progress: Progress) -> Iterator[int]:
        """The offsets of the units that do not hold what was sealed. Reads every page of the seal, in both copies."""
        start = 0
        for level, count in enumerate(self._counts):
            for number in range(count):
                if any(self._page(level, number)):
                    self._other_copy(start + number, self._page(level, number))
            start += count
        for number in range(self._counts[0]):
            page = self._page(0, number)
            first = number * _FAN
            states = self._words[first : first + _FAN].tolist()
            for i in range(len(states)) if page is not _EMPTY or any(states) else ():
                sealed = page[i * _HASH : (i + 1) * _HASH]
                if (states[i] or sealed != _NOTHING) and unit_hash(self._leaf, first + i, states[i]) != sealed:
                    yield (first + i) * UNIT
            progress(min(self._leaf.size, (first + _FAN) * UNIT), self._leaf.size)

    def mend(self) -> list[int]:
        """Rewrite the bad pages that were met. Returns their offsets."""
        if self.bad:
            file = self._store.open(self.name, write=True)
            try:
                for offset, page in self.bad.items():
                    file.write(offset, page)
                file.sync()
            finally:
                file.close()
        return sorted(self.bad)

    def _page(self, level: int, number: int) -> bytes:
        known = self._pages.get((level, number))
        if known is not None:
            return known
        if level + 1 < len(self._counts):
            inner = number % _FAN * _HASH
            wanted = self._page(level + 1, number // _FAN)[inner : inner + _HASH]
            if wanted == _NOTHING:  # nothing was stored
                return _EMPTY
        else:
            wanted = None
        place = sum(self._counts[:level]) + number
        for copy in (0, 1):
            page = self._file.read((copy * self._total + place) * PAGE, PAGE)
            good = len(page) == PAGE and (self._is_root(page) if wanted is None else _hash(page) == wanted)
            if good:
                self._pages[level, number] = page
                if copy:
                    self.bad[place * PAGE] = page
                return page
        raise Damaged(self.name, "a page of the seal is bad in both copies", place * PAGE)

    def _is_root(self, page: bytes) -> bool:
        return root(self._leaf.identity.leaf, self._leaf.size, _hash(page)) == self._expected

    def _other_copy(self, place: int, page: bytes) -> None:
        offset = (self._total + place) * PAGE
        if self._file.read(offset, PAGE) != page:
            self.bad[offset] = page
