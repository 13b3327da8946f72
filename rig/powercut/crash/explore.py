"""The search: every epoch of a trace, each exhausted or said to be not.

An epoch's search runs a judge on a crash disk until every answer was given. Once it has met a broken rule it goes
on only for another `MORE` runs of the whole check, to see which other rules break (up to `ENOUGH` findings for each):
the verdict is BROKEN whatever follows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import numpy as np

from powercut.crash.contents import Contents
from powercut.crash.disk import CrashDisk
from powercut.crash.media import Fault
from powercut.crash.promise import Promise
from powercut.crash.sample import look
from powercut.crash.search import BudgetSpent, Decision, Search
from powercut.crash.survival import OF_WRITES, log2_states
from powercut.errors import Nondeterministic
from powercut.trace import SECTOR
from powercut.verdict import Problem

ENOUGH = 3
MORE = 64
SPENT = "budget spent"


@dataclass(frozen=True, slots=True)
class Chosen:
    """One decision of a finding: the atom at byte `offset` was left as `event` (an index; -1: initial content)
    left it, one of `contents` distinct contents; `durable` says it is what would be there if nothing in flight
    had survived. `whole`: it is the whole write that was left or lost."""

    offset: int
    event: int
    contents: int
    durable: bool
    whole: bool = False


@dataclass(frozen=True, slots=True)
class Found:
    """A broken rule: a crash before `position`, the decisions that matter, and what is wrong then; `fault`: what the
    medium did besides."""

    position: int
    problem: Problem
    decisions: tuple[Chosen, ...]
    patches: tuple[tuple[int, bytes], ...] = ()
    fault: Fault | None = None


class Broken(Protocol):
    """A finding, of an image or of several files."""

    @property
    def problem(self) -> Problem: ...


AnyFound = TypeVar("AnyFound", bound=Broken)


@dataclass(slots=True)
class Searched(Generic[AnyFound]):
    """What the search says of one epoch."""

    index: int
    position: int
    checks: int = 0
    exhausted: bool = False
    undecided_atoms: int = 0  # of several files: sizes and changes of names too
    log2_states: float = 0.0
    found: list[AnyFound] = field(default_factory=list)
    unknown: str | None = None  # why nothing certain can be said, if so
    runs: int = 0  # of a program that judged
    events: int = 0  # in flight, where states were sampled
    sampled: dict[str, int] = field(default_factory=dict)  # states looked at, by the way they were chosen

    def add(self, sample: Searched[AnyFound]) -> None:
        """Count a sample of the same epoch in."""
        self.checks += sample.checks
        self.runs += sample.runs
        self.events, self.sampled = sample.events, sample.sampled
        known = {found.problem.key for found in self.found}
        self.found += [found for found in sample.found if found.problem.key not in known]
        if sample.unknown not in (None, SPENT):
            self.unknown = sample.unknown


@dataclass(slots=True)
class EpochResult(Searched[Found]):
    """The same of one image."""


@dataclass(frozen=True, slots=True)
class Task:
    """An epoch to search: exhaustively in at most `budget` checks, or by a sample of so many."""

    index: int
    position: int
    budget: int | None
    sampled: bool = False


class Report(Protocol):
    """Takes a broken rule. `patches` are (byte offset, content) of what a recovery wrote over the crash state."""

    def __call__(self, problem: Problem, patches: Sequence[tuple[int, bytes]] = ()) -> None: ...


class Judge(Protocol):
    """A format's check of one crash state. Reports every broken rule it sees; splits itself by `disk.explore`."""

    def __call__(self, disk: CrashDisk, report: Report, enough: Callable[[str], bool]) -> None: ...


class Unjudged(Exception):
    """A judge's word that it cannot tell: the epoch is then unknown, for the reason given."""


class Enough(Exception):
    """Enough was found in this epoch."""


def extent(contents: Contents) -> tuple[int, float]:
    """How much is undecided: atoms, or writes where those are decided as a whole; and how many states that makes, as a
    power of two."""
    if not contents.options.narrow:
        counts = contents.undecided()
        return len(counts), float(np.log2(counts).sum())
    events, atoms = np.unique(contents.in_flight_atoms().event, return_counts=True)
    sizes = dict(zip(events.tolist(), atoms.tolist(), strict=True))
    return len(contents.in_flight), log2_states(contents.options, sizes, contents.in_flight)


