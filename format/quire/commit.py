"""How what was written becomes durable: commits, checkpoints, and what happens when the disk fails. See SPEC.md's
crash section; each step here is a row there.

`states` is what the leaf reads as now; `_committed` is what its synced records say. What differs is pending.

A commit is one sync if a C record has room for it: the record carries checksums of the data that the same sync makes
durable. Until something follows it, whoever opens the leaf verifies it; so the homes of its data must not change
before an M follows. `unproven` says which homes these are, and `prove` writes the M.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Iterable, Iterator

from quire.errors import ReadOnly
from quire.identity import Identity
from quire.journal import Journal, Record, Run
from quire.layout import (
    BLOCK,
    CHECKED_RECORDS,
    DATA,
    DROPPED,
    MAX_CHECKED,
    MAX_ENTRIES,
    MAX_VERIFIED,
    ZERO,
    C,
    M,
    P,
    R,
    checksum,
)
from quire.pages import MapPages
from quire.states import States, pages_of
from quire.store import File

_CROWDED = 16384  # pending ranges, after which a flush is due to keep memory bounded
_STEP = 1 << 20  # blocks looked at once; no entry is longer


class Commit:
    """The writing half of a leaf. `begin` makes it writable, `change` notes a pending state, `flush` commits."""

    def __init__(self, file: File, identity: Identity, journal: Journal, found: MapPages) -> None:
        self.file = file
        self.identity = identity
        self.place = identity.geometry
        self.journal = journal
        self.lock = threading.RLock()
        self.commit_lock = threading.RLock()
        self.states = States(self.place.map_pages)
        self.writes = 0  # how many writes there were
        self.punches: list[tuple[int, int]] = []  # blocks to punch once it is durable that they are zero
        self._committed = self.states
        self._pages = found
        self._dirty: set[int] = set()  # map pages that records behind the checkpoint change
        self._touched: list[tuple[int, int]] = []  # where something may be pending
        self._synced = 0  # `writes` when the last successful sync began
        self._stopped: str | None = "opened for reading"  # why nothing may be written
        self._checked = False  # whether C records may be written
        self._unproven: set[int] = set()  # blocks of data in a C that is the tail, or about to be
        self._dropped: list[Run] = []  # entries of the tail that had not reached the disk when it was opened

    # ---- opening

    def replay(self, states: States, chain: list[Record]) -> None:
        """Apply the records behind the checkpoint to what the map says. A C that is the tail is verified."""
        self.states = self._committed = states
        for record, following in itertools.zip_longest(chain, chain[1:]):
            if record.kind == C:
                dropped = following.entries if following else self._verified(record)
                gone = {entry[:2] for entry in dropped} if following is None or following.kind == R else set()
                self._apply(entry for entry in record.entries if entry[:2] not in gone)
            elif record.kind != R:
                self._apply(record.entries)

    def _verified(self, record: Record) -> list[Run]:
        """The entries of a C whose data is not what it says: they never became durable, nor were acknowledged."""
        found = zip(record.entries, record.checks, self._checks(record.entries), strict=True)
        self._dropped = [(start, count, DROPPED) for (start, count, _), said, seen in found if said != seen]
        return self._dropped

    def _checks(self, entries: list[Run]) -> list[int]:
        """What a C says of its entries' data."""
        return [
            checksum(self.file.read(start * BLOCK, count * BLOCK)) if state == DATA else 0
            for start, count, state in entries
        ]

    def begin(self, features: int) -> None:
        """From now on the leaf may be written to."""
        self._checked = bool(features & CHECKED_RECORDS)
        used = {*self._dirty, *self._pages.generations.nonzero()[0].tolist()}
        self._committed = States(self.place.map_pages)
        for number in used:
            self._committed.set_page(number, self.states.page(number))
        self._stopped = None

    def resolve(self) -> None:
        """Say that the chain ends here, without what was dropped: nothing behind it can ever continue it."""
        with self._no_way_back():
            self._append(R, [self._dropped])

    # ---- what is pending

    def admit(self) -> None:
        """Raises ReadOnly if nothing may be written."""
        if self._stopped is not None:
            raise ReadOnly(self.file.name, self._stopped)

    def change(self, start: int, count: int, state: int) -> None:
        """Blocks have a new state from now on; it is durable after the next flush."""
        self.states.fill(start, count, state)
        if self._touched and sum(self._touched[-1]) == start:
            start, count = self._touched[-1][0], self._touched.pop()[1] + count
        self._touched.append((start, count))

    @property
    def crowded(self) -> bool:
        """Whether so much is pending that a flush is due."""
        return len(self._touched) >= _CROWDED

    def _pending(self) -> list[Run]:
        """What differs from what is committed. Forgets where it was; the caller holds `lock`."""
        touched, self._touched = sorted(self._touched), []
        found: list[Run] = []
        done = 0
        for begin, length in touched:
            for start in range(max(begin, done), begin + length, _STEP):
                for run, count, state in self.states.runs(start, min(_STEP, begin + length - start)):
                    found += [(s, n, state) for s, n, old in self._committed.runs(run, count) if old != state]
            done = max(done, begin + length)
        return _joined(found)

    # ---- committing

    def flush(self) -> None:
        """Make durable whatever was written before. Raises OSError; then nothing may be written any more."""
        wanted = self.writes
        with self.commit_lock:
            if self._synced >= wanted:  # a sync that began after those writes had returned covered them
                return
            self.admit()
            with self.lock:
                mark, pending = self.writes, self._pending()
                punches, self.punches = self.punches, []
                data = self._data(pending)
                self._unproven |= data or set()
            with self._no_way_back():
                if data is not None:
                    self._append(C, [pending], self._checks(pending))
                else:
                    self.file.sync()
                    self._write_pending(pending)
            self._synced = mark
            self._punch(punches)

    def unproven(self, first: int, last: int) -> bool:
        """Whether the home of any block from `first` to `last` must not change yet. The caller holds `lock`."""
        tail = self._unproven
        return bool(tail) and not tail.isdisjoint(range(first, last + 1))

    def prove(self) -> None:
        """Make it known on disk that the tail is durable. Waits for a commit that is in progress."""
        with self.commit_lock:
            if self._unproven:
                self.admit()
                with self._no_way_back():
                    self._append(M, [[]])

    def finish(self) -> None:
        """Flush, and prove the tail: nothing that was written can look like a crash any more."""
        with self.commit_lock:
            self.flush()
            if self.journal.kind != M:
                self.admit()
                with self._no_way_back():
                    self._append(M, [[]])

    def stop(self, why: str) -> None:
        """Nothing may be written any more."""
        self._stopped = why

    def close(self) -> None:
        """Finish, and close the file in any case. Raises ReadOnly if an error made that impossible and something that
        was written may be lost."""
        try:
            if self._stopped is None:
                self.finish()
            elif self.writes > self._synced:
                self.admit()
        finally:
            self._stopped = "closed"
            self.file.close()

    @contextlib.contextmanager
    def _no_way_back(self) -> Iterator[None]:
        """After an error in here nobody knows what is on the disk; trying again could hide that."""
        try:
            yield
        except BaseException as error:
            self._stopped = f"an error stopped all writing until it is opened again: {error}"
            raise

    def _data(self, pending: list[Run]) -> set[int] | None:
        """The blocks of data in `pending`; None if no C has room for it, or there is nothing."""
        blocks = sum(count for _, count, state in pending if state == DATA)
        if not self._checked or not 0 < len(pending) <= MAX_CHECKED or blocks > MAX_VERIFIED:
            return None
        return {block for start, count, state in pending if state == DATA for block in range(start, start + count)}

    def _write_pending(self, pending: list[Run]) -> None:
        records = [pending[i : i + MAX_ENTRIES] for i in range(0, len(pending), MAX_ENTRIES)]
        together = self.place.slots // 2
        for i in range(0, len(records), together):
            self._append(P, records[i : i + together])

    def _append(self, kind: int, records: list[list[Run]], checks: list[int] | None = None) -> None:
        """Write records, sync them, and only then count on them: what came before is proven."""
        if self.journal.last + len(records) - self._pages.checkpoint > self.place.slots:
            self._checkpoint()
        for entries in records:
            self.journal.write(kind, entries, checks or [])
        self.file.sync()
        self.journal.synced()
        with self.lock:
            self._unproven = set(self._data(records[0]) or ()) if kind == C else set()
            if kind in (P, C):
                for entries in records:
                    self._apply(entries)

    def _apply(self, entries: Iterable[Run]) -> None:
        for start, count, state in entries:
            self._committed.fill(start, count, state)
            self._dirty.update(pages_of(start, count))

    def _checkpoint(self) -> None:
        """Put what the journal says into the map, so that its slots may be used again."""
        self._pages.checkpoint, self._pages.previous = self.journal.last, self.journal.checksum
        self._pages.save(self.file, self.place, self.identity.leaf, self._committed, self._dirty)
        self._dirty.clear()

    def _punch(self, punches: list[tuple[int, int]]) -> None:
        """Give back the space of blocks that are still zero. What fails is only space."""
        with self.lock:
            for begin, length in punches:
                for start, count, state in list(self.states.runs(begin, length)):
                    if state == ZERO:
                        with contextlib.suppress(OSError):
                            self.file.punch(start * BLOCK, count * BLOCK)


def _joined(runs: list[Run]) -> list[Run]:
    """Neighbours of one state made one, as far as an entry may be long."""
    joined: list[Run] = []
    for start, count, state in runs:
        if joined and joined[-1][2] == state and sum(joined[-1][:2]) == start and joined[-1][1] + count <= _STEP:
            joined[-1] = (joined[-1][0], joined[-1][1] + count, state)
        else:
            joined.append((start, count, state))
    return joined
