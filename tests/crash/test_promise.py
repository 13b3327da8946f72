"""What a guest may read after a crash, against its definition: event by event, sector by sector."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given

from powercut.crash.promise import Promise
from powercut.stamp import GARBAGE, ZERO
from powercut.trace import Flag, Kind, Trace, TraceWriter
from support.histories import SECTOR, SECTORS, Event, Step, steps

FIRST = 1000  # number of the first operation: numbers need not begin at 1


def write(path: Path, plan: list[Step], *, overlapping: bool) -> list[Event]:
    """Write `plan` as a guest's trace. Unless `overlapping`, a request waits for those it overlaps with, as the
    workload's do."""
    events: list[Event] = []
    waiting: list[Event] = []

    def finish(event: Event, result: int = 0) -> None:
        waiting.remove(event)
        event.completed, event.result = writer._position, result
        writer.complete(event.issued, result)

    with TraceWriter(path, {}) as writer:
        file = writer.file("guest", SECTORS * SECTOR, "guest")
        for step in plan:
            if step.kind is None:
                if waiting:
                    finish(waiting[step.which % len(waiting)], step.result if overlapping else 0)
                continue
            end = step.offset + step.length
            if not overlapping:
                for other in [e for e in waiting if e.offset < end and step.offset < e.offset + e.length]:
                    finish(other)
            flags = step.flags if overlapping else 0
            position = writer.issue(step.kind, file, step.offset, step.length, flags=flags, ref=FIRST + len(events))
            events.append(Event(len(events), step.kind, step.offset, step.length, flags, position))
            waiting.append(events[-1])
    return events


def allowed(events: list[Event], t: int, sector: int) -> set[int]:
    """The operations whose bytes `sector` may hold after a crash before `t` (ZERO: zeros), by definition."""

    def completed(e: Event) -> float:
        return e.completed if e.completed is not None and e.completed < t else float("inf")

    here = [
        e for e in events
        if e.kind is not Kind.FLUSH and e.issued < t and e.offset <= sector * SECTOR < e.offset + e.length
    ]  # fmt: skip
    flushes = [
        e for e in events
        if e.kind is Kind.FLUSH and completed(e) < t and not e.result and not e.flags & Flag.LIED
    ]  # fmt: skip
    changes = [e for e in here if e.kind is not Kind.DISCARD]
    durable = [
        e for e in changes
        if completed(e) < t and not e.result and (e.flags & Flag.FUA or any(completed(e) < f.issued for f in flushes))
    ]  # fmt: skip

    def overtaken(e: Event) -> bool:
        return any(completed(e) < d.issued for d in durable)

    left = [e for e in changes if not overtaken(e)]
    tokens = {FIRST + e.number if e.kind is Kind.WRITE else ZERO for e in left}
    if not durable:
        tokens.add(ZERO)
    # a discard makes zeros legal, now and later, and takes nothing away
    if any(e.kind is Kind.DISCARD and not overtaken(e) for e in here):
        tokens.add(ZERO)
    return tokens


def answers(promise: Promise, count: int) -> list[set[int]]:
    """For each sector, everything that `promise` calls legal, asked all at once."""
    numbers = [ZERO, GARBAGE, 0, FIRST - 1, *range(FIRST, FIRST + count + 2), 1 << 40]
    at = np.repeat(np.arange(SECTORS), len(numbers))
    op = np.tile(np.array(numbers), SECTORS)
    ok = promise.legal(at, op, np.where(op == ZERO, 0, at))
    elsewhere = promise.legal(at, op, (at + 1) % SECTORS)
    assert not (elsewhere & (op != ZERO)).any(), "the stamp of another sector is never legal"
    return [{int(o) for o in op[ok & (at == sector)]} for sector in range(SECTORS)]


@given(plan=steps())
def test_a_workloads_promise_is_its_definition(plan):
    """Requests that never overlap in place, as the workload issues them: exactly the definition, at every moment."""
    with tempfile.TemporaryDirectory() as scratch:
        events = write(Path(scratch) / "t", plan, overlapping=False)
        trace = Trace(Path(scratch) / "t")
        promise = Promise(trace, trace.files[0])
        for t in range(trace.length + 1):
            promise.advance(t)
            assert answers(promise, len(events)) == [allowed(events, t, sector) for sector in range(SECTORS)]


