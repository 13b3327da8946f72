"""The choices of the fault model against brute force, each both ways.

The oracle here shares nothing with `powercut.crash`: it applies subsets, prefixes and torn writes one by one.
"""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from powercut.crash.contents import Contents
from powercut.crash.disk import CrashDisk
from powercut.crash.explore import extent
from powercut.crash.fileset import CrashSet, FileSet, Node
from powercut.crash.model import epochs
from powercut.crash.options import Options
from powercut.crash.promise import Promise
from powercut.crash.search import Search
from powercut.explore.replay import replay
from powercut.explore.run import explore_trace
from powercut.explore.session import Plan
from powercut.stamp import GARBAGE, ZERO
from powercut.trace import Kind, Trace, TraceWriter
from powercut.verdict import Verdict
from support.histories import SECTOR, SECTORS, content, states, steps, write

SHIPPED = Path(__file__).parents[2] / "scenarios" / "shipped-qcow2.trace"
START = [b"\0" * SECTOR, b"\xff" * SECTOR, b"\0" * SECTOR, b"\0" * SECTOR]


def seen(contents: Contents) -> set[bytes]:
    disk = CrashDisk(contents)
    found: set[bytes] = set()
    disk.explore(lambda: found.add(disk.read(0, SECTORS * SECTOR).tobytes()))
    return found


def flushed(plan) -> list:
    """A plan in which requests do not overlap in time, and none fails: each is done before the next is issued."""
    one_by_one = []
    for step in plan:
        if step.kind is not None:
            one_by_one += [step, type(step)(None)]
    return one_by_one


def durable_and_in_flight(events, t):
    """One request at a time: what was issued after the last flush is in flight, but for what is FUA."""
    events = [e for e in events if e.issued < t]
    honest = [e for e in events if e.kind is Kind.FLUSH and not e.flags & 4 and e.completed < t]
    last = honest[-1].issued if honest else 0
    changes = [e for e in events if e.kind is not Kind.FLUSH]
    return [e for e in changes if e.issued < last or (e.flags & 1 and e.completed < t)], changes


def put(disk: list[bytes], event, sectors=range(SECTORS)) -> None:
    for sector in sectors:
        if event.offset <= sector * SECTOR < event.offset + event.length:
            disk[sector] = content(event.number, SECTOR) if event.kind is Kind.WRITE else b"\0" * SECTOR


def made(events, durable) -> bytes:
    """What the disk holds if of `events` the durable ones and what is newer survived. Nothing older comes back."""
    disk = list(START)
    for event in events:
        later = [d for d in durable if d.issued > event.issued]
        covered = {s for s in range(SECTORS) for d in later if d.offset <= s * SECTOR < d.offset + d.length}
        put(disk, event, [s for s in range(SECTORS) if s not in covered])
    return b"".join(disk)


def explored(plan, options, check) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "t.trace"
        events = write(path, flushed(plan))
        trace = Trace(path)
        contents = Contents(trace, trace.files[0], options.atom, options.lying, options=options)
        for position in epochs(trace, 0):
            contents.advance(position)
            durable, changes = durable_and_in_flight(events, position)
            check(contents, durable, [e for e in changes if e not in durable], position, events)


@given(plan=steps())
def test_whole_writes(plan):
    def check(contents, durable, flight, position, events):
        wanted = set()
        for kept in itertools.product((False, True), repeat=len(flight)):
            alive = [e for e, keep in zip(flight, kept, strict=True) if keep]
            wanted.add(made(sorted(durable + alive, key=lambda e: e.issued), durable))
        found = seen(contents)
        assert found == wanted
        assert found <= states(events, position), "a choice of the model's narrows"
        assert len(found) <= 2 ** extent(contents)[1]

    explored(plan, Options(whole=True), check)


