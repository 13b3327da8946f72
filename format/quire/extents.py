"""Which leaf holds what of a disk, followed down through its parents; and where two disks differ."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from quire.layout import BLOCK, DATA, PARENT
from quire.leaf import Leaf

_STEP = 1 << 30  # bytes of a disk that are looked at at a time
_COMPARE = 1 << 20


class Extent(NamedTuple):
    """A range of a disk, in bytes, that one leaf holds; `owner` is None where it reads as zeros."""

    offset: int
    length: int
    owner: Leaf | None

    @property
    def end(self) -> int:
        return self.offset + self.length


def extents(leaf: Leaf, offset: int = 0, length: int | None = None) -> Iterator[Extent]:
    """The range of the disk of `leaf` in order, neighbours having different owners. Beyond its end there is nothing."""
    end = leaf.size if length is None else min(leaf.size, offset + length)
    last: Extent | None = None
    for place in range(offset, end, _STEP):
        for extent in _step(leaf, place, min(end, place + _STEP)):
            if last is not None and last.owner is extent.owner:
                last = last._replace(length=extent.end - last.offset)
                continue
            if last is not None:
                yield last
            last = extent
    if last is not None:
        yield last


def _step(leaf: Leaf, begin: int, end: int) -> Iterator[Extent]:
    """The same, with neighbours that may have one owner. A chain of leaves may be thousands long: no recursion."""
    wanted: list[tuple[int, int, Leaf | None, bool]] = [(begin, end, leaf, False)]
    while wanted:
        begin, end, holder, resolved = wanted.pop()
        if resolved or holder is None:
            yield Extent(begin, end - begin, holder)
            continue
        first = begin // BLOCK
        found: list[tuple[int, int, Leaf | None, bool]] = []
        below = holder.parent
        for start, count, state in holder.states.runs(first, (end - 1) // BLOCK - first + 1):
            low, high = max(begin, start * BLOCK), min(end, (start + count) * BLOCK)
            if state == DATA:
                found.append((low, high, holder, True))
            elif state != PARENT or below is None or low >= below.size:
                found.append((low, high, None, True))
            else:
                found.append((low, min(high, below.size), below, False))
                if high > below.size:
                    found.append((below.size, high, None, True))
        wanted += reversed(found)


def differences(old: Leaf, new: Leaf) -> Iterator[tuple[int, int]]:
    """The (offset, length) of whole blocks in which two disks differ, ascending, neighbours joined. Where one is
    shorter, what it has not counts as zeros. What one leaf holds for both is equal without being read."""
    size = max(old.size, new.size)
    left, right = _covering(old, size), _covering(new, size)
    one, other = next(left), next(right)
    place = 0
    last = (0, 0)
    while place < size:
        end = min(one.end, other.end)
        if one.owner is not other.owner:
            for begin, stop in _unequal(one.owner, other.owner, place, end):
                if begin > last[1]:
                    if last[1]:
                        yield last[0], last[1] - last[0]
                    last = begin, last[1]
                last = last[0], min(stop, size)
        place = end
        if place < size:
            one = next(left) if one.end == place else one
            other = next(right) if other.end == place else other
    if last[1]:
        yield last[0], last[1] - last[0]


def _covering(leaf: Leaf, size: int) -> Iterator[Extent]:
    yield from extents(leaf)
    if leaf.size < size:
        yield Extent(leaf.size, size - leaf.size, None)


def _unequal(one: Leaf | None, other: Leaf | None, begin: int, end: int) -> Iterator[tuple[int, int]]:
    """(first byte, end) of each block within a range, whole blocks even at its edges, in which two leaves differ."""
    for place in range(begin, end, _COMPARE):
        length = min(_COMPARE, end - place)
        left, right = (bytes(length) if leaf is None else bytes(leaf.read(place, length)) for leaf in (one, other))
        if left == right:
            continue
        for block in range(place // BLOCK * BLOCK, place + length, BLOCK):
            inside = slice(max(block - place, 0), block + BLOCK - place)
            if left[inside] != right[inside]:
                yield block, block + BLOCK
