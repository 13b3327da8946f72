"""Samples where a budget ends: which states they are, what they find that the search did not, and what is said."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from powercut.crash.contents import Choice, Contents
from powercut.crash.explore import explore_epoch, sample_epoch
from powercut.crash.sample import samples, sizes
from powercut.explore.run import explore_trace
from powercut.explore.session import Plan
from powercut.recording.record import record
from powercut.report.outcome import document, text
from powercut.scenario import from_options
from powercut.trace import Kind, Trace, TraceWriter
from powercut.verdict import Problem, Severity, Verdict
from support.histories import SECTOR
from support.qemu import needs_qemu

COUNT = 16  # writes in flight: 65,536 states


def racing(folder: Path) -> Contents:
    """COUNT sectors, each rewritten once and not flushed."""
    with TraceWriter(folder / "t.trace", {}) as writer:
        file = writer.file("disk", COUNT * SECTOR, "image")
        for sector in range(COUNT):
            writer.complete(writer.issue(Kind.WRITE, file, sector * SECTOR, SECTOR, data=b"x" * SECTOR))
    trace = Trace(folder / "t.trace")
    contents = Contents(trace, trace.files[0])
    contents.advance(trace.length)
    return contents


def judge_that_hates(state: frozenset[int], order: list[int]) -> Callable[..., None]:
    """A check that reads every sector in `order` and finds fault with the one state in which `state` survived."""

    def judge(disk, report, enough):
        survived = {sector for sector in order if disk.read(sector * SECTOR, 1)[0]}
        if survived == state:
            report(Problem("structure", "order", 0, Severity.CORRUPT, "this and nothing else"))

    return judge


@pytest.mark.parametrize(
    ("name", "state"),
    [
        ("drop one", frozenset(range(COUNT)) - {3}),
        ("keep one", frozenset({0})),
        ("prefix", frozenset(range(9))),
        ("drop two", frozenset(range(COUNT)) - {2, 11}),
        ("keep two", frozenset({1, 4})),
    ],
)
def test_a_fault_that_the_search_does_not_come_to_is_in_the_sample(tmp_path, planted, name, state):
    contents = racing(tmp_path)
    judge = judge_that_hates(state, sorted(range(COUNT), key=lambda sector: sector not in (0, 3, 2, 11, 1, 4, 8)))
    searched = explore_epoch(0, contents, judge, budget=400)
    assert not searched.found, "control: depth first, the first sectors read are decided last"
    sampled = sample_epoch(0, contents, judge, budget=400, seed=1)
    planted(f"the one bad state of 65,536: {name}", bool(sampled.found))
    assert len(sampled.found) == 1
    assert not sampled.exhausted
    assert {d.offset // SECTOR for d in sampled.found[0].decisions if not d.durable} == state
    harmless = sample_epoch(0, contents, judge_that_hates(frozenset({99}), list(range(COUNT))), budget=400, seed=1)
    assert (harmless.found, harmless.exhausted, harmless.checks) == ([], False, 400)


def test_each_way_once_through_is_each_of_its_states():
    events = [3, 5, 8, 13]
    drawn: dict[str, set[frozenset[int]]] = {}
    counts: Counter[str] = Counter()
    for sample in itertools.islice(samples(events, [8, 3, 5, 13], 1), 60):
        counts[sample.way] += 1
        if sample.way != "random":
            kept = {e for e in events if sample.policy(0, _choice(e))}
            drawn.setdefault(sample.way, set()).add(frozenset(kept))
    whole = frozenset(events)
    assert drawn["drop one"] == {whole - {e} for e in events}
    assert drawn["keep one"] == {frozenset({e}) for e in events}
    assert drawn["prefix"] == {frozenset(events[:k]) for k in range(5)}
    pairs = {frozenset(pair) for pair in itertools.combinations(events, 2)}
    assert drawn["pairs"] == pairs | {whole - pair for pair in pairs}
    assert {way: counts[way] for way in drawn} == {way: of for way, of in sizes(4).items() if of}
    assert next(samples(events, [8, 3, 5, 13], 1)).way == "prefix"


def _choice(event: int) -> Choice:
    """One atom on which one event is in flight."""
    return Choice(0, np.zeros((2, SECTOR), np.uint8), (-1, event))


def test_what_a_check_reads_comes_first(tmp_path):
    """Of 16 writes the check reads two; dropping either is among the first samples."""
    contents = racing(tmp_path)
    seen: list[tuple[bool, ...]] = []

    def judge(disk, report, enough):
        seen.append(tuple(bool(disk.read(sector * SECTOR, 1)[0]) for sector in (14, 15)))

    sample_epoch(0, contents, judge, budget=12, seed=1)
    assert {(False, False), (True, True), (True, False), (False, True)} <= set(seen)


@needs_qemu
def test_a_spent_budget_says_what_was_looked_at_and_never_holds(tmp_path):
    """Small clusters, plainly searched, with too few checks."""
    about = {"about": "", "expect": "HOLDS", "size": "4M", "options": {"cluster_size": "4k"}}
    record(from_options(about | {"workload": {"operations": 60, "depth": 4}}), tmp_path / "t.trace")
    plan = Plan(str(tmp_path / "t.trace"), "qcow2", sets=False)
    outcome = explore_trace(plan, budget=1000, jobs=1)
    assert outcome.verdict is Verdict.UNKNOWN
    assert outcome.coverage.checks <= 1000
    sampled = outcome.coverage.sampled
    assert sampled is not None
    assert sampled.done["prefix"] > 0
    assert f"sampled  {sampled.epochs} epoch" in text(outcome, [], 1.0)
    assert document(outcome, [])["coverage"]["sampled"]["ways"]["prefix"]["done"] == sampled.done["prefix"]
    assert explore_trace(plan, budget=1000, jobs=1) == outcome, "drawn from a seed"
    by_sets = explore_trace(Plan(plan.trace, "qcow2"), budget=1000, jobs=1)
    assert (by_sets.verdict, by_sets.coverage.sampled) == (Verdict.HOLDS, None)
