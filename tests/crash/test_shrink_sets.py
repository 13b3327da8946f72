"""Findings on several files are shrunk to the fewest losses: against brute force, and on faults that are known."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from powercut.capture.store import RecordingStore
from powercut.crash import setfinding
from powercut.crash.options import Options
from powercut.crash.shrink import fewest
from powercut.crash.store import in_memory
from powercut.explore.sets import SetPlan
from powercut.stores import Case, StoreFinding, explore_store, shrunk
from powercut.trace import Trace, TraceWriter
from powercut.verdict import Problem, Severity, Verdict

ITEMS = frozenset({"a", "b", "c", "x", "y", "z"})  # sectors of files that are there, and names that are made
sets_of_items = st.frozensets(st.sampled_from(sorted(ITEMS)))


def lost_in(store) -> frozenset[str]:
    """Which items were lost, as anybody would see it."""
    names = store.names()
    old = {name for name in "abc" if store.open(name, write=False).read(0, 1) == b"o"}
    return frozenset(old | {name for name in "xyz" if name not in names})


def recorded(folder: str) -> Path:
    path = Path(folder) / "t"
    inner = in_memory()
    for name in "abc":
        inner.create(name).write(0, b"o" * 512)
    with TraceWriter(path, {}) as writer:
        store = RecordingStore(inner, writer)
        for name in "abc":
            store.open(name, write=True).write(0, b"n" * 512)
        for name in "xyz":
            store.create(name)
    return path


def named(decisions) -> frozenset[str]:
    return frozenset(
        told.file if told.what == "content" else "xyz"[told.event - 4] for told in decisions if told.what != "size"
    )


@given(st.frozensets(sets_of_items, min_size=1, max_size=12))
@settings(max_examples=60)
def test_the_fewest_losses_are_those_of_brute_force(bad):
    """A rule that breaks in arbitrary states. The state found is shrunk to the smallest part of its losses."""

    def judge(case: Case) -> None:
        if lost_in(case.store) in bad:
            case.report(Problem("rule", "kind", 0, Severity.CORRUPT, "bad"))

    with tempfile.TemporaryDirectory() as folder:
        path = recorded(folder)
        outcome = explore_store(path, judge)
        assert outcome.verdict is Verdict.BROKEN
        (found,) = outcome.findings
        before = named(told for told in found.decisions if told.durable)
        assert before in bad
        (less,) = shrunk(path, judge, [found])
        lost = named(less.decisions)
        assert lost in bad
        assert len(lost) == min(len(one) for one in bad if one <= before)
        needed = named(less.needs)
        assert ITEMS - needed in bad
        assert len(needed) == min(len(ITEMS - one) for one in bad if one >= lost)


@given(st.frozensets(st.integers(0, 30), min_size=1), st.integers(0, 3))
@settings(max_examples=60)
def test_nothing_can_be_left_out(core, extra):
    """A set of many, of which `core` is needed: found. With an alternative of fewer, that."""
    everything = list(range(40))
    assert set(fewest(everything, lambda some: core <= set(some))) == core
    other = set(range(31, 31 + extra))
    found = set(fewest(everything, lambda some: core <= set(some) or (extra > 0 and other <= set(some))))
    assert found in (core, other)


def stored(path: Path, how: str) -> None:
    """A new version of a file is put in place of the old one, as it should be or without one of the steps."""
    inner = in_memory()
    inner.create("a").write(0, b"o" * 1024)
    with TraceWriter(path, {}) as writer:
        store = RecordingStore(inner, writer)
        file = store.create("new")
        file.write(0, b"n" * 1024)
        if how != "no sync":
            file.sync()
        store.unlink("a")
        store.rename("new", "a")
        store.sync_dir()
        store.create("done")
        if how != "no sync of the directory":
            store.sync_dir()
        note = store.create("note")
        note.sync()


def judge_of_versions(case: Case) -> None:
    """a or new is whole, old or new; and what a synced note speaks of is there."""
    names = case.store.names()
    for name in sorted({"a", "new"} & set(names)):
        file = case.store.open(name, write=False)
        if name == "a" and file.read(0, file.size()) not in (b"o" * 1024, b"n" * 1024):
            case.report(Problem("whole", "torn", 0, Severity.SILENT, "a is neither old nor new"))
    if "note" in names and "done" not in names:
        case.report(Problem("order", "done", 0, Severity.LOSS, "the note speaks of what is not there"))


@pytest.mark.parametrize(
    ("how", "lost", "order"),
    [
        ("all", None, ""),
        ("no sync", "the size of new", "the size of new had to be on disk before rename new to a"),
        ("no sync of the directory", "create done", "create done had to be on disk before create note"),
    ],
)
def test_planted_faults_are_told_by_their_cause(tmp_path, planted, how, lost, order):
    path = tmp_path / "t"
    stored(path, how)
    outcome = explore_store(path, judge_of_versions)
    if lost is None:
        assert outcome.verdict is Verdict.HOLDS
        return
    planted(f"several files: {how}", outcome.verdict is Verdict.BROKEN)
    less = shrunk(path, judge_of_versions, outcome.findings[:1])
    finding = setfinding.from_found(less[0], SetPlan(str(path)), Trace(path))
    assert [str(one) for one in finding.stretches] == [lost]
    assert finding.others == "survived"
    assert order in finding.order


@pytest.mark.parametrize("options", [Options(whole=True), Options(order="issue"), Options(directory="ordered")])
def test_other_choices_of_the_model_are_shrunk_too(tmp_path, options):
    """And what is then written out is the broken state."""
    path = tmp_path / "t"
    stored(path, "no sync")
    outcome = explore_store(path, judge_of_versions, options=options)
    if options.order == "issue":  # names are changes of their own
        assert outcome.verdict is Verdict.BROKEN
    less: list[StoreFinding] = shrunk(path, judge_of_versions, outcome.findings, options)
    for one in less:
        finding = setfinding.from_found(one, SetPlan(str(path), options), Trace(path))
        setfinding.write_state(finding, Trace(path), str(tmp_path / finding.kind))
        if finding.kind == "torn":
            assert (tmp_path / "torn" / "a").read_bytes() not in (b"o" * 1024, b"n" * 1024)


def test_a_crash_inside_a_recovery_is_shrunk_as_well(tmp_path, planted):
    """The recovery mends in place, in two writes: cut off between them it leaves what it does not know. What the
    recorded program had in flight besides does not matter, and is not told."""
    path = tmp_path / "t"
    inner = in_memory()
    inner.create("a").write(0, b"o" * 1024)
    with TraceWriter(path, {}) as writer:
        store = RecordingStore(inner, writer)
        store.create("other").write(0, b"x" * 2048)

    def judge(case: Case) -> None:
        case.store.names()
        if "other" in case.store.names():
            case.store.open("other", write=False).read(0, 2048)
        file = case.store.open("a", write=True)
        now = file.read(0, 1024)
        if now not in (b"o" * 1024, b"x" * 1024):
            case.report(Problem("recovers", "torn", 0, Severity.CORRUPT, "half mended"))
        elif now[:1] == b"o":
            file.write(0, b"x" * 1024)

    outcome = explore_store(path, judge, depth=1)
    planted("a recovery in place", outcome.verdict is Verdict.BROKEN)
    (less,) = shrunk(path, judge, outcome.findings[:1])
    assert less.level == 1
    assert [(told.level, told.file, told.what) for told in (*less.decisions, *less.needs)] == [(1, "a", "content")] * 2
    finding = setfinding.from_found(less, SetPlan(str(path)), Trace(path))
    setfinding.write_state(finding, Trace(path), str(tmp_path / "out"))
    assert sorted((tmp_path / "out" / "a").read_bytes()[::512]) == sorted(b"ox")
    assert (tmp_path / "out" / "other").read_bytes() == b"x" * 2048, "the rest survived"
