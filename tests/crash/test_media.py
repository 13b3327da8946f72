"""Media faults: the states they make against brute force, and what is noticed of them on a real recording."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from powercut.crash.contents import Contents
from powercut.crash.disk import CrashDisk
from powercut.crash.media import KINDS, Damaged, Fault, Unreadable, purpose
from powercut.crash.model import epochs
from powercut.explore.replay import replay
from powercut.explore.run import Outcome, explore_trace, with_faults
from powercut.explore.session import Plan
from powercut.report.outcome import save
from powercut.trace import Kind, Trace
from powercut.verdict import Verdict
from support.histories import SECTOR, SECTORS, states, steps, write
from support.qemu import needs_qemu

SHIPPED = Path(__file__).parents[2] / "scenarios" / "shipped-qcow2.trace"


def seen(contents: Contents) -> set[bytes]:
    disk = CrashDisk(contents)
    found: set[bytes] = set()
    disk.explore(lambda: found.add(disk.read(0, SECTORS * SECTOR).tobytes()))
    return found


@given(plan=steps(), sector=st.integers(0, SECTORS - 1), bit=st.integers(0, SECTOR * 8 - 1))
def test_an_atom_that_is_struck_has_one_content_and_the_others_all_of_theirs(plan, sector, bit):
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "t.trace"
        events = write(path, plan)
        trace = Trace(path)
        for position in epochs(trace, 0):
            whole = Contents(trace, trace.files[0])
            whole.advance(position)
            durable = whole.durable(sector, sector + 1).tobytes()
            flipped = bytearray(durable)
            flipped[bit // 8] ^= 1 << bit % 8
            for kind, content in (("zero", bytes(SECTOR)), ("flip", bytes(flipped))):
                struck = Damaged(
                    trace,
                    trace.files[0],
                    SECTOR,
                    0,
                    Fault(kind, position, sector * SECTOR, bit if kind == "flip" else 0),
                )
                struck.advance(position)
                begin, end = sector * SECTOR, (sector + 1) * SECTOR
                assert seen(struck) == {s[:begin] + content + s[end:] for s in states(events, position)}
            unreadable = Damaged(trace, trace.files[0], SECTOR, 0, Fault("read-error", position, sector * SECTOR))
            unreadable.advance(position)
            for other in range(SECTORS):
                if other != sector:
                    CrashDisk(unreadable).read(other * SECTOR, SECTOR)
            with pytest.raises(Unreadable, match=f"byte {sector * SECTOR} "):
                CrashDisk(unreadable).read(0, SECTORS * SECTOR)


@given(plan=steps(), which=st.integers(0, 13), to=st.integers(0, SECTORS - 1))
def test_lost_and_misdirected_writes_are_another_history(plan, which, to):
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "t.trace"
        events = write(path, plan)
        writes = [event for event in events if event.kind is Kind.WRITE]
        if not writes:
            return
        event = writes[which % len(writes)]
        to = min(to, SECTORS - event.length // SECTOR) * SECTOR
        trace = Trace(path)
        for position in epochs(trace, 0):
            lost = Damaged(trace, trace.files[0], SECTOR, 0, Fault("lost-write", position, 0, event=event.number))
            lost.advance(position)
            assert seen(lost) == states([e for e in events if e is not event], position)
            fault = Fault("misdirected-write", position, 0, event=event.number, to=to)
            moved = Damaged(trace, trace.files[0], SECTOR, 0, fault)
            moved.advance(position)
            assert seen(moved) == states([replace(e, offset=to) if e is event else e for e in events], position)


def explored(kind: str, number: int = 20, checker: str | None = None) -> Outcome:
    plan = Plan(str(SHIPPED), "qcow2", checker=checker, recovery_depth=0)
    return explore_trace(with_faults(plan, [kind], number, 1), jobs=1, budget=400 if checker else None)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_reported_and_replays(kind, tmp_path, planted):
    outcome = explored(kind)
    fates = outcome.coverage.faults[kind]
    assert fates.laid == 20
    found = fates.noticed > 0 if kind == "read-error" else fates.silent > 0
    planted(f"media fault: {kind}", found)
    assert found
    assert outcome.verdict is (Verdict.UNKNOWN if kind == "read-error" else Verdict.BROKEN), "a sample never holds"
    for saved in save(outcome.findings, tmp_path / "findings"):
        assert saved.finding.fault.kind == kind
        assert replay(str(saved.path), str(tmp_path / "crash.qcow2")).confirmed, saved.path.read_text()
    if kind in ("flip", "zero"):  # the metadata speaks up, the data does not
        assert {purpose(f.fault.role) for f in outcome.findings if f.severity == "silent corruption"} == {"guest data"}
        assert any(f.severity in ("corrupt metadata", "unopenable") for f in outcome.findings)


def test_control_without_faults_the_same_recording_holds():
    assert explore_trace(Plan(str(SHIPPED), "qcow2"), jobs=1).verdict is Verdict.HOLDS


def test_what_is_drawn_depends_on_the_seed_alone():
    plan = Plan(str(SHIPPED), "qcow2")
    assert with_faults(plan, KINDS, 5, 3) == with_faults(plan, KINDS, 5, 3)
    assert with_faults(plan, KINDS, 5, 3) != with_faults(plan, KINDS, 5, 4)
    struck = {purpose(fault.role) for fault in with_faults(plan, ["flip"], 20, 3).faults}
    assert {"header", "L1 table", "L2 table", "refcount table", "refcount block", "guest data"} <= struck


@needs_qemu
def test_a_program_meets_them_too():
    """qemu-img check sees a zeroed atom of metadata; a read error is no opinion of its."""
    assert any(f.rule == "checker" for f in explored("zero", 6, "qemu-img check -f qcow2").findings)
    unreadable = explored("read-error", 6, "qemu-img check -f qcow2")
    assert unreadable.verdict is Verdict.UNKNOWN
    assert any("exit code 1" in reason for reason in unreadable.reasons), unreadable.reasons
