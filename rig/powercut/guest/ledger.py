"""What a guest's disk must hold and may hold, from what the guest was told.

Of operations on a sector the order is known, since none is issued while another that overlaps it is in flight. So a
sector may hold the last operation that must have survived, or any that was issued after it. What must have survived
depends on how the machine ended: all that had been completed (the image was closed), or what had been completed
before the issue of a flush that was acknowledged (the process was killed).
"""

from __future__ import annotations

import enum
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from powercut import stamp
from powercut.guest.workload import Operation
from powercut.stamp import GARBAGE, ZERO
from powercut.trace import SECTOR, Kind
from powercut.verdict import Problem, Severity

_PROBLEMS = 20  # listed at most
_PIECE = 8192  # sectors decoded at once
MISDIRECTED = -3


class Keeps(enum.Enum):
    """Which of the guest's operations an ending leaves in place."""

    COMPLETED = "completed"
    FLUSHED = "flushed"


@dataclass(slots=True)
class _Entry:
    number: int
    operation: Operation
    done: bool = False
    flushed: bool = False


class Ledger:
    """The history of one disk of `sectors` sectors, all of which held `initial` before: zeros or an operation."""

    def __init__(self, sectors: int, initial: int = ZERO) -> None:
        self._certain: NDArray[np.int64] = np.full(sectors, initial, dtype=np.int64)
        self._zero: NDArray[np.bool_] = np.full(sectors, initial == ZERO)
        self._log: dict[int, _Entry] = {}
        self._covered: dict[int, list[int]] = {}  # by the number of a flush in flight: what it covers
        self.epoch = 0

    def start_from(self, first: int, held: NDArray[np.int64]) -> None:
        """Sectors from `first` on hold the operations `held` (or ZERO)."""
        self._certain[first : first + len(held)] = held
        self._zero[first : first + len(held)] = held == ZERO

    def issue(self, number: int, operation: Operation) -> None:
        """Operation `number` is about to be issued; numbers ascend."""
        if operation.kind is Kind.FLUSH:
            self._covered[number] = [entry.number for entry in self._log.values() if entry.done and not entry.flushed]
        else:
            self._log[number] = _Entry(number, operation)

    def complete(self, number: int, error: int) -> None:
        """The guest was told that `number` is done, or failed with an errno: then it may have happened or not."""
        if number in self._log:
            self._log[number].done = not error
            return
        for covered in self._covered.pop(number, []):
            self._log[covered].flushed = not error
        self.epoch += not error

    def counts(self) -> tuple[int, int, int]:
        """How many changes were issued, completed, and flushed."""
        entries = self._log.values()
        return len(entries), sum(entry.done for entry in entries), sum(entry.flushed for entry in entries)

    def _legal(self, keeps: Keeps) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """By sector: the last operation that must have survived, and whether zeros are legal."""
        certain, zero = self._certain.copy(), self._zero.copy()
        for entry in self._log.values():
            operation = entry.operation
            where = slice(operation.offset // SECTOR, (operation.offset + operation.length) // SECTOR)
            sure = entry.done and (keeps is Keeps.COMPLETED or entry.flushed)
            if operation.kind is not Kind.WRITE:
                zero[where] = True  # a discard is a hint, and takes nothing away
            if sure and operation.kind is not Kind.DISCARD:
                certain[where] = entry.number
                zero[where] = operation.kind is Kind.ZERO
        return certain, zero

    def judge(self, held: NDArray[np.int64], keeps: Keeps) -> list[Problem]:
        """What is wrong with a disk whose sectors hold the operations `held` (see `read`)."""
        certain, zero = self._legal(keeps)
        # Most sectors hold just what they must; only of the others is it asked whether a later operation covers them.
        sectors = np.flatnonzero(~np.where(held == ZERO, zero, (held == certain) & (held >= 0)))
        writes = [entry for entry in self._log.values() if entry.operation.kind is Kind.WRITE]
        numbers = np.array([entry.number for entry in writes] + [1 << 62])
        first = np.array([entry.operation.offset // SECTOR for entry in writes] + [0])
        count = np.array([entry.operation.length // SECTOR for entry in writes] + [0])
        op = held[sectors]
        at = np.searchsorted(numbers, op)
        covers = (numbers[at] == op) & (first[at] <= sectors) & (sectors < first[at] + count[at])
        bad = sectors[~(covers & (op > certain[sectors]))]
        return [self._problem(int(s), int(held[s]), int(certain[s]), len(bad)) for s in bad[:_PROBLEMS].tolist()]

    def _problem(self, sector: int, held: int, certain: int, count: int) -> Problem:
        names = {ZERO: ("zeros", "zeros"), GARBAGE: ("garbage", "garbage"), MISDIRECTED: ("misdirected", "another's")}
        kind, what = names.get(held, ("stale", f"operation {held}"))
        entry = self._log.get(certain)
        if certain == ZERO:
            legal = "zeros or what was written since"
        else:
            state = "flushed" if entry and entry.flushed else "completed" if entry else "there before"
            legal = f"operation {certain} ({entry.operation.kind.name.lower() if entry else 'write'}, {state}) or later"
        text = f"guest sector {sector} holds {what}; legal: {legal} ({count:,} such sectors)"
        return Problem("acknowledged", kind, sector, Severity.SILENT, text)

    def settle(self, held: NDArray[np.int64]) -> None:
        """Go on from a disk that was looked at: what it holds now is certain."""
        self.start_from(0, held)
        self._log.clear()
        self._covered.clear()


def read(path: Path, sectors: int) -> NDArray[np.int64]:
    """By sector, the number of the operation whose stamp a raw image holds, or ZERO, GARBAGE, MISDIRECTED."""
    held = np.full(sectors, ZERO, dtype=np.int64)
    content: NDArray[Any] = np.memmap(path, dtype=np.uint8, mode="r")
    if len(content) < sectors * SECTOR:
        held[len(content) // SECTOR :] = GARBAGE
    for begin, end in _data(path, min(len(content), sectors * SECTOR)):
        first, last = begin // SECTOR, -(-end // SECTOR)
        for at in range(first, last, _PIECE):
            stop = min(at + _PIECE, last)
            stamps = stamp.decode(content[at * SECTOR : stop * SECTOR].reshape(-1, SECTOR))
            elsewhere = (stamps.op >= 0) & (stamps.sector != np.arange(at, stop))
            held[at:stop] = np.where(elsewhere, MISDIRECTED, stamps.op)
    return held


def _data(path: Path, size: int) -> Iterator[tuple[int, int]]:
    """The stretches of a file that are no holes."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        end = 0
        while end < size:
            try:
                begin = os.lseek(fd, end, os.SEEK_DATA)
            except OSError:  # nothing but a hole is left
                return
            end = min(os.lseek(fd, begin, os.SEEK_HOLE), size)
            if begin < end:
                yield begin, end
    finally:
        os.close(fd)