@given(plan=steps())
def test_any_guests_promise_never_forbids_what_is_legal(plan):
    """Overlapping requests, FUA, failures, flushes that lied: nothing legal is called broken; and what is called
    legal beyond the definition can only be zeros (by a discard among requests that overlapped)."""
    with tempfile.TemporaryDirectory() as scratch:
        events = write(Path(scratch) / "t", plan, overlapping=True)
        trace = Trace(Path(scratch) / "t")
        promise = Promise(trace, trace.files[0])
        for t in range(trace.length + 1):
            promise.advance(t)
            for got, sector in zip(answers(promise, len(events)), range(SECTORS), strict=True):
                truth = allowed(events, t, sector)
                assert truth <= got
                assert got - truth <= {ZERO}
                if not any(e.kind in (Kind.DISCARD, Kind.ZERO) for e in events):
                    assert got == truth


def promised(tmp_path: Path, *lines: str) -> list[set[str]]:
    """After each line, what sector 0 may hold: "a", "b" for writes by name, "0" for zeros."""
    names: dict[int, str] = {ZERO: "0"}
    with TraceWriter(tmp_path / "t", {}) as writer:
        file = writer.file("guest", SECTORS * SECTOR, "guest")
        positions = []
        for number, line in enumerate(lines):
            kind = {"flush": Kind.FLUSH, "zero": Kind.ZERO, "discard": Kind.DISCARD}.get(line, Kind.WRITE)
            names[number] = line
            length = 0 if kind is Kind.FLUSH else SECTOR
            writer.complete(writer.issue(kind, file, 0, length, ref=number))
            positions.append(writer._position)
    trace = Trace(tmp_path / "t")
    promise = Promise(trace, trace.files[0])
    seen = []
    for position in positions:
        promise.advance(position)
        op = np.array(sorted(names))
        at = np.zeros(len(op), dtype=np.int64)
        seen.append({names[o] for o in op[promise.legal(at, op, at)].tolist()})
    return seen


@pytest.mark.parametrize(
    ("lines", "legal"),
    [
        ("a flush b flush", "0a a ab b"),
        ("a flush zero flush", "0a a 0a 0"),
        ("a flush discard flush", "0a a 0a 0a"),  # a discard may be ignored, for ever
        ("a flush discard flush b flush", "0a a 0a 0a 0ab b"),
        ("a discard flush", "0a 0a 0a"),
        ("a flush discard b flush", "0a a 0a 0ab b"),
        ("zero a flush", "0 0a a"),
        ("discard a flush b flush", "0 0a a ab b"),
    ],
)
def test_histories_written_down(tmp_path, lines, legal):
    assert promised(tmp_path, *lines.split()) == [set(letters) for letters in legal.split()]


def test_it_says_in_words_what_is_legal(tmp_path):
    promised(tmp_path, "a", "flush", "b")
    trace = Trace(tmp_path / "t")
    promise = Promise(trace, trace.files[0])
    assert promise.describe(0) == "zeros (never written)"
    promise.advance(trace.length)
    assert promise.describe(0) == "operation 0 (write, flushed) or operation 2 (write, not flushed)"


def test_a_number_as_large_as_can_be_takes_no_memory(tmp_path):
    """Operation numbers come from the trace: an array as long as the largest would be whatever a file says."""
    with TraceWriter(tmp_path / "t", {}) as writer:
        file = writer.file("guest", SECTORS * SECTOR, "guest")
        writer.issue(Kind.WRITE, file, 0, SECTOR, ref=(1 << 63) - 1)
    trace = Trace(tmp_path / "t")
    promise = Promise(trace, trace.files[0])
    promise.advance(trace.length)
    at = np.zeros(2, dtype=np.int64)
    assert promise.legal(at, np.array([(1 << 63) - 1, 5]), at).tolist() == [True, False]


def test_control_a_promise_that_forgets_a_flush_is_found_out():
    """The comparison itself: with one covering flush taken away from the definition only, the two must differ."""
    with tempfile.TemporaryDirectory() as scratch:
        plan = [Step(Kind.WRITE, 0, SECTOR), Step(None), Step(Kind.FLUSH), Step(None)]
        events = write(Path(scratch) / "t", plan, overlapping=False)
        trace = Trace(Path(scratch) / "t")
        promise = Promise(trace, trace.files[0])
        promise.advance(trace.length)
        events[1].flags = int(Flag.LIED)
        assert answers(promise, len(events))[0] != allowed(events, trace.length, 0)
