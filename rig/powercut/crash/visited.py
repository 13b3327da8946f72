"""States inside recoveries that were looked at already: same content, same future.

A crash that loses all that a recovery did is the state it began with; one that loses nothing of its first half is
where the second begins. What a program does on a state, and every crash inside that, follows from the bytes of the
state. So a state is known by what its bytes are, or may be, where they differ from the crash disk below all recoveries,
and by what is decided of that disk.
"""

from __future__ import annotations

import numpy as np
import xxhash

from powercut.crash.contents import Rows
from powercut.crash.disk import CrashDisk, Deciding
from powercut.crash.recovery import RecoveredDisk
from powercut.disk import Bytes

_MOST = 32768  # sectors that recoveries wrote to: a state with more of them is not remembered
Decided = frozenset[tuple[int, int, int]]  # disk, atom, content


class Visited:
    """The states of one epoch that were looked at, on the crash disk `below`, and how deep."""

    def __init__(self, below: CrashDisk) -> None:
        self.below = below
        self._known: dict[bytes, list[tuple[Decided, int]]] = {}

    def again(self, disk: Deciding, depth: int) -> bool:
        """Whether all that `disk` may be by now was, or is being, looked at before, at least `depth` deep. If not,
        it is remembered: whoever asks looks at it now, all of it."""
        if self.below.contents.options.narrow:  # what a sector holds then depends on others
            return False
        levels: list[RecoveredDisk] = []
        while isinstance(disk, RecoveredDisk):
            levels.insert(0, disk)
            disk = disk.below
        own = {level.level for level in levels}
        path = self.below.search.path
        decided = frozenset((d.disk, d.choice.atom, d.chosen) for d in path if d.disk not in own)
        try:
            differs = _differences(self.below, levels)
        except OSError:  # a sector that cannot be read
            return False
        if differs is None:
            return False
        known = self._known.setdefault(differs, [])
        if any(before <= decided and deep >= depth for before, deep in known):
            return True
        known.append((decided, depth))
        return False


def _differences(below: CrashDisk, levels: list[RecoveredDisk]) -> bytes | None:
    """A digest of how the state on top of `levels` differs from `below`; None: in too many places."""
    ranges = {touched for level in levels for touched in level.contents.touched}
    if sum(end - begin for begin, end in ranges) > _MOST:
        return None
    sectors = np.unique(np.concatenate([np.zeros(0, dtype=np.int64), *(np.arange(*touched) for touched in ranges)]))
    before, was_open = below.known(sectors)
    now, is_open = before.copy(), was_open.copy()  # open: as below, which is not decided
    places: Rows = np.zeros(0, dtype=np.int64)  # of sectors that may hold something else than `now`:
    others: Bytes = np.zeros((0, now.shape[1]), dtype=np.uint8)
    for level in levels:
        written, flight = level.contents, level.contents.in_flight_atoms()
        lasting = written.writer[sectors] > 0
        now[lasting] = written.take(written.rows[sectors[lasting]])
        here = np.searchsorted(sectors, flight.atom)
        fixed, unread = lasting, np.ones(len(here), dtype=np.bool_)
        for decision in level.search.path:
            if decision.disk == level.level:
                place = int(np.searchsorted(sectors, decision.choice.atom))
                now[place], fixed[place] = decision.choice.contents[decision.chosen], True
                unread &= here != place
        kept = ~fixed[places]
        is_open &= ~fixed
        places = np.concatenate([places[kept], here[unread]])
        others = np.concatenate([others[kept], written.take(flight.rows.reshape(-1))[unread]])
    differs = np.where(was_open, ~is_open, (now != before).any(axis=1))
    matters = is_open[places] | (others != now[places]).any(axis=1)
    places, others = places[matters], others[matters]
    order = np.argsort(places, kind="stable")
    digest = xxhash.xxh3_128()
    for part in (sectors[differs], now[differs], sectors[places[order]], others[order]):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part.tobytes())
    return digest.digest()
