"""What the sectors of a guest's disk may hold, from what the guest itself knows: its operations, which overlap in time.

Rule: of two changes of a sector the later is the one that was issued after the other was answered; of changes in flight
together either may be. A read returns what some change left that was not overwritten, by a later change answered before
the read was issued; or what a change in flight during the read makes. A discard makes zeros legal, and takes nothing
away. A snapshot is a read of the whole disk.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

from powercut.oracles.readback import first_wrong
from powercut.stamp import GARBAGE, ZERO

_WRITES, _ZEROES, _DISCARDS = ("write",), ("zero", "unmap"), ("discard",)


class Asked(Protocol):
    """What a guest asked: `kind` as in its history, a range in bytes."""

    @property
    def kind(self) -> str: ...
    @property
    def offset(self) -> int: ...
    @property
    def length(self) -> int: ...


class Entry(Protocol):
    """An operation of the guest's, and when by its own clock it was issued and answered (None: not yet)."""

    number: int
    issued: int
    completed: int | None

    @property
    def operation(self) -> Asked: ...


class Fault(NamedTuple):
    """What was wrong. `kind` is a word for the machine, `text` a sentence, `sector` the guest's, if it is one."""

    kind: str
    text: str
    sector: int = -1


class Judge:
    """Judges what was read from a disk of `size` bytes on which the operations of `log` were done.

    `initial` says of a byte's offset what operation wrote it before: 0, or ZERO; it may change at `ends` only."""

    def __init__(self, size: int, initial: Callable[[int], int], ends: Iterable[int], log: Sequence[Entry]) -> None:
        self._size, self._initial, self._log = size, initial, log
        marks = set(ends)
        for entry in log:
            marks |= {entry.operation.offset, entry.operation.offset + entry.operation.length}
        self._ends = sorted(marks)

    def legal(self, offset: int, issued: int, completed: int) -> set[int]:
        """The operations whose data a read from `issued` to `completed` may return at `offset`; ZERO: zeros."""
        here = [
            (entry, entry.operation.kind)
            for entry in self._log
            if entry.operation.kind in _WRITES + _ZEROES + _DISCARDS
            and entry.operation.offset <= offset < entry.operation.offset + entry.operation.length
            and entry.issued <= completed
        ]
        last = max(
            (e.issued for e, kind in here if kind != "discard" and e.completed is not None and e.completed <= issued),
            default=-1,
        )  # what was answered before this was issued is overwritten
        values = {
            entry.number if kind in _WRITES else ZERO
            for entry, kind in here
            if entry.completed is None or entry.completed >= last
        }
        return values if last >= 0 else values | {self._initial(offset)}

    def fault(self, where: str, offset: int, data: Any, issued: int, completed: int) -> Fault | None:
        """The first sector of `data`, read at `offset`, that holds what it may not."""
        end = offset + len(data)
        marks = [offset, *(mark for mark in self._ends if offset < mark < end), end]
        ranges = ((low, high, self.legal(low, issued, completed)) for low, high in itertools.pairwise(marks))
        wrong = first_wrong(data, offset, ranges)
        if wrong is None:
            return None
        found = self._word(wrong.op) + (f" for sector {wrong.of}" if wrong.kind == "foreign" else "")
        wanted = " or ".join(sorted(map(self._word, wrong.legal)))
        text = f"{where}: guest sector {wrong.sector} holds {found}; legal: {wanted}"
        return Fault(f"{where.split()[0]}-{wrong.kind}", text, wrong.sector)

    def _word(self, op: int) -> str:
        words = {ZERO: "zeros", GARBAGE: "garbage", 0: "what was there before"}
        if op not in words and op > len(self._log):
            return f"data of operation {op}, which was not issued,"
        return words.get(op) or f"data of operation {op} ({self._log[op - 1].operation})"