@pytest.mark.parametrize("whole", [True, False])
@given(plan=steps())
def test_survivors_in_the_order_of_issue(whole, plan):
    def check(contents, durable, flight, position, events):
        wanted = set()
        for count in range(len(flight) + 1):
            prefix = flight[:count]
            wanted.add(made(sorted(durable + prefix, key=lambda e: e.issued), durable))
            if whole or count == len(flight):
                continue
            torn = flight[count]
            later = [d for d in durable if d.issued > torn.issued]
            free = [
                s for s in range(SECTORS)
                if torn.offset <= s * SECTOR < torn.offset + torn.length
                and not any(d.offset <= s * SECTOR < d.offset + d.length for d in later)
            ]  # fmt: skip
            before = made(sorted(durable + prefix, key=lambda e: e.issued), durable)
            for some in itertools.product((False, True), repeat=len(free)):
                disk = [before[s * SECTOR : (s + 1) * SECTOR] for s in range(SECTORS)]
                put(disk, torn, [s for s, keep in zip(free, some, strict=True) if keep])
                wanted.add(b"".join(disk))
        found = seen(contents)
        assert found == wanted
        assert found <= states(events, position)

    explored(plan, Options(order="issue", whole=whole), check)


@pytest.mark.parametrize("torn", ["zeros", "garbage"])
@given(plan=steps())
def test_torn_atoms(torn, plan):
    def check(contents, durable, flight, position, events):
        usual = states(events, position)
        per_sector = [{s[i * SECTOR : (i + 1) * SECTOR] for s in usual} for i in range(SECTORS)]
        found = seen(contents)
        assert usual <= found, "a choice of the model's widens"
        for sector in range(SECTORS):
            here = {state[sector * SECTOR : (sector + 1) * SECTOR] for state in found}
            more = here - per_sector[sector]
            touched = any(e.offset <= sector * SECTOR < e.offset + e.length for e in flight) and sector in live(
                contents
            )
            if torn == "zeros":
                assert more <= {b"\0" * SECTOR}
                assert (b"\0" * SECTOR in here) or not touched
            else:
                assert len(more) == touched
        count = 1
        for i in range(SECTORS):
            count *= len({state[i * SECTOR : (i + 1) * SECTOR] for state in found})
        assert len(found) == count, "atoms vary independently"

    explored(plan, Options(torn=torn), check)


def test_the_choices_one_by_one(tmp_path):
    """Two writes of two sectors, and what each choice leaves possible: the controls, both ways."""
    with TraceWriter(tmp_path / "t", {}) as writer:
        file = writer.file("image", SECTORS * SECTOR, "image")
        for number in (0, 1):
            data = bytes([number + 1]) * 2 * SECTOR
            writer.complete(writer.issue(Kind.WRITE, file, number * 2 * SECTOR, 2 * SECTOR, data=data))
    trace = Trace(tmp_path / "t")

    def states_of(**options) -> set[str]:
        chosen = Options(**options)
        contents = Contents(trace, trace.files[0], chosen.atom, options=chosen)
        contents.advance(trace.length)
        return {"".join(str(state[i * SECTOR]) for i in range(SECTORS)) for state in seen(contents)}

    assert states_of() == {a + b for a in ("00", "01", "10", "11") for b in ("00", "02", "20", "22")}
    assert states_of(whole=True) == {"0000", "1100", "0022", "1122"}
    assert states_of(order="issue", whole=True) == {"0000", "1100", "1122"}
    assert states_of(order="issue") == {"0000", "0100", "1000", "1100", "1102", "1120", "1122"}
    assert len(states_of(torn="garbage")) == 3**4


@pytest.mark.parametrize("order", ["any", "issue"])
def test_a_disk_that_keeps_the_order_needs_no_flush_for_sound_metadata(tmp_path, planted, order):
    """The last flush lies. The format's structure then rests on the order in which the disk writes."""
    plan = Plan(str(SHIPPED), "qcow2", rules=("structure",), lying=1, order=order)
    outcome = explore_trace(plan, jobs=1)
    broken = outcome.verdict is Verdict.BROKEN
    if order == "any":
        planted("a lying flush, and writes out of order", broken)
    assert broken == (order == "any"), outcome.reasons


