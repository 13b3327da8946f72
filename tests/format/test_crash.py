"""Quire's promises on every crash state of recorded histories. Each verdict is exhausted, or the test fails."""

from __future__ import annotations

import pytest

from powercut.formats.quire.history import Promises, parse, record
from powercut.formats.quire.judge import Quire
from powercut.stores import explore_store
from powercut.verdict import Verdict
from quire.layout import CHECKED_RECORDS

SIZE = 16 << 10
SLOTS = 4  # so that a few flushes fill the journal

HISTORIES = {
    "allocate, overwrite": ["write main 0 1k", "flush main", "write main 0 1k", "write main 4k 1k", "flush main"],
    "discard, rewrite": ["write main 0 1k", "flush main", "discard main 0 4k", "flush main", "write main 0 512"],
    "checkpoint": [
        "write main 0 512",
        "flush main",
        "write main 4k 512",
        "flush main",
        "write main 8k 512",
        "flush main",
        "discard main 0 4k",
        "flush main",
        "write main 0 1k",
        "flush main",
    ],
    "tree": [
        "write main 0 512",
        "snapshot main s",
        "write main 512 512",
        "clone s c",
        "write c 0 512",
        "flush c",
        "rename c d",
        "delete s",
    ],
    "revert": [
        "write main 0 512",
        "snapshot main s",
        "write main 0 512",
        "flush main",
        "revert main s",
        "write main 512 512",
        "flush main",
    ],
    "resize": ["write main 12k 1k", "resize main 6k", "write main 4k 1k", "resize main 16k", "write main 5k 512"],
    "a write while a flush syncs": ["write main 0 512", "race main 0 512", "discard main 0 4k", "race main 0 512"],
    "killed": [
        "write main 0 512",
        "snapshot main s",
        "write main 0 512",
        "kill main",
        "write main 512 512",
        "flush main",
    ],
    "reopen": ["write main 0 512", "reopen", "discard main 0 4k", "write main 0 512", "reopen", "write main 0 1k fua"],
}

RECORDS = {"P": 0, "C": CHECKED_RECORDS}


def explored(folder, history, features, depth=0, **options):
    lines = parse(history)
    trace = folder / "t.trace"
    record(lines, SIZE, SLOTS, trace, features)
    return explore_store(trace, Quire(Promises(trace, lines)), depth=depth, **options)


def told(outcome):
    return f"2^{outcome.log2_states:.0f} crash states in {outcome.checks:,} checks"


@pytest.mark.parametrize("records", RECORDS)
@pytest.mark.parametrize("name", HISTORIES)
def test_every_promise_holds(tmp_path, figure, name, records):
    outcome = explored(tmp_path, HISTORIES[name], RECORDS[records])
    figure(
        f"quire, {name}, {records} records", f"2^{outcome.log2_states:.0f} crash states in {outcome.checks:,} checks"
    )
    assert outcome.verdict is Verdict.HOLDS, [*map(str, outcome.findings), *outcome.reasons]


@pytest.mark.parametrize("records", RECORDS)
def test_a_crash_inside_the_recovery(tmp_path, figure, records):
    outcome = explored(tmp_path, ["write main 0 512", "flush main"], RECORDS[records], depth=1)
    figure(
        f"quire, a crash inside the recovery, {records} records",
        f"2^{outcome.log2_states:.0f} states in {outcome.checks:,} checks",
    )
    assert outcome.verdict is Verdict.HOLDS, [*map(str, outcome.findings), *outcome.reasons]
