"""Quire's promises on every crash state of recorded histories. Each verdict is exhausted, or the test fails."""

from __future__ import annotations

import pytest

from powercut.stores import explore_store
from powercut.verdict import Verdict
from support.quires import HISTORIES, RECORDS, after, explored, recorded

FLUSHED = ["write main 0 512 fua"]


def told(outcome):
    return f"2^{outcome.log2_states:.0f} crash states in {outcome.checks:,} checks"


@pytest.mark.parametrize("records", RECORDS)
@pytest.mark.parametrize("name", HISTORIES)
def test_every_promise_holds(tmp_path, figure, name, records):
    outcome = explored(tmp_path, HISTORIES[name], RECORDS[records])
    figure(f"quire, {name}, {records} records", told(outcome))
    assert outcome.verdict is Verdict.HOLDS, [*map(str, outcome.findings), *outcome.reasons]


@pytest.mark.parametrize("records", RECORDS)
def test_a_crash_inside_the_recovery(tmp_path, figure, records):
    outcome = explored(tmp_path, ["write main 0 512", "flush main"], RECORDS[records], depth=1)
    figure(f"quire, a crash inside the recovery, {records} records", told(outcome))
    assert outcome.verdict is Verdict.HOLDS, [*map(str, outcome.findings), *outcome.reasons]


@pytest.mark.slow
@pytest.mark.parametrize("records", RECORDS)
@pytest.mark.parametrize("name", HISTORIES)
def test_a_crash_inside_the_recovery_of_every_history(tmp_path, figure, name, records):
    trace, judge = recorded(tmp_path, HISTORIES[name], RECORDS[records], range(2))
    outcome = explore_store(trace, judge, depth=1, known=set())
    figure(f"quire, {name}, a crash inside the recovery too, {records} records", told(outcome))
    assert outcome.verdict is Verdict.HOLDS, [*map(str, outcome.findings), *outcome.reasons]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("history", "records"),
    [(FLUSHED, "C"), (FLUSHED, "P"), (HISTORIES["reopen"], "P"), (HISTORIES["allocate, overwrite"], "P")],
)
def test_a_crash_inside_the_recovery_from_a_crash_inside_a_recovery(tmp_path, figure, history, records):
    trace, judge = recorded(tmp_path, history, RECORDS[records], range(2))
    outcome = explore_store(trace, judge, depth=2, positions=after(trace, line=-1), known=set())
    figure(f"quire, two levels of recovery, {'; '.join(history)}, {records} records", told(outcome))
    assert outcome.verdict is Verdict.HOLDS, [*map(str, outcome.findings), *outcome.reasons]
