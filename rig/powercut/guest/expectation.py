"""What a guest may still expect of its disk after some of its requests failed.

A sector's content is named by the operation that wrote it: `stamp.ZERO` is zeros, 0 what the disk held before.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from powercut.stamp import ZERO

Range = tuple[int, int, frozenset[int]]  # begin and end in bytes; the operations whose data may be there


class Expectation:
    """A disk of `size` bytes as its guest knows it, when requests may fail and one is in flight at a time.

    A request that failed may have been carried out, in whole or in part; once it was repeated with success it has
    been. What was carried out is kept once a flush issued later has succeeded. `borders`: the offsets at which
    operations begin and end; `covered`: so many bytes held something before, the rest zeros.
    """

    def __init__(self, size: int, borders: Iterable[int], covered: int = 0) -> None:
        ends = sorted({0, size, covered, *borders})
        self._ranges = list(itertools.pairwise(ends))
        self._now = [frozenset({0 if low < covered else ZERO}) for low, _ in self._ranges]
        self._kept = list(self._now)

    def tried(self, offset: int, length: int, value: int) -> None:
        """A request that leaves `value` there has been issued, or has failed; or it was a discard, a mere hint."""
        for number in self._within(offset, length):
            self._now[number] |= {value}
            self._kept[number] |= {value}

    def done(self, offset: int, length: int, value: int) -> None:
        """It succeeded."""
        for number in self._within(offset, length):
            self._now[number] = frozenset({value})
            self._kept[number] |= {value}

    def flushed(self) -> None:
        """A flush succeeded, with nothing else in flight."""
        self._kept = list(self._now)

    def _within(self, offset: int, length: int) -> list[int]:
        return [n for n, (low, high) in enumerate(self._ranges) if offset <= low and high <= offset + length]

    @property
    def now(self) -> list[Range]:
        """What the guest may read."""
        return [(low, high, legal) for (low, high), legal in zip(self._ranges, self._now, strict=True)]

    @property
    def kept(self) -> list[Range]:
        """What may be there once the disk was taken away, whatever became of requests that were not flushed."""
        return [(low, high, legal) for (low, high), legal in zip(self._ranges, self._kept, strict=True)]
