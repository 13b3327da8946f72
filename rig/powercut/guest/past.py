"""What a guest's disk holds as its operations make it, and what its snapshots hold.

Applying a snapshot changes the whole disk at once, resizing its end; neither is a request of the guest's. A trace tells
them as events of the guest's disk all the same: the writes (bearing the old operations' numbers), zeroes and discards
that would have the same effect, all in flight together. So a crash inside may leave each sector old or new, and a
later flush makes the new state the only one. The disk's size is a TRUNCATE event, `length` being the new size.

What a disk gains by growing reads as zeros. What it had before, was cut off and comes back may be as it was: QEMU keeps
the rest of the last cluster, and writes zeros there only over a backing file (`bdrv_co_truncate` without
BDRV_REQ_ZERO_WRITE promises nothing else).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from powercut.guest.workload import Operation, Verb
from powercut.stamp import SECTOR, ZERO
from powercut.trace import Kind


class Change(NamedTuple):
    """An event of the guest's disk: bytes, and `ref` as in a trace."""

    kind: Kind
    offset: int
    length: int
    ref: int


@dataclass
class Content:
    """A disk of `size` bytes: for each sector the operation that wrote it (ZERO: zeros), and whether it may read as
    zeros instead, because of a discard. Both arrays are as long as the disk ever is."""

    size: int
    op: NDArray[np.int64]
    hint: NDArray[np.bool_]

    def copy(self) -> Content:
        return Content(self.size, self.op.copy(), self.hint.copy())


class Past:
    """Follows a history. `most`: bytes of the disk at its largest; `covered`: bytes that a backing file fills."""

    def __init__(self, most: int, size: int, covered: int) -> None:
        self._now = Content(size, np.full(most // SECTOR, ZERO), np.zeros(most // SECTOR, dtype=np.bool_))
        self._now.op[: covered // SECTOR] = 0
        self._covered = covered
        self._largest = size
        self._snapshots: dict[str, Content] = {}

    @property
    def now(self) -> Content:
        """The disk as it is now."""
        return self._now

    def done(self, number: int, operation: Operation) -> None:
        """Request `number` of the guest was answered."""
        where = slice(operation.offset // SECTOR, (operation.offset + operation.length) // SECTOR)
        if operation.kind is Kind.DISCARD:
            self._now.hint[where] = True
        elif operation.kind in (Kind.WRITE, Kind.ZERO):
            self._now.op[where] = number if operation.kind is Kind.WRITE else ZERO
            self._now.hint[where] = False

    def changes(self, number: int, operation: Operation) -> list[Change]:
        """What operation `number`, which the host carries out, does to the disk."""
        match operation.verb:
            case Verb.CREATE:
                self._snapshots[operation.name] = self._now.copy()
            case Verb.DELETE:
                del self._snapshots[operation.name]
            case Verb.RESIZE:
                return list(self._resized(number, operation.length))
            case Verb.APPLY:
                return list(self._applied(number, self._snapshots[operation.name]))
        return []

    def _resized(self, number: int, size: int) -> Iterator[Change]:
        now, old = self._now, self._now.size
        yield Change(Kind.TRUNCATE, 0, size, number)
        fresh = old if self._covered else max(old, self._largest)
        if size > fresh:
            yield Change(Kind.ZERO, fresh, size - fresh, number)
        if size < old:  # what is cut off is given up, and may be anything that it was before it was written
            yield Change(Kind.DISCARD, size, old - size, number)
            if size < self._covered:
                yield Change(Kind.WRITE, size, min(old, self._covered) - size, 0)
        cut = slice(min(old, size) // SECTOR, None)
        if self._covered:
            now.op[cut], now.hint[cut] = ZERO, False
        elif size < old:
            now.hint[cut] = True
        now.size, self._largest = size, max(self._largest, size)

    def _applied(self, number: int, then: Content) -> Iterator[Change]:
        if then.size != self._now.size:
            yield from (c for c in self._resized(number, then.size) if c.kind is not Kind.ZERO)  # content follows
        self._now = then.copy()
        end = then.size // SECTOR
        for first, last in _runs(then.op[:end]):
            op = int(then.op[first])
            kind, ref = (Kind.ZERO, number) if op == ZERO else (Kind.WRITE, op)
            yield Change(kind, first * SECTOR, (last - first) * SECTOR, ref)
        for first, last in _runs(then.hint[:end]):
            if then.hint[first]:
                yield Change(Kind.DISCARD, first * SECTOR, (last - first) * SECTOR, number)


def _runs(values: NDArray[np.generic]) -> Iterator[tuple[int, int]]:
    """The ranges of equal neighbours."""
    ends = [0, *(np.flatnonzero(values[1:] != values[:-1]) + 1).tolist(), len(values)]
    yield from itertools.pairwise(ends)
