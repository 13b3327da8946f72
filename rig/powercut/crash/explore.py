"""The search: every epoch of a trace, each exhausted or said to be not.

An epoch's search runs a judge on a crash disk until every answer was given. Once it has met a broken rule it goes
on only for another `MORE` runs of the whole check, to see which other rules break (up to `ENOUGH` findings for each):
the verdict is BROKEN whatever follows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from powercut.crash.contents import Contents
from powercut.crash.disk import CrashDisk
from powercut.crash.media import Fault
from powercut.crash.promise import Promise
from powercut.crash.search import BudgetSpent, Search
from powercut.errors import Nondeterministic
from powercut.verdict import Problem

ENOUGH = 3
MORE = 64
SPENT = "budget spent"


@dataclass(frozen=True, slots=True)
class Chosen:
    """One decision of a finding: the atom at byte `offset` was left as `event` (an index; -1: initial content)
    left it, one of `contents` distinct contents; `durable` says it is what would be there if nothing in flight
    had survived."""

    offset: int
    event: int
    contents: int
    durable: bool


@dataclass(frozen=True, slots=True)
class Found:
    """A broken rule: a crash before `position`, the decisions that matter, and what is wrong then; `fault`: what the
    medium did besides."""

    position: int
    problem: Problem
    decisions: tuple[Chosen, ...]
    patches: tuple[tuple[int, bytes], ...] = ()
    fault: Fault | None = None


@dataclass(slots=True)
class EpochResult:
    """What the search says of one epoch."""

    index: int
    position: int
    checks: int = 0
    exhausted: bool = False
    undecided_atoms: int = 0
    log2_states: float = 0.0
    found: list[Found] = field(default_factory=list)
    unknown: str | None = None  # why nothing certain can be said, if so


class Report(Protocol):
    """Takes a broken rule. `patches` are (byte offset, content) of what a recovery wrote over the crash state."""

    def __call__(self, problem: Problem, patches: Sequence[tuple[int, bytes]] = ()) -> None: ...


class Judge(Protocol):
    """A format's check of one crash state. Reports every broken rule it sees; splits itself by `disk.explore`."""

    def __call__(self, disk: CrashDisk, report: Report, enough: Callable[[str], bool]) -> None: ...


class Unjudged(Exception):
    """A judge's word that it cannot tell: the epoch is then unknown, for the reason given."""


class _Stop(Exception):
    """Enough was found in this epoch."""


def explore_epoch(
    index: int, contents: Contents, judge: Judge, *, sets: bool = True, budget: int | None = None
) -> EpochResult:
    """Exhaust the epoch that ends at the current position of `contents`, in at most `budget` checks."""
    result = EpochResult(index, contents.position)
    counts = contents.undecided()
    result.undecided_atoms = len(counts)
    result.log2_states = float(np.log2(counts).sum())
    search = Search(budget)
    disk = CrashDisk(contents, search, sets=sets)
    seen: dict[tuple[str, str, int], Found] = {}
    rules: Counter[str] = Counter()

    def report(problem: Problem, patches: Sequence[tuple[int, bytes]] = ()) -> None:
        if problem.key in seen or rules[problem.rule] >= ENOUGH:
            return
        rules[problem.rule] += 1
        size = contents.atom
        decisions = tuple(
            Chosen(d.choice.atom * size, d.event, len(d.choice.contents), d.chosen == 0)
            for d in search.path
            if d.disk == 0
        )
        seen[problem.key] = Found(contents.position, problem, decisions, tuple(patches))

    more = MORE

    def whole() -> None:
        nonlocal more
        judge(disk, report, lambda rule: rules[rule] >= ENOUGH)
        more -= bool(seen)
        if more == 0:
            raise _Stop

    try:
        search.explore(whole)
        result.exhausted = not seen  # with a finding, judging was cut short
    except _Stop:
        pass
    except BudgetSpent:
        result.unknown = SPENT
    except (Nondeterministic, Unjudged) as error:
        result.unknown = str(error)
    result.checks = search.checks
    result.found = list(seen.values())
    return result


def explore(
    contents: Contents,
    promise: Promise | None,
    judge: Judge,
    epochs: Iterable[tuple[int, int, int | None]],
    *,
    sets: bool = True,
) -> Iterable[EpochResult]:
    """Explore (index, position, budget) of `epochs`, which ascend."""
    for index, position, budget in epochs:
        contents.advance(position)
        if promise is not None:
            promise.advance(position)
        yield explore_epoch(index, contents, judge, sets=sets, budget=budget)
