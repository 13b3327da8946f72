"""The smallest set of lost atoms that still breaks the rule.

The search decides only what a check reads, and everything else is lost. A developer asks the other question: which
writes must be lost for this to happen, if all others survive? So the finding is tried again with every in-flight
write done but those that the decisions lost, and then with one lost atom less at a time.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from powercut.crash.contents import Contents, Rows


def newest(contents: Contents) -> tuple[Rows, Rows]:
    """The atoms in flight, and the rows each would have if nothing were lost."""
    flight = contents.in_flight_atoms()
    live = np.isin(flight.event, contents.in_flight)
    atoms, rows = flight.atom[live], flight.rows[live]
    last = np.append(np.flatnonzero(np.diff(atoms)), len(atoms) - 1) if len(atoms) else atoms
    return atoms[last], rows[last]


def lost_atoms(contents: Contents, lost: Rows, breaks: Callable[[], bool]) -> Rows | None:
    """The fewest of the atoms `lost` without which the rest of what is in flight leaves a state that `breaks`,
    found by leaving out one at a time; None if even all of them do not."""
    atoms, rows = newest(contents)

    def tried(candidate: Rows) -> bool:
        kept = ~np.isin(atoms, candidate)
        with contents.settled_as(atoms[kept], rows[kept]):
            return breaks()

    if not tried(lost):
        return None
    for atom in lost.tolist():
        fewer = lost[lost != atom]
        if tried(fewer):
            lost = fewer
    return lost
