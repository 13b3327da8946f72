"""The fault model: which events are durable at a crash, and which are in flight.

A trace lists what was asked of a file and when that was answered. At a crash at position `t`:

    durable     completed before the *issue* of some flush of the same file that completed by t (or it is FUA
                and completed by t). A write that completes while a flush is running is not covered by it.
    in flight   issued by t, not durable, and not completed before the issue of an event that is durable on
                that atom (else an older write would come back from the dead)
    absent      issued after t

The disk persists atoms (512 bytes by default). Each atom independently holds its durable content, or the
content of any one in-flight event that covers it; of durable events on one atom that ran at the same time
either may be the last. Reordered, dropped and torn writes all follow from that sentence.

An event that failed may have landed in part, and stays in flight. A flush that failed, or about which the
recorder lied, covers nothing.

An *epoch* ends where something becomes durable: just before a flush or FUA write completes, and at the end
of the recording. Within an epoch the set of states only grows and the guest's claims only get stricter, so
each epoch is visited once, at its end.

The same model holds one floor higher: a guest's disk is a file too, its events are the guest's operations,
and what may survive of them is what the guest may read after the crash (see `powercut.crash.promise`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from powercut.sparse import sparse_zeros
from powercut.trace import NEVER, SECTOR, Flag, Kind, Trace

_PAGE = 4096
_MANY = 1 << 15  # ranges
CHANGES = (Kind.WRITE, Kind.ZERO, Kind.DISCARD)


def epochs(trace: Trace, file: int | None = None) -> list[int]:
    """The crash positions to visit: the end of each epoch of `file`, ascending, the last being the trace's end.

    Without `file`: of all files and directories together."""
    events = trace.events
    ends = (
        (events["result"] == 0)
        & (events["completed"] != NEVER)
        & ((events["kind"] == Kind.FLUSH) | ((events["flags"] & Flag.FUA) != 0))
        & ((events["flags"] & Flag.LIED) == 0)
    )
    if file is None:
        ends |= (events["kind"] == Kind.SYNC_DIR) & (events["result"] == 0) & (events["completed"] != NEVER)
    else:
        ends &= events["file"] == file
    return [*sorted(events["completed"][ends].tolist()), trace.length]


def column(values: NDArray[Any]) -> Sequence[int]:
    """`values` as a sequence of ints that is read as fast as a list, and takes no more memory than they do."""
    contiguous: Any = np.ascontiguousarray(values)
    return memoryview(contiguous)


def spread(first: NDArray[np.int64], last: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """All that lies in the ranges `first[i]` to `last[i] - 1`, range by range: the number of the range, and what."""
    count = last - first
    which = np.repeat(np.arange(len(first)), count)
    return which, np.arange(len(which)) + (first - (np.cumsum(count) - count))[which]


def add_range(ranges: list[tuple[int, int]], first: int, last: int) -> None:
    """Add sectors `first` to `last - 1`. Ranges that meet become one when there are many: a walk may go far before
    anybody asks."""
    ranges.append((first, last))
    if len(ranges) % _MANY:
        return
    array = np.array(ranges, dtype=np.int64)
    begin, end = array[np.argsort(array[:, 0])].T
    reach = np.maximum.accumulate(end)
    starts = np.flatnonzero(np.append(True, begin[1:] > reach[:-1]))
    ranges[:] = zip(begin[starts].tolist(), np.maximum.reduceat(end, starts).tolist(), strict=True)


class Table:
    """The columns of a trace's events, made once for all that walk through it.

    `begin` and `end` are the bytes of its file that an event changes, `first` and `last` the sectors. A truncation
    changes what it cuts off to zeros: what any request that could have come before it had put there.
    """

    def __init__(self, trace: Trace) -> None:
        events = trace.events
        begin, end = events["offset"].copy(), events["offset"] + events["length"]
        truncations = events["kind"] == Kind.TRUNCATE
        extends = np.isin(events["kind"], (Kind.WRITE, Kind.ZERO))
        for file in np.unique(events["file"][truncations]).tolist():
            cuts = np.flatnonzero(truncations & (events["file"] == file))
            written = np.flatnonzero(extends & (events["file"] == file))
            initial = trace.files[file].size if file < len(trace.files) else 0
            most = np.maximum.accumulate(np.append(initial, end[written]))
            before = np.searchsorted(events["issued"][written], events["completed"][cuts])
            begin[cuts] = events["length"][cuts]
            # To the end of a page: what lies behind the file's end is zeros, and need not be composed.
            last = -(-most[before] // _PAGE) * _PAGE
            end[cuts] = np.where(most[before] > begin[cuts], last, begin[cuts])
        first, last = begin // SECTOR, -(-end // SECTOR)
        self.begin = column(begin)
        self.end = column(end)
        self.first = column(first)
        self.last = column(np.where(begin == end, first, last))
        self.issued = column(events["issued"])
        self.completed = column(events["completed"])
        self.kind = column(events["kind"])


_tables: WeakKeyDictionary[Trace, Table] = WeakKeyDictionary()


def table(trace: Trace) -> Table:
    """The table of `trace`."""
    found = _tables.get(trace)
    if found is None:
        found = _tables[trace] = Table(trace)
    return found


class Walk:
    """Goes through the events of `file` whose kinds are `kinds`, and says when each becomes durable.

    `in_flight` lists the indices of the events in flight, by issue. `lying` is how many of the last flushes before a
    crash did nothing.
    """

    def __init__(self, trace: Trace, file: int, kinds: Collection[Kind], lying: int = 0) -> None:
        self.trace = trace
        self.file = file
        self.position = 0
        events = trace.events
        columns = table(trace)
        self.issued, self.completed, self.kind = columns.issued, columns.completed, columns.kind
        self.in_flight: list[int] = []
        mine = np.flatnonzero(events["file"] == file)
        here = events[mine]
        changes = np.isin(here["kind"], list(kinds))
        done = (here["result"] == 0) & (here["completed"] != NEVER)
        fua = (here["flags"] & Flag.FUA) != 0
        flush = (here["kind"] == Kind.FLUSH) & done & ((here["flags"] & Flag.LIED) == 0)
        self.events = column(mine[changes])
        self.failed = set(mine[changes & (here["result"] != 0)].tolist())
        # An in-flight event can be overtaken by a durable one only if it is durable for another reason than a flush.
        self.overtaking = bool(self.failed) or bool(fua.any())
        # The steps of this file's history: (position, what, event), what being 0 enter, 1 flush done, 2 FUA done.
        # A flush takes effect when it completes; if the last k lied, when the k-th after it does.
        flushes = mine[flush][np.argsort(here["completed"][flush])]
        takes = flushes[: max(0, len(flushes) - lying)]
        fua_done = mine[changes & fua & done]
        when = [here["issued"][changes], events["completed"][flushes[lying:]], events["completed"][fua_done]]
        which = [mine[changes], takes, fua_done]
        position, event = np.concatenate(when), np.concatenate(which)
        what = np.repeat([0, 1, 2], [len(part) for part in when])
        order = np.lexsort((event, what, position))
        self._when, self._what, self._which = column(position[order]), column(what[order]), column(event[order])
        self._next = 0

    def advance(self, position: int) -> None:
        """Go on to a crash at `position`: everything recorded before it has happened."""
        when = self._when
        while self._next < len(when) and when[self._next] < position:
            what, event = self._what[self._next], self._which[self._next]
            self._next += 1
            if what == 0:
                self.in_flight.append(event)
                self.entered(event)
            elif what == 1:
                since = self.issued[event]
                covered = [e for e in self.in_flight if self.completed[e] < since and e not in self.failed]
                self._settle(sorted(covered, key=self.completed.__getitem__))
            else:
                self._settle([event])
        self.position = position

    def _settle(self, events: list[int]) -> None:
        """Make `events` durable, in the order in which they completed."""
        for event in events:
            self.settle(event)
        if events:
            gone = set(events)
            self.in_flight = [e for e in self.in_flight if e not in gone]

    def entered(self, event: int) -> None:
        """`event` was issued. For subclasses."""

    def settle(self, event: int) -> None:
        """`event` became durable. For subclasses."""


class Durability(Walk):
    """Follows the content of one file: `writer[sector]` is 1 + the index of the event whose content is durable there
    (0: the initial content).

    `others[sector]` lists further durable events that may have been the last on it, which happens only
    where requests overlapped in time and place.
    """

    def __init__(self, trace: Trace, file: int, lying: int = 0, kinds: Collection[Kind] = CHANGES) -> None:
        super().__init__(trace, file, kinds, lying)
        columns = table(trace)
        self.first, self.last = columns.first, columns.last
        self._first, self._last = np.asarray(self.first), np.asarray(self.last)
        end = int(self._last[trace.events["file"] == file].max(initial=0))
        self.sectors = max(end, -(-trace.files[file].size // SECTOR))
        self.writer: NDArray[np.int32] = sparse_zeros(self.sectors, np.int32)  # type: ignore[assignment]
        self.others: dict[int, list[int]] = {}
        self._issued, self._completed = np.asarray(self.issued), np.asarray(self.completed)

    def _settle(self, events: list[int]) -> None:
        """Those that nothing else was on at the same time are settled together: that is most, and less work."""
        if self.overtaking or self.others or len(events) < 2:
            super()._settle(events)
            return
        index = np.array(events)
        first, last = self._first[index], self._last[index]
        order = np.argsort(first)
        which, sectors = spread(first, last)
        before = self.writer[sectors]
        rivals = (before > 0) & (self._completed[before - 1] > self._issued[index][which])
        if rivals.any() or (first[order][1:] < last[order][:-1]).any():
            super()._settle(events)
            return
        self.settled(index, which, sectors)
        gone = set(events)
        self.in_flight = [e for e in self.in_flight if e not in gone]

    def settle(self, event: int) -> None:
        sectors = np.arange(self.first[event], self.last[event])
        before = self.writer[sectors]
        if before.any():
            rivals = (before > 0) & (self._completed[before - 1] > self.issued[event])
            if self.overtaking:
                newer = self.overtaken(event, sectors)  # what is durable there came after this event: it stays
                sectors, rivals = sectors[~newer], rivals[~newer]
            if rivals.any() or self.others:
                self._keep_rivals(event, sectors[rivals])
        self.settled(np.array([event]), np.zeros(len(sectors), dtype=np.int64), sectors)

    def _keep_rivals(self, event: int, sectors: NDArray[np.int64]) -> None:
        first, last, issued = self.first[event], self.last[event], self.issued[event]
        for sector in [s for s in self.others if first <= s < last]:
            self.others[sector] = [e for e in self.others[sector] if self.completed[e] > issued]
            if not self.others[sector]:
                del self.others[sector]
        for sector in sectors.tolist():
            self.others.setdefault(sector, []).append(int(self.writer[sector]) - 1)

    def settle_rest(self) -> None:
        """Make all that is in flight durable, in the order in which it was issued, and the newest the only one."""
        self._settle(list(self.in_flight))
        self.others.clear()

    def overtaken(self, event: int, sectors: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Where `event` completed before the issue of something that is durable. `sectors` ascend."""
        completed = self.completed[event]
        writer = self.writer[sectors]
        over = np.asarray((writer > 0) & (self._issued[writer - 1] > completed))
        for sector, rivals in self.others.items():
            if any(self.issued[rival] > completed for rival in rivals):
                over |= sectors == sector
        return over

    def settled(self, events: NDArray[np.int64], which: NDArray[np.int64], sectors: NDArray[np.int64]) -> None:
        """`events` became durable, each in those of `sectors` that `which` gives its number. Subclasses that keep more
        than the writer extend this."""
        self.writer[sectors] = (events + 1)[which]


def log2_states(counts: Iterable[int]) -> float:
    """The number of states that independent choices of `counts` alternatives make, as a power of two."""
    return float(sum(np.log2(count) for count in counts))
