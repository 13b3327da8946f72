"""From a trace to an outcome: the search over all epochs, in several processes, and what it says."""

from __future__ import annotations

import multiprocessing
import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from typing import Any

from powercut import formats
from powercut.crash.explore import SPENT, EpochResult, Found, Task
from powercut.crash.finding import Finding
from powercut.crash.media import draw
from powercut.crash.model import epochs
from powercut.crash.sample import sizes
from powercut.errors import InputError
from powercut.explain import explain, namer
from powercut.session import Plan, Session
from powercut.trace import Trace
from powercut.verdict import Severity, Verdict

_PER_GROUP = 3  # findings kept for each rule and kind
_RESERVE = 4  # one part in so many of a budget is for samples
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
class Sampled:
    """What was looked at where the budget did not suffice: states `done` of `of` (0: without end) in each way."""

    epochs: int
    seed: int
    done: Counter[str]
    of: Counter[str]


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


_session: Session | None = None


def _work(plan: Plan, tasks: list[Task]) -> list[EpochResult]:
    """In a worker: explore `tasks`, going on from where this worker's session stands if that is behind them."""
    global _session
    if _session is None or _session.plan != plan or _session.image.position > tasks[0].position:
        _session = Session(plan)
    return list(_session.explore(tasks))


def _explore_all(
    plan: Plan, trace: Trace, tasks: list[Task], pool: Executor | None, done: Progress
) -> list[EpochResult]:
    results: list[EpochResult] = []
    if pool is None:
        for result in Session(plan, trace).explore(tasks):
            results.append(result)
            done(len(results), len(tasks))
        return results
    size = max(8, min(64, len(tasks) // 16))
    futures: list[Future[list[EpochResult]]] = [
        pool.submit(_work, plan, tasks[i : i + size]) for i in range(0, len(tasks), size)
    ]
    for future in as_completed(futures):
        results += future.result()
        done(len(results), len(tasks))
    return sorted(results, key=lambda result: result.index)


def _rounds(plan: Plan, trace: Trace, budget: int | None, pool: Executor | None, done: Progress) -> list[EpochResult]:
    """Explore every epoch; a budget is shared out evenly, and what some did not need goes to those that want more.
    A part is kept back: where it did not suffice, it looks at a sample of the states.

    The shares do not depend on the number of processes, so neither does the verdict.
    """
    positions = _positions(plan, trace)
    if budget is None:
        return _explore_all(plan, trace, [Task(i, p, None) for i, p in enumerate(positions)], pool, done)
    results = {i: EpochResult(i, p, unknown=SPENT) for i, p in enumerate(positions)}
    reserve = budget // _RESERVE
    budget -= reserve
    left, share = list(results), budget // len(results)
    if not share:  # fewer checks than epochs: one each for some, from the first to the last
        left, share = left[:: -(-len(left) // budget)], 1
    while left and share > max(results[i].checks for i in left):
        for result in _explore_all(plan, trace, [Task(i, positions[i], share) for i in left], pool, done):
            results[result.index] = result
            budget -= result.checks
        left = [i for i in results if results[i].unknown == SPENT]
        share = budget // len(left) if left else 0
    if left and (share := (budget + reserve) // len(left)):
        for sampled in _explore_all(plan, trace, [Task(i, positions[i], share, True) for i in left], pool, done):
            results[sampled.index].add(sampled)
    return list(results.values())


def _positions(plan: Plan, trace: Trace) -> list[int]:
    """The crash positions to visit: every epoch's end, or where faults strike."""
    image = trace.file("image")
    assert image is not None
    return [fault.position for fault in plan.faults] if plan.faults else epochs(trace, image.id)


def with_faults(plan: Plan, kinds: Sequence[str], number: int, seed: int) -> Plan:
    """The plan, with `number` media faults of each of `kinds` drawn for its trace. Raises InputError."""
    if not kinds:
        return plan
    session = Session(plan)
    positions = epochs(session.trace, session.image.file)
    faults = draw(session.image, lambda: namer(session), positions, kinds, number, seed)
    return replace(plan, faults=tuple(faults))


def explore_trace(
    plan: Plan, *, budget: int | None = None, jobs: int | None = None, progress: Progress = lambda done, of: None
) -> Outcome:
    """Explore a trace and judge it. `budget` bounds the number of checks, `jobs` the processes (default: all cores).

    Raises InputError if the trace cannot be used.
    """
    trace = Trace(plan.trace)
    trace.verify()
    image = trace.file("image")
    if image is None:
        raise InputError(f"{plan.trace}: has no image")
    formats.find(plan.format)
    count = len(_positions(plan, trace))
    jobs = min(jobs or os.cpu_count() or 1, -(-count // 64))
    if jobs == 1 or count < _FEW:
        results = _rounds(plan, trace, budget, None, progress)
    else:
        with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
            results = _rounds(plan, trace, budget, pool, progress)
    return conclude(plan, trace, results)


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
    coverage.sampled = _sampled(plan, results)
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


def _sampled(plan: Plan, results: Sequence[EpochResult]) -> Sampled | None:
    looked = [result for result in results if result.sampled]
    if not looked:
        return None
    sampled = Sampled(len(looked), plan.seed, Counter(), Counter())
    for result in looked:
        sampled.done.update(result.sampled)
        sampled.of.update(sizes(result.events))
    return sampled


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
