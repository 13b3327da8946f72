"""What a guest may read after a crash.

The guest's disk follows the same fault model as the file below it: an operation that completed before the
issue of a flush that was acknowledged must be there; one that was not flushed may be there or not, sector by
sector. So the legal contents of a guest sector are those that the model leaves for it, and the check of a
recovered disk is one of membership.

A discard is a hint: it makes zeros legal, now and later, and takes nothing away, because a device may ignore
it for a part of the range or for all of it (NBD protocol, NBD_CMD_TRIM; QEMU ignores unaligned edges).

Where a torn atom may be zeros or garbage, so may a sector that an operation in flight is on.

The disk's size is promised in the same way: TRUNCATE events change it, and a flush makes them durable. A size of 0
when recording began says that it is not known, and nothing is promised about it.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from powercut.crash.model import Durability, add_range
from powercut.sparse import sparse_zeros
from powercut.stamp import GARBAGE, ZERO, make
from powercut.trace import SECTOR, FileInfo, Kind, Trace

Sectors = NDArray[np.int64]


class Promise(Durability):
    """The legal contents of a guest's disk at the current position. `guest` is a file whose role is "guest"."""

    def __init__(self, trace: Trace, guest: FileInfo, torn: str = "old-or-new") -> None:
        super().__init__(trace, guest.id)
        self._torn = {"zeros": ZERO, "garbage": GARBAGE}.get(torn)
        events = trace.events
        self._kind = np.asarray(self.kind)
        self.size = self.sectors * SECTOR  # bytes of the disk at its largest
        self._size = guest.size
        # One more at the end, for an index of -1: what was there before the first event.
        self.op: Sectors = np.append(np.where(events["kind"] == Kind.WRITE, events["ref"], ZERO), ZERO)
        mine = (events["file"] == guest.id) & (events["kind"] == Kind.WRITE)
        order = np.argsort(events["ref"][mine], kind="stable")
        self._ops: Sectors = events["ref"][mine][order]
        self._event_of_op: Sectors = np.flatnonzero(mine)[order]
        self._live = np.zeros(len(events) + 1, dtype=bool)  # in flight now
        begin, end = events["offset"], events["offset"] + events["length"]
        self._begin, self._end = np.append(begin, 0) // SECTOR, np.append(end, 0) // SECTOR
        self._may_be_zero: Any = sparse_zeros(self.sectors, np.bool_)
        self.tightened: list[tuple[int, int]] = []  # sector ranges whose legal contents became fewer
        resized = (events["file"] == guest.id) & (events["kind"] == Kind.TRUNCATE) & (events["result"] == 0)
        self._resized: list[int] = np.flatnonzero(resized).tolist()
        flushed = (events["file"] == guest.id) & (events["kind"] == Kind.FLUSH) & (events["result"] == 0)
        self._flushed: list[tuple[int, int]] = events[flushed][["issued", "completed"]].tolist()

    @property
    def sizes(self) -> list[int]:
        """How many bytes the disk may have, what is durable first; none if its size is not known."""
        if not self._size:
            return []
        sizes = [self._size]
        for event in self._resized:
            if self.issued[event] >= self.position:
                break
            done, length = self.completed[event], int(self.trace.events["length"][event])
            if any(done < issued and completed < self.position for issued, completed in self._flushed):
                sizes = [length]
            else:
                sizes.append(length)
        return sizes

    def entered(self, event: int) -> None:
        self._live[event] = True

    def settled(self, events: Sectors, which: Sectors, sectors: Sectors) -> None:
        self._live[events] = False
        hint = self._kind[events] == Kind.DISCARD
        if hint.any():
            self._may_be_zero[sectors[hint[which]]] = True
            which, sectors = which[~hint[which]], sectors[~hint[which]]
        super().settled(events, which, sectors)
        self._may_be_zero[sectors] = False
        for event in events[~hint].tolist():
            add_range(self.tightened, self.first[event], self.last[event])

    def legal(self, at: Sectors, op: Sectors, stamped: Sectors) -> NDArray[np.bool_]:
        """Whether guest sector `at[i]` may hold the stamp of operation `op[i]` for sector `stamped[i]`."""
        writer = self.writer[at]
        wanted = self.op[writer - 1]
        zero = op == ZERO
        ok = (op == wanted) & (zero | (stamped == at))
        left = np.flatnonzero(~ok & (zero | (stamped == at)) & (op != GARBAGE))
        if len(left):
            ok[left] = self._in_flight(at[left], op[left])
        if self._torn is not None:  # by the disk's own model, whatever stores it
            for change in self.in_flight:
                ok |= (op == self._torn) & (self.first[change] <= at) & (at < self.last[change])
        return np.asarray(ok)

    def _in_flight(self, at: Sectors, op: Sectors) -> NDArray[np.bool_]:
        ok = np.zeros(len(op), dtype=np.bool_)
        place = np.searchsorted(self._ops, op)  # several events have one number where a snapshot was applied
        beyond = np.searchsorted(self._ops, op, side="right")
        while (known := place < beyond).any():
            event = self._event_of_op[np.where(known, place, 0)]
            hit = known & self._live[event] & (self._begin[event] <= at) & (at < self._end[event])
            if self.overtaking:
                writer = self.writer[at]
                hit &= (writer == 0) | (self._issued[writer - 1] < self._completed[event])
            ok |= hit
            place += 1
        zero = op == ZERO
        if zero.any():
            ok |= zero & self._may_be_zero[at]
            for change in self.in_flight:
                if self.kind[change] != Kind.WRITE:
                    ok |= zero & (self.first[change] <= at) & (at < self.last[change])
        if self.others:
            for i, sector in enumerate(at.tolist()):
                ok[i] |= int(op[i]) in {int(self.op[e]) for e in self.others.get(sector, ())}
        return np.asarray(ok)

    def contents(self, sector: int) -> list[tuple[str, bytes]]:
        """What guest sector `sector` may hold: in words, and the bytes that our own client writes."""
        legal = []
        writers = [int(self.writer[sector]) - 1, *self.others.get(sector, ())]
        live = [e for e in self.in_flight if self.first[e] <= sector < self.last[e]]
        for event, state in [(e, "flushed") for e in writers] + [(e, "not flushed") for e in live]:
            if event < 0:
                legal.append(("zeros (never written)", bytes(SECTOR)))
                continue
            number, kind = int(self.trace.events["ref"][event]), Kind(self.kind[event])
            content = self._stamped(number, sector) if kind is Kind.WRITE else bytes(SECTOR)
            legal.append((f"operation {number} ({kind.name.lower()}, {state})", content))
        return legal

    def _stamped(self, number: int, sector: int) -> bytes:
        """What operation `number` wrote to `sector`: its stamp tells how many flushes had been acknowledged by then."""
        issued = self.issued[self._event_of_op[np.searchsorted(self._ops, number)]]
        return make(number, int(np.searchsorted(self._counted, issued)) if number else 0, sector, 1)

    @cached_property
    def _counted(self) -> Sectors:
        """When each flush of the guest's own was acknowledged, ascending."""
        events = self.trace.events
        flushes = (events["file"] == self.file) & (events["kind"] == Kind.FLUSH) & (events["ref"] > 0)
        return np.sort(events["completed"][flushes & (events["result"] == 0)])

    def describe(self, sector: int) -> str:
        """What guest sector `sector` may hold, for people."""
        return " or ".join(words for words, _ in self.contents(sector))
