"""The smallest set of lost atoms (of several files: also of sizes and names) that still breaks the rule.

The search decides only what a check reads, and everything else is lost. A developer asks the other question: which
writes must be lost for this to happen, if all others survive? So the finding is tried again with every in-flight
write done but those that the decisions lost, and then with fewer of them. What is then left was lost too early for
something that survived: that is looked for in the same way.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import comb
from typing import TypeVar

import numpy as np

from powercut.crash.contents import Choice, Contents, Rows
from powercut.crash.fileset import FileSet
from powercut.crash.search import Decision, Policy

_SETS = 64  # of one size that are all tried
_TRIES = 400  # states of several files that are judged for one finding
Item = TypeVar("Item")


def fewest(items: Sequence[Item], breaks: Callable[[Sequence[Item]], bool]) -> list[Item]:
    """The fewest of `items` with which it still breaks, as it does with all of them: where few sets have that size, no
    smaller one does; else none of them can be left out."""
    for size in range(len(items)):
        if comb(len(items), size) > _SETS:
            break
        for some in itertools.combinations(items, size):
            if breaks(some):
                return list(some)
    left = list(items)
    size = max(1, len(left) // 2)
    while size:
        end = len(left)
        while end > 0:
            without = left[: max(0, end - size)] + left[end:]
            if len(without) < len(left) and breaks(without):
                left = without
            end = min(end - size, len(left))
        size //= 2
    return left


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
    return np.array(fewest(lost.tolist(), lambda some: tried(np.array(some, dtype=np.int64))), dtype=np.int64)


Question = tuple[int, int]  # a disk's number, an atom


@dataclass(frozen=True, slots=True)
class Reduced:
    """A broken state of several files in which as little as possible was lost, and all else survived: `lost` says what
    was, `needs` what of the rest has to have survived for it to break. `policy` makes the state."""

    lost: tuple[Decision, ...]
    needs: tuple[Decision, ...]
    policy: Policy


def reduced(
    files: FileSet, found: Mapping[Question, int], breaks: Callable[[Policy], list[Decision] | None]
) -> Reduced | None:
    """Reduce the state with the answers `found`. `breaks` judges a state: what was asked for that, if it broke as it
    should. None if not even the first state does."""
    tries = 0

    def state(known: Mapping[Question, int], kept: set[Question] | None = None) -> Policy:
        """The answers `known`; of the rest those `kept` (None: all) survived."""

        def answer(disk: int, choice: Choice) -> int:
            question = disk, choice.atom
            if question in known:
                return known[question]
            return files.newest(disk, choice) if kept is None or question in kept else 0

        return answer

    def tried(policy: Policy) -> bool:
        nonlocal tries
        tries += 1
        return tries <= _TRIES and breaks(policy) is not None

    def answers(decisions: Sequence[Decision]) -> dict[Question, int]:
        return {(d.disk, d.choice.atom): d.chosen for d in decisions}

    path = breaks(state(found))
    if path is None:
        return None
    old = [d for d in path if d.chosen != files.newest(d.disk, d.choice)]
    lost = fewest(old, lambda some: tried(state(answers(some))))
    known = answers(lost)
    survived = [d for d in breaks(state(known)) or [] if d.chosen and (d.disk, d.choice.atom) not in known]
    needs = fewest(survived, lambda some: tried(state(known, set(answers(some)))))
    return Reduced(tuple(lost), tuple(needs), state(known))
