"""The size of one file at a crash.

A file's size is one thing that survives or not: a write beyond the end may lose its bytes, its size, or both, and a
size that grew without bytes reads as zeros. A truncation changes the size at once.

    durable    what the events that are durable made of it, in the order in which they completed
    possible   also what any one event in flight makes of it: the size a truncation sets, or the end of a write that
               lies beyond the durable size or beyond what a truncation in flight, not completed before the write's
               issue was over, may have cut the file to
"""

from __future__ import annotations

from powercut.crash.model import Walk, column, table
from powercut.trace import FileInfo, Kind, Trace

_RESIZING = (Kind.WRITE, Kind.ZERO, Kind.TRUNCATE)


class Sizes(Walk):
    """How long `file` is, and else may be, at the current position."""

    def __init__(self, trace: Trace, file: FileInfo, lying: int = 0) -> None:
        super().__init__(trace, file.id, _RESIZING, lying)
        self._end = table(trace).end
        self._length = column(trace.events["length"])
        self.durable = file.size

    def settle(self, event: int) -> None:
        self.durable = self._after(event, self.durable)

    def _after(self, event: int, size: int) -> int:
        return self._length[event] if self.kind[event] == Kind.TRUNCATE else max(size, self._end[event])

    def possible(self) -> dict[int, int]:
        """Each size the file may have, the durable one first, with an event that makes it so (-1: none is needed)."""
        found = {self.durable: -1}
        cuts = [e for e in self.in_flight if self.kind[e] == Kind.TRUNCATE]
        for event in self.in_flight:
            starts = [self.durable, *(self._length[cut] for cut in cuts if self.issued[cut] < self.completed[event])]
            for size in starts:
                found.setdefault(self._after(event, size), event)
        return found

    def after(self, survivors: list[int]) -> int:
        """The size if of what is in flight just `survivors` survived."""
        size, alive = self.durable, set(survivors)
        for event in self.in_flight:
            if event in alive:
                size = self._after(event, size)
        return size

    def newest(self) -> int:
        """The size if nothing in flight is lost."""
        size = self.durable
        for event in self.in_flight:
            if event not in self.failed:
                size = self._after(event, size)
        return size