def test_a_finding_by_whole_writes_is_replayed(tmp_path):
    plan = Plan(str(SHIPPED), "qcow2", rules=("structure",), lying=1, whole=True)
    outcome = explore_trace(plan, jobs=1)
    assert outcome.verdict is Verdict.BROKEN
    assert any(decided.whole for finding in outcome.findings for decided in finding.decisions)
    for number, finding in enumerate(outcome.findings):
        finding.save(tmp_path / f"{number}.json")
        assert replay(str(tmp_path / f"{number}.json"), str(tmp_path / "image")).confirmed


def live(contents: Contents) -> set[int]:
    flight = contents.in_flight_atoms()
    return set(flight.atom[flight.event >= 0].tolist())


def test_what_a_guest_is_promised_is_torn_like_any_disk(tmp_path):
    """An overwrite in flight may leave zeros or garbage where the disk may; the control is the disk that may not."""
    with TraceWriter(tmp_path / "t", {}) as writer:
        guest = writer.file("guest", 4 * SECTOR, "guest")
        writer.complete(writer.issue(Kind.WRITE, guest, 0, SECTOR, ref=1))
        writer.complete(writer.issue(Kind.FLUSH, guest))
        writer.issue(Kind.WRITE, guest, 0, SECTOR, ref=2)
    trace = Trace(tmp_path / "t")
    for torn, legal in (("old-or-new", []), ("zeros", [ZERO]), ("garbage", [GARBAGE])):
        promise = Promise(trace, trace.files[0], torn)
        promise.advance(trace.length)
        for op in (ZERO, GARBAGE):
            assert promise.legal(np.array([0]), np.array([op]), np.array([0]))[0] == (op in legal)
            assert promise.legal(np.array([2]), np.array([op]), np.array([0]))[0] == (op == ZERO), "never written"


FILES = ("a", "b")


def two_files(path: Path, plan) -> list[tuple[str, int, int]]:
    """A trace of writes that make two files longer, one after the other: (file, offset, fill)."""
    with TraceWriter(path, {}) as writer:
        root = writer.file(".", 0, "directory")
        ids = {name: writer.file(name, SECTOR, "file") for name in FILES}
        writer.mark("tree", entries=[[root, name, ids[name]] for name in FILES])
        for number, (name, sector) in enumerate(plan):
            data = bytes([number + 1]) * SECTOR
            writer.complete(writer.issue(Kind.WRITE, ids[name], sector * SECTOR, SECTOR, data=data))
    return [(name, sector, number + 1) for number, (name, sector) in enumerate(plan)]


@given(plan=st.lists(st.tuples(st.sampled_from(FILES), st.integers(0, 2)), min_size=1, max_size=5))
def test_one_order_for_all_files_and_their_sizes(plan):
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "t"
        writes = two_files(path, plan)
        trace = Trace(path)

        def found(options: Options) -> set[tuple[bytes, ...]]:
            files, search = FileSet(trace, options), Search()
            files.advance(trace.length)
            states = set()

            def look() -> None:
                state = CrashSet(files, search)
                nodes = [Node(0, 1), Node(0, 2)]
                states.add(tuple(state.read(node, 0, state.size(node)).tobytes() for node in nodes))

            search.explore(look)
            return states

        wanted = set()
        for count in range(len(writes) + 1):
            files = {name: bytearray(SECTOR) for name in FILES}
            for name, sector, fill in writes[:count]:
                data = files[name]
                data.extend(bytes(max(0, (sector + 1) * SECTOR - len(data))))
                data[sector * SECTOR : (sector + 1) * SECTOR] = bytes([fill]) * SECTOR
            wanted.add(tuple(bytes(files[name]) for name in FILES))
        assert found(Options(order="issue", whole=True)) == wanted
        usual = found(Options())
        assert wanted <= usual
        kept = found(Options(sizes=False))
        assert kept <= usual
        longest = [max([1, *(s + 1 for n, s, _ in writes if n == name)]) * SECTOR for name in FILES]
        assert all([len(data) for data in state] == longest for state in kept)
