"""The bytes of one file at a crash: what each sector durably holds, and what else it may hold.

Content is never copied here: a sector's content is the number of a row of the trace file (see
`powercut.trace`), row 0 being zeros. Rows beyond the trace's own hold atoms that a write covers only in part,
composed with what was there when it was issued.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from powercut.crash.model import CHANGES, Durability, add_range, spread, table
from powercut.crash.options import SCRAMBLED, ZEROED, Options
from powercut.disk import Bytes
from powercut.sparse import sparse_zeros
from powercut.stamp import GARBAGE, ZERO, decode
from powercut.trace import SECTOR, FileInfo, Kind, Trace

Rows = NDArray[np.int64]
_UNKNOWN = min(ZERO, GARBAGE) - 1  # no operation's number
_AT_ONCE = 2048  # rows: a MiB of sectors, which stays in a processor's cache
_MANY = 2 * _AT_ONCE


class InFlight(NamedTuple):
    """Every atom some in-flight event covers, one entry for each of the two, ascending by atom, then by issue."""

    atom: Rows
    event: Rows
    rows: Rows  # shape (n, sectors per atom)


class Choice(NamedTuple):
    """An atom with several distinct contents. The first is the durable one."""

    atom: int
    contents: Bytes  # shape (k, bytes per atom)
    events: tuple[int, ...]  # for each content, an event that left it; -1: the initial content


class Tokens:
    """What the rows of a trace mean as stamps, decoded when first asked for. Composed rows are garbage."""

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self._rows = trace.rows
        self._op: Any = sparse_zeros(len(trace.rows), np.int64)  # by `_UNKNOWN` less than it is
        self._sector: Any = sparse_zeros(len(trace.rows), np.int64)

    def of(self, rows: Rows) -> tuple[Rows, Rows]:
        """The operation (or ZERO, GARBAGE) and guest sector that each of `rows` is stamped with."""
        beyond = rows >= len(self._rows)
        if beyond.any():
            op, sector = self.of(np.where(beyond, 0, rows))
            return np.where(beyond, GARBAGE, op), sector
        op = self._op[rows]
        new = np.flatnonzero(op == 0)
        if len(new) > _MANY:  # in the order of the file, so that little of it is in memory at a time
            new = new[np.argsort(rows[new])]
        for begin in range(0, len(new), _AT_ONCE):
            if begin and begin % _MANY == 0:
                self._trace.release()
            part = rows[new[begin : begin + _AT_ONCE]]
            stamps = decode(self._rows.take(part, axis=0))
            self._op[part], self._sector[part] = stamps.op - _UNKNOWN, stamps.sector
        if len(new):
            op[new] = self._op[rows[new]]
        return op + _UNKNOWN, self._sector[rows]


class Contents(Durability):
    """One file of a trace at the current position, as sectors that know which rows they may be.

    `atom` is the size in bytes of what the disk writes in one piece: a multiple of 512.
    """

    def __init__(
        self, trace: Trace, file: FileInfo, atom: int = SECTOR, lying: int = 0, *, options: Options | None = None
    ) -> None:
        self.options = options or Options(atom, lying)
        super().__init__(trace, file.id, lying, (*CHANGES, Kind.TRUNCATE))
        columns = table(trace)
        self._begin, self._end = columns.begin, columns.end
        self.size = file.size
        self.atom = atom
        self.per_atom = atom // SECTOR
        self.sectors = -(-self.sectors // self.per_atom) * self.per_atom
        self.writer = sparse_zeros(self.sectors, np.int32)  # type: ignore[assignment]
        self.rows: Any = sparse_zeros(self.sectors, np.int64)
        events = trace.events
        self._row = np.ascontiguousarray(events["row"])
        self._writes = np.asarray(self.kind) == Kind.WRITE
        for _, offset, length, row in trace.bases[trace.bases[:, 0] == file.id].tolist():
            first, last = offset // SECTOR, -(-(offset + length) // SECTOR)
            self.rows[first:last] = np.arange(row, row + last - first)
        self._composed: list[Bytes] = []
        mine = np.asarray(self.events)
        begin, end = np.asarray(self._begin)[mine], np.asarray(self._end)[mine]
        self._partial = set(mine[((begin | end) % atom != 0) & (begin < end)].tolist())
        # What a reader would see if nothing were lost: needed only to compose atoms that are written in part.
        self._newest: Any = self.rows.copy() if self._partial else None
        self._edges: dict[int, dict[int, Rows]] = {}
        self.touched: list[tuple[int, int]] = []  # sector ranges that got another possible content
        self._in_flight: InFlight | None = None
        self._garbage: int | None = None  # the row that holds some
        self._choices: dict[tuple[int, int], list[Choice]] = {}
        self._reads: dict[tuple[int, int], Bytes] = {}

    # What events do

    def entered(self, event: int) -> None:
        first, last = self.first[event], self.last[event]
        add_range(self.touched, first, last)
        if self._newest is None:
            return
        if event in self._partial:
            self._edges[event] = self._compose(event)
        sectors = np.arange(first, last)
        self._newest[sectors] = self._rows_of(np.array([event]), np.zeros(len(sectors), dtype=np.int64), sectors)

    def settled(self, events: Rows, which: Rows, sectors: Rows) -> None:
        super().settled(events, which, sectors)
        self.rows[sectors] = self._rows_of(events, which, sectors)

    def _rows_of(self, events: Rows, which: Rows, sectors: Rows) -> Rows:
        """The rows that `events` leave, each in those of `sectors` that `which` gives its number, and which it covers
        at least in part."""
        rows = np.where(self._writes[events][which], (self._row[events] - self._first[events])[which] + sectors, 0)
        for number in [i for i, event in enumerate(events.tolist()) if event in self._edges]:
            for atom, edge in self._edges[int(events[number])].items():
                here = np.flatnonzero((which == number) & (sectors // self.per_atom == atom))
                rows[here] = edge[sectors[here] % self.per_atom]
        return rows

    def _compose(self, event: int) -> dict[int, Rows]:
        """The rows of the atoms at the edges of `event`, which it covers in part: its bytes over what was there."""
        offset, end = self._begin[event], self._end[event]
        edges: dict[int, Rows] = {}
        for atom in {offset // self.atom, (end - 1) // self.atom}:
            begin = atom * self.atom
            if begin >= offset and begin + self.atom <= end:
                continue
            sectors = slice(atom * self.per_atom, (atom + 1) * self.per_atom)
            rows = self._newest[sectors].copy()
            for i in range(self.per_atom):
                low, high = max(offset, begin + i * SECTOR), min(end, begin + (i + 1) * SECTOR)
                if low >= high:
                    continue
                if high - low == SECTOR:
                    whole = self.kind[event] == Kind.WRITE
                    rows[i] = int(self._row[event]) + low // SECTOR - self.first[event] if whole else 0
                    continue
                content = self.take(rows[i : i + 1])[0].copy()
                inner = low - begin - i * SECTOR
                if self.kind[event] == Kind.WRITE:
                    view = np.frombuffer(self.trace.payload(self.trace.events[event]), dtype=np.uint8)
                    content[inner : inner + high - low] = view[low - offset : high - offset]
                else:
                    content[inner : inner + high - low] = 0
                self._composed.append(content)
                rows[i] = len(self.trace.rows) + len(self._composed) - 1
            edges[atom] = rows
        return edges

    def settle_rest(self) -> None:
        super().settle_rest()
        self._forget()

    def advance(self, position: int) -> None:
        super().advance(position)
        self._forget()

    def settle_all(self) -> None:
        """Let nothing be in flight: the durable contents are the only ones."""
        self.in_flight, self.others = [], {}
        self._forget()

    @contextmanager
    def settled_as(self, atoms: Rows, rows: Rows) -> Iterator[None]:
        """For a while nothing is in flight, and `atoms` durably hold `rows` (shape (n, sectors per atom))."""
        before = self.in_flight, self.others
        sectors = atoms[:, None] * self.per_atom + np.arange(self.per_atom)
        was = self.rows[sectors]
        self.rows[sectors] = rows
        self.settle_all()
        try:
            yield
        finally:
            self.in_flight, self.others = before
            self.rows[sectors] = was
            self._forget()

    def _forget(self) -> None:
        self._in_flight = None
        self._choices.clear()
        self._reads.clear()

    def writes(self) -> bool:
        """Whether any event changes anything."""
        return bool(self.events)

    # What may be read

    def take(self, rows: Rows) -> Bytes:
        """The contents of `rows`, shape (n, 512)."""
        if not self._composed:
            return self.trace.rows.take(rows, axis=0)
        count = len(self.trace.rows)
        beyond = rows >= count
        out = self.trace.rows.take(np.where(beyond, 0, rows), axis=0)
        for i in np.flatnonzero(beyond).tolist():
            out[i] = self._composed[int(rows[i]) - count]
        return out

    def in_flight_atoms(self) -> InFlight:
        """All that may have changed, atom by atom."""
        if self._in_flight is None:
            index = np.array(self.in_flight, dtype=np.int64)
            which, atom = spread(self._first[index] // self.per_atom, -(-self._last[index] // self.per_atom))
            sectors = atom[:, None] * self.per_atom + np.arange(self.per_atom)
            row = self._atoms_of(index, which, sectors)
            if self.overtaking:
                kept = np.zeros(len(atom), dtype=np.bool_)
                for number, event in enumerate(self.in_flight):
                    mine = which == number
                    over = self.overtaken(event, sectors[mine].reshape(-1)).reshape(-1, self.per_atom)
                    kept[mine] = ~over.all(axis=1)
                which, atom, row = which[kept], atom[kept], row[kept]
            atoms, events, rows = [atom], [index[which]], [row]
            if self.others:  # durable, and may have been overwritten by a rival that ran at the same time
                for sector, rivals in sorted(self.others.items()):
                    inside = slice(sector - sector % self.per_atom, sector - sector % self.per_atom + self.per_atom)
                    for event in rivals:
                        row = self.rows[inside].copy()
                        only = np.array([event]), np.array([0]), np.array([sector])
                        row[sector % self.per_atom] = self._rows_of(*only)[0]
                        atoms.append(np.array([sector // self.per_atom]))
                        events.append(np.array([event]))
                        rows.append(row.reshape(1, -1))
            if self.options.torn != "old-or-new":
                self._tear(atoms, events, rows)
            atom = np.concatenate(atoms)
            order = np.argsort(atom, kind="stable")
            self._in_flight = InFlight(atom[order], np.concatenate(events)[order], np.concatenate(rows)[order])
        return self._in_flight

    def _atoms_of(self, events: Rows, which: Rows, sectors: Rows) -> Rows:
        """The rows of whole atoms, of which `sectors` are the sectors, shape (n, sectors per atom), as the event of
        number `which[i]` leaves them if nothing else in flight survives."""
        if self.per_atom == 1:
            return self._rows_of(events, which, sectors[:, 0])[:, None]
        rows: Rows = self.rows[sectors]
        covered = (self._first[events][which, None] <= sectors) & (sectors < self._last[events][which, None])
        rows[covered] = self._rows_of(events, which[np.nonzero(covered)[0]], sectors[covered])
        for number in [i for i, event in enumerate(events.tolist()) if event in self._edges]:
            for atom, edge in self._edges[int(events[number])].items():
                rows[(which == number) & (sectors[:, 0] == atom * self.per_atom)] = edge
        return rows

    def _tear(self, atoms: list[Rows], events: list[Rows], rows: list[Rows]) -> None:
        """Every atom in flight may also be zeros, or garbage."""
        atom = np.unique(np.concatenate(atoms))
        row, event = 0, ZEROED
        if self.options.torn == "garbage":
            if self._garbage is None:
                drawn = np.random.default_rng(0).integers(1, 256, SECTOR, dtype=np.uint8)  # the same in every process
                self._composed.append(drawn)
                self._garbage = len(self.trace.rows) + len(self._composed) - 1
            row, event = self._garbage, SCRAMBLED
        atoms.append(atom)
        events.append(np.full(len(atom), event))
        rows.append(np.full((len(atom), self.per_atom), row))

    def layers(self, choice: Choice) -> list[tuple[int, int]]:
        """Each event on the atom of `choice`, in the order of issue, with the number of the content that it leaves."""
        flight = self.in_flight_atoms()
        low, high = np.searchsorted(flight.atom, (choice.atom, choice.atom + 1))
        numbers = {content.tobytes(): number for number, content in enumerate(choice.contents)}
        contents = self.take(flight.rows[low:high].reshape(-1)).reshape(high - low, self.atom)
        return [
            (int(event), numbers[content.tobytes()])
            for event, content in zip(flight.event[low:high], contents, strict=True)
        ]

    def durable(self, first: int, last: int) -> Bytes:
        """The durable content of atoms first..last-1, as one run of bytes. Not to be written to."""
        key = (first, last)
        content = self._reads.get(key)
        if content is None:
            inside = self.rows[first * self.per_atom : min(last * self.per_atom, self.sectors)]
            content = self.take(inside).reshape(-1)
            missing = (last - first) * self.atom - len(content)
            if missing:
                content = np.concatenate([content, np.zeros(missing, dtype=np.uint8)])
            self._reads[key] = content
        return content

    def quiet(self, first: Rows, last: Rows) -> NDArray[np.bool_]:
        """In which of the ranges of atoms `first[i]` to `last[i] - 1` nothing is in flight."""
        atoms = self.in_flight_atoms().atom
        return np.asarray(np.searchsorted(atoms, first) == np.searchsorted(atoms, last))

    def choices(self, first: int, last: int) -> list[Choice]:
        """The atoms among first..last-1 that may hold several distinct contents, ascending."""
        key = (first, last)
        found = self._choices.get(key)
        if found is None:
            found = self._choices[key] = self._distinct(first, last)
        return found

    def _distinct(self, first: int, last: int) -> list[Choice]:
        flight = self.in_flight_atoms()
        low, high = np.searchsorted(flight.atom, (first, last))
        if low == high:
            return []
        atom = flight.atom[low:high]
        contents = self.take(flight.rows[low:high].reshape(-1)).reshape(-1, self.atom)
        durable = self.durable(first, last).reshape(-1, self.atom)
        differ = (contents.view(np.uint64) != durable.view(np.uint64)[atom - first]).any(axis=1)
        found: list[Choice] = []
        entries = np.flatnonzero(differ).tolist()
        numbers = atom[differ].tolist()
        place = 0
        while place < len(entries):
            number = numbers[place]
            distinct = {durable[number - first].tobytes(): int(self.writer[number * self.per_atom]) - 1}
            while place < len(entries) and numbers[place] == number:
                distinct.setdefault(contents[entries[place]].tobytes(), int(flight.event[low + entries[place]]))
                place += 1
            stacked = np.frombuffer(b"".join(distinct), dtype=np.uint8).reshape(len(distinct), self.atom)
            found.append(Choice(number, stacked, tuple(distinct.values())))
        return found

    def candidates(self, sectors: Rows, tokens: Tokens) -> tuple[Rows, Rows, Rows]:
        """Everything that `sectors` may hold: (index into sectors, operation, stamped sector), the durable content
        of every sector first."""
        rows = [self.rows[sectors]]
        index = [np.arange(len(sectors))]
        flight = self.in_flight_atoms()
        if len(flight.atom):
            atoms = sectors // self.per_atom
            low = np.searchsorted(flight.atom, atoms)
            count = np.searchsorted(flight.atom, atoms, side="right") - low
            hit = np.flatnonzero(count)
            if len(hit):
                times = count[hit]
                again = np.repeat(hit, times)
                entry = np.repeat(low[hit] - (np.cumsum(times) - times), times) + np.arange(len(again))
                rows.append(flight.rows[entry, sectors[again] % self.per_atom])
                index.append(again)
        op, stamped = tokens.of(np.concatenate(rows))
        return np.concatenate(index), op, stamped

    def undecided(self) -> Rows:
        """How many distinct contents each atom has that has more than one."""
        flight = self.in_flight_atoms()
        durable = self.rows[flight.atom[:, None] * self.per_atom + np.arange(self.per_atom)]
        unequal = self._unequal(flight.rows.reshape(-1), durable.reshape(-1))
        differ = unequal.reshape(-1, self.per_atom).any(axis=1)
        atoms, counts = np.unique(flight.atom[differ], return_counts=True)
        counts = counts + 1
        for i in np.flatnonzero(counts > 2).tolist():
            choices = self._distinct(int(atoms[i]), int(atoms[i]) + 1)
            counts[i] = len(choices[0].contents)
        return counts

    def _unequal(self, left: Rows, right: Rows) -> NDArray[np.bool_]:
        """Where two rows differ. Most do in their first bytes, and are read no further."""
        unequal: NDArray[np.bool_] = self._beginning(left) != self._beginning(right)
        alike = np.flatnonzero(~unequal & (left != right))
        for begin in range(0, len(alike), _AT_ONCE):
            part = alike[begin : begin + _AT_ONCE]
            ours, theirs = self.take(left[part]).view(np.uint64), self.take(right[part]).view(np.uint64)
            unequal[part] = (ours != theirs).any(axis=1)
        return unequal

    def _beginning(self, rows: Rows) -> NDArray[np.uint64]:
        """The first eight bytes of `rows`."""
        words = self.trace.rows.view(np.uint64)[:, 0]
        if not self._composed:
            return words[rows]
        beyond = rows >= len(words)
        out = words[np.where(beyond, 0, rows)]
        out[beyond] = self.take(rows[beyond]).view(np.uint64)[:, 0]
        return out
