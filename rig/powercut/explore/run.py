"""From a trace to an outcome: the search over all epochs, in rounds, and what it says."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from powercut import formats
from powercut.crash.explore import EpochResult, Found, Task
from powercut.crash.finding import Finding
from powercut.crash.media import draw
from powercut.crash.model import epochs
from powercut.crash.rounds import rounds
from powercut.crash.sample import Sampled, sampled
from powercut.errors import InputError
from powercut.explore.explain import explain, namer
from powercut.explore.journal import Journal
from powercut.explore.session import Plan, Session
from powercut.explore.workers import Workers, workers
from powercut.trace import Trace
from powercut.verdict import Severity, Verdict

_PER_GROUP = 3  # findings kept for each rule and kind
_FEW = 200  # epochs: fewer are not worth starting processes for

Progress = Callable[[int, int], None]  # epochs done, epochs in all


@dataclass(slots=True)
class Coverage:
    """How much of the state space was seen."""

    epochs: int = 0
    epochs_exhausted: int = 0
    undecided_atoms: int = 0
    log2_states: float = 0.0
    checks: int = 0
    runs: int = 0  # of a program as the checker: what is given the same bytes is not run again
    exhausted: bool = False
    faults: dict[str, Struck] = field(default_factory=dict)
    sampled: Sampled | None = None


@dataclass(slots=True)
class Struck:
    """What became of the media faults of one kind: `silent`, where acknowledged data was wrong in some state and
    nothing complained; `noticed`, where something always did; `harmless` otherwise."""

    laid: int = 0
    silent: int = 0
    noticed: int = 0

    @property
    def harmless(self) -> int:
        return self.laid - self.silent - self.noticed


@dataclass(slots=True)
class Outcome:
    """A verdict with what it rests on. `reasons` says why it is UNKNOWN, or what limits its scope."""

    verdict: Verdict
    plan: Plan
    scope: str
    coverage: Coverage
    findings: list[Finding] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)


class _Exploration:
    """One exploration under way. `interrupted`: it was cut short, and what is missing stays unknown."""

    def __init__(self, plan: Plan, trace: Trace, pool: Workers, journal: Journal | None, done: Progress) -> None:
        self._plan = plan
        self._trace = trace
        self._verified = False
        self._pool = pool
        self._journal = journal
        self._done = done
        self.visited: set[int] = set()
        self.interrupted = False

    def explore(self, tasks: list[Task]) -> list[EpochResult]:
        """The results of `tasks` that there are in the end, in their order."""
        known = self._journal.known if self._journal is not None else {}
        left = {task.index: task for task in tasks if task not in known}
        results = {task.index: known[task] for task in tasks if task in known}
        self._done(len(results), len(tasks))
        try:
            found = self._pool.explore(self._plan, list(left.values()))
            if not self._verified:  # while workers are at work already; nothing they say counts before
                self._trace.verify()
                self._verified = True
            for result in found:
                results[result.index] = result
                if self._journal is not None:
                    self._journal.put(left[result.index], result)
                self._done(len(results), len(tasks))
        except KeyboardInterrupt:
            self.interrupted = True
            self._pool.abandon()
        self.visited |= results.keys()
        return [results[task.index] for task in tasks if task.index in results]


def _positions(plan: Plan, trace: Trace) -> list[int]:
    """The crash positions to visit: the end of every epoch of the image and of its backing file, or where faults
    strike."""
    if plan.faults:
        return [fault.position for fault in plan.faults]
    files = filter(None, (trace.file("image"), trace.file("backing")))
    return sorted({position for file in files for position in epochs(trace, file.id)})


def with_faults(plan: Plan, kinds: Sequence[str], number: int, seed: int) -> Plan:
    """The plan, with `number` media faults of each of `kinds` drawn for its trace. Raises InputError."""
    if not kinds:
        return plan
    session = Session(plan)
    positions = epochs(session.trace, session.image.file)
    faults = draw(session.image, lambda: namer(session), positions, kinds, number, seed)
    return replace(plan, faults=tuple(faults))


def explore_trace(
    plan: Plan,
    *,
    budget: int | None = None,
    jobs: int | None = None,
    cluster: str | None = None,
    journal: Path | None = None,
    resume: bool = False,
    progress: Progress = lambda done, of: None,
) -> Outcome:
    """Explore a trace and judge it. `budget` bounds the number of checks, `jobs` the processes (default: all cores);
    `cluster` is the address of a Dask scheduler whose workers take their place. Results are kept in the file `journal`
    while it takes long, and taken over from there with `resume`. Ctrl-C ends it early, with what was found.

    Raises InputError if the trace cannot be used.
    """
    trace = Trace(plan.trace)
    image = trace.file("image")
    if image is None:
        raise InputError(f"{plan.trace}: has no image")
    formats.find(plan.format)
    kept = Journal(journal, plan, trace.hash, resume) if journal is not None else None
    ends = _positions(plan, trace)
    count = len(ends)
    slow = plan.checker is not None or bool(plan.faults)
    most = count if slow else -(-count // 64) if count >= _FEW else 1
    jobs = min(jobs or os.cpu_count() or 1, most)
    with workers(trace, jobs, cluster) as pool:
        exploration = _Exploration(plan, trace, pool, kept, progress)
        empty = [EpochResult(index, position) for index, position in enumerate(ends)]
        results = rounds(empty, budget, exploration.explore, lambda: exploration.interrupted)
    outcome = conclude(plan, trace, results)
    if exploration.interrupted:
        outcome.reasons.append(f"interrupted after {len(exploration.visited):,} of {count:,} epochs")
        if outcome.verdict is Verdict.HOLDS:
            outcome.verdict = Verdict.UNKNOWN
        if kept is not None:
            outcome.reasons.append("--resume goes on from there" if kept.keep() else str(kept.fault))
    elif kept is not None:
        kept.done()
    return outcome


def conclude(plan: Plan, trace: Trace, results: Sequence[EpochResult]) -> Outcome:
    """The verdict over all epochs."""
    coverage = Coverage(
        epochs=len(results),
        epochs_exhausted=sum(result.exhausted for result in results),
        undecided_atoms=sum(result.undecided_atoms for result in results),
        log2_states=sum(result.log2_states for result in results),
        checks=sum(result.checks for result in results),
        runs=sum(result.runs for result in results),
        exhausted=all(result.exhausted for result in results),
    )
    coverage.sampled = sampled(results, plan.seed)
    reasons = sorted({result.unknown for result in results if result.unknown})
    reasons += [str(why) for why in (trace.truncated, trace.meta.get("truncated")) if why]
    if "acknowledged" in plan.rules and trace.file("guest") is None and not plan.checker:
        reasons.append("rule acknowledged cannot be judged: the trace says nothing of what the guest wrote and flushed")
    found = [item for result in results for item in result.found]
    broken = bool(found)
    if plan.faults:
        coverage.faults = _struck(plan, results)
        broken = any(struck.silent for struck in coverage.faults.values())
        reasons.append(f"{len(plan.faults)} media faults are a sample")
    verdict = Verdict.BROKEN if broken else Verdict.UNKNOWN if reasons or not coverage.exhausted else Verdict.HOLDS
    scope = str(trace.meta.get("scope", "overlap"))
    return Outcome(verdict, plan, scope, coverage, _group(plan, trace, found), reasons)


def _struck(plan: Plan, results: Sequence[EpochResult]) -> dict[str, Struck]:
    faults: dict[str, Struck] = {}
    for result in results:
        struck = faults.setdefault(plan.faults[result.index].kind, Struck())
        worst = max((found.problem.severity for found in result.found), default=None)
        struck.laid += 1
        struck.silent += worst is Severity.SILENT
        struck.noticed += worst is not None and worst is not Severity.SILENT
    return faults


def _group(plan: Plan, trace: Trace, found: list[Found]) -> list[Finding]:
    """At most three findings of each rule and kind, the worst rule first, those with the fewest decisions first.

    What breaks a rule by the same writes, sector after sector, is one finding."""
    groups: dict[tuple[object, ...], dict[tuple[Any, ...], list[Found]]] = {}
    for item in found:
        kind = (item.fault and item.fault.kind, item.problem.rule, item.problem.kind)
        same = groups.setdefault(kind, {})
        same.setdefault((item.position, item.fault, *((d.event, d.durable) for d in item.decisions)), []).append(item)
    chosen: list[list[Found]] = []
    for group in sorted(groups.values(), key=lambda group: -max(items[0].problem.severity for items in group.values())):
        distinct = sorted(group.values(), key=lambda items: (len(items[0].decisions), items[0].position))
        chosen += distinct[: 1 if plan.faults else _PER_GROUP]
    return [explain(items[0], plan, trace, len(items)) for items in chosen]