def told(decision: Decision, contents: Contents) -> Iterator[Chosen]:
    """What a decision of the search says of the image."""
    alternatives, lost = len(decision.choice.contents), decision.chosen == 0
    if decision.disk == 0:
        yield Chosen(decision.choice.atom * contents.atom, decision.event, alternatives, lost)
    elif decision.disk == OF_WRITES:
        event = decision.choice.atom
        events = decision.choice.events[1 : decision.chosen + 1] if event < 0 else (event,)
        for each in events:
            yield Chosen(contents.first[each] * SECTOR, each, alternatives, lost, True)


class _Visit:
    """One epoch being searched: what was found so far, and when that is enough."""

    def __init__(self, index: int, contents: Contents, judge: Judge, sets: bool, budget: int | None) -> None:
        self.result = EpochResult(index, contents.position)
        self.result.undecided_atoms, self.result.log2_states = extent(contents)
        self.search = Search(budget)
        self._contents = contents
        self._judge = judge
        self._disk = CrashDisk(contents, self.search, sets=sets)
        self._seen: dict[tuple[str, str, int], Found] = {}
        self._rules: Counter[str] = Counter()
        self._more = MORE

    def _report(self, problem: Problem, patches: Sequence[tuple[int, bytes]] = ()) -> None:
        if problem.key in self._seen or self._rules[problem.rule] >= ENOUGH:
            return
        self._rules[problem.rule] += 1
        decisions = tuple(chosen for d in self.search.path for chosen in told(d, self._contents))
        self._seen[problem.key] = Found(self._contents.position, problem, decisions, tuple(patches))

    def whole(self) -> None:
        """One run of the whole check."""
        self._judge(self._disk, self._report, lambda rule: self._rules[rule] >= ENOUGH)
        self._more -= bool(self._seen)
        if self._more == 0:
            raise Enough

    def ended(self, run: Callable[[], None]) -> EpochResult:
        """Let `run` search, and say what came of it."""
        result = self.result
        try:
            run()
            result.exhausted = not self._seen  # with a finding, judging was cut short
        except Enough:
            pass
        except BudgetSpent:
            result.unknown = SPENT
        except (Nondeterministic, Unjudged) as error:
            result.unknown = str(error)
        result.checks = self.search.checks
        result.found = list(self._seen.values())
        return result


def explore_epoch(
    index: int, contents: Contents, judge: Judge, *, sets: bool = True, budget: int | None = None
) -> EpochResult:
    """Exhaust the epoch that ends at the current position of `contents`, in at most `budget` checks."""
    visit = _Visit(index, contents, judge, sets, budget)
    return visit.ended(lambda: visit.search.explore(visit.whole))


def sample_epoch(
    index: int, contents: Contents, judge: Judge, *, sets: bool = True, budget: int, seed: int
) -> EpochResult:
    """Look at single states of that epoch (`powercut.crash.sample`), in at most `budget` checks."""
    visit = _Visit(index, contents, judge, sets, budget)
    flight = contents.in_flight_atoms().event
    issued = np.unique(flight[flight >= 0]).tolist()

    def run() -> None:
        for way in look(visit.search, visit.whole, issued, seed):
            visit.result.sampled[way] = visit.result.sampled.get(way, 0) + 1

    visit.result.events = len(issued)
    return visit.ended(run)


def explore(
    contents: Contents,
    promise: Promise | None,
    judge: Judge,
    tasks: Iterable[Task],
    *,
    sets: bool = True,
    seed: int = 1,
) -> Iterable[EpochResult]:
    """Explore the epochs of `tasks`, which ascend."""
    for task in tasks:
        contents.advance(task.position)
        if promise is not None:
            promise.advance(task.position)
        if task.sampled and task.budget is not None:
            yield sample_epoch(task.index, contents, judge, sets=sets, budget=task.budget, seed=seed + task.index)
        else:
            yield explore_epoch(task.index, contents, judge, sets=sets, budget=task.budget)
