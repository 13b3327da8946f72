"""Crash states of several files against brute force: names, sizes, contents, and crashes inside a recovery.

The oracle here shares nothing with `powercut.crash`: it applies subsets of the changes one by one, straight from the
model's definition, to dictionaries.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from powercut.capture.store import RecordingStore
from powercut.crash.alike import Possible, possible
from powercut.crash.fileset import CrashSet, FileSet
from powercut.crash.model import epochs
from powercut.crash.options import Options
from powercut.crash.search import Search
from powercut.crash.store import in_memory
from powercut.stores import Case, explore_store
from powercut.trace import SECTOR, Trace, TraceWriter
from powercut.verdict import Problem, Severity, Verdict

NAMES = ("a", "b")
SECTORS = 2
GRAIN = 256  # bytes: half a sector, so that edges are composed


class Step(NamedTuple):
    """What to do to a store: `value` is a name to move to, a byte to fill with, or a size."""

    what: str
    name: str = "a"
    begin: int = 0
    count: int = 0
    value: Any = 0


NONE = st.just(0)
A = st.just("a")


def a_step(what: str, name: Any = A, begin: Any = NONE, count: Any = NONE, value: Any = NONE) -> Any:
    return st.tuples(st.just(what), name, begin, count, value).map(lambda parts: Step(*parts))


name, begin, count = st.sampled_from(NAMES), st.integers(0, 3), st.integers(1, 4)
BEGINNINGS: list[list[Step]] = [
    [],
    [Step("create", "a"), Step("write", "a", 0, 4, 5)],
    [Step("create", "a"), Step("write", "a", 0, 4, 5), Step("sync", "a"), Step("sync_dir")],
    [Step("create", "a"), Step("create", "b"), Step("sync_dir"), Step("write", "a", 0, 3, 5)],
]
more = st.lists(
    st.one_of(
        a_step("create", name),
        a_step("write", name, begin, count, st.integers(1, 9)),
        a_step("punch", name, begin, count),
        a_step("truncate", name, value=st.sampled_from([0, 256, 512, 700, 1024])),
        a_step("rename", st.just("a"), value=st.just("b")),
        a_step("rename", st.just("b"), value=st.just("a")),
        a_step("unlink", name),
        a_step("sync", name),
        a_step("sync", name),
        a_step("sync_dir"),
    ),
    max_size=6,
)
steps = st.tuples(st.sampled_from(BEGINNINGS), more).map(lambda parts: parts[0] + parts[1])


def do(store: Any, plan: list[Step]) -> None:
    """Do `plan`, without what does not apply."""
    for step in plan:
        with suppress(FileNotFoundError, FileExistsError):
            if step.what == "create":
                store.create(step.name)
            elif step.what == "rename":
                store.rename(step.name, step.value)
            elif step.what == "unlink":
                store.unlink(step.name)
            elif step.what == "sync_dir":
                store.sync_dir()
            else:
                file = store.open(step.name, write=True)
                if step.what == "write":
                    file.write(step.begin * GRAIN, bytes([step.value]) * (step.count * GRAIN))
                elif step.what == "punch":
                    file.punch(step.begin * GRAIN, step.count * GRAIN)
                elif step.what == "truncate":
                    file.truncate(step.value)
                else:
                    file.sync()
                file.close()


def seen(store: Any) -> tuple[tuple[str, bytes], ...]:
    """All that a user of the store can see."""
    found = []
    for name in store.names():
        file = store.open(name, write=False)
        found.append((name, file.read(0, file.size())))
        file.close()
    return tuple(found)


# ---- the definition ---------------------------------------------------------------------------------------

LONGEST = 8 * GRAIN


class File:
    """Durable bytes and size, and changes in flight. Bytes beyond the size are zeros."""

    def __init__(self, content: bytes = b"") -> None:
        self.bytes, self.size = content.ljust(LONGEST, b"\0"), len(content)
        self.flight: list[tuple[str, int, int, bytes]] = []  # what, offset or size, -, data

    def live(self) -> tuple[bytes, int]:
        content, size = self.bytes, self.size
        for change in self.flight:
            content, size = self.apply(change, content, size)
        return content, size

    @staticmethod
    def apply(change: tuple[str, int, int, bytes], content: bytes, size: int) -> tuple[bytes, int]:
        what, offset, length, data = change
        if what == "truncate":
            return (content[:offset].ljust(LONGEST, b"\0") if offset < LONGEST else content), offset
        if what == "write":
            size = max(size, offset + length)
        return content[:offset] + data + content[offset + length :], size

    def states(self) -> set[bytes]:
        sizes = set()
        for chosen in itertools.product((0, 1), repeat=len(self.flight)):
            size = self.size
            for change in itertools.compress(self.flight, chosen):
                size = self.apply(change, self.bytes, size)[1]
            sizes.add(size)
        per_sector: list[set[bytes]] = []
        for sector in range(LONGEST // SECTOR):
            begin, end = sector * SECTOR, (sector + 1) * SECTOR
            may = {self.bytes[begin:end]}
            content, size = self.bytes, self.size
            for change in self.flight:
                content, size = self.apply(change, content, size)
                what, offset, length, _ = change
                covers = offset < end and (what == "truncate" or offset + length > begin)
                if covers:
                    may.add(content[begin:end])
            per_sector.append(may)
        whole = {b"".join(parts) for parts in itertools.product(*per_sector)}
        return {content[:size] for content in whole for size in sizes}

    def sync(self) -> None:
        self.bytes, self.size = self.live()
        self.flight = []


class Definition:
    """Files by number, entries, and changes of entries in flight."""

    def __init__(self, start: tuple[tuple[str, bytes], ...] = ()) -> None:
        self.files = [File(content) for _, content in start]
        self.entries: dict[str, int] = {name: number for number, (name, _) in enumerate(start)}
        self.flight: list[dict[str, int | None]] = []

    def live(self) -> dict[str, int]:
        return self.after(self.flight)

    def after(self, changes: Any) -> dict[str, int]:
        entries: dict[str, int | None] = dict(self.entries)
        for change in changes:
            entries.update(change)
        return {name: file for name, file in entries.items() if file is not None}

    def step(self, step: Step) -> bool:
        """Do `step`; True if it ends an epoch (before which the states are to be taken)."""
        entries = self.live()
        if step.what == "create" and step.name not in entries:
            self.files.append(File())
            self.flight.append({step.name: len(self.files) - 1})
        elif step.what == "rename" and step.name in entries and step.value not in entries:
            self.flight.append({step.value: entries[step.name], step.name: None})
        elif step.what == "unlink" and step.name in entries:
            self.flight.append({step.name: None})
        elif step.what in ("write", "punch", "truncate") and step.name in entries:
            file, offset, length = self.files[entries[step.name]], step.begin * GRAIN, step.count * GRAIN
            if step.what == "truncate":
                file.flight.append(("truncate", step.value, 0, b""))
            elif step.what == "write":
                file.flight.append(("write", offset, length, bytes([step.value]) * length))
            elif (end := min(offset + length, file.live()[1])) > offset:
                file.flight.append(("punch", offset, end - offset, bytes(end - offset)))
        return step.what == "sync_dir" or (step.what == "sync" and step.name in entries)

    def end(self, step: Step) -> None:
        if step.what == "sync_dir":
            self.entries, self.flight = self.live(), []
        else:
            self.files[self.live()[step.name]].sync()

    def states(self, directory: str) -> set[tuple[tuple[str, bytes], ...]]:
        kept = (
            itertools.product((0, 1), repeat=len(self.flight))
            if directory == "posix"
            else ([1] * n for n in range(len(self.flight) + 1))
        )
        found = set()
        for chosen in kept:
            entries = sorted(self.after(itertools.compress(self.flight, chosen)).items())
            numbers = sorted({file for _, file in entries})
            for contents in itertools.product(*(sorted(self.files[n].states()) for n in numbers)):
                held = dict(zip(numbers, contents, strict=True))
                found.add(tuple((name, held[file]) for name, file in entries))
        return found


def epochs_of(plan: list[Step], start: Any, directory: str) -> Iterator[set[Any]]:
    """The states at the end of each epoch."""
    definition = Definition(start)
    for step in plan:
        if definition.step(step):
            yield definition.states(directory)
            definition.end(step)
    yield definition.states(directory)


def record(path: Path, plan: list[Step]) -> Path:
    with TraceWriter(path, {}) as writer:
        do(RecordingStore(in_memory(), writer), plan)
    return path


# ---- the tests --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("directory", ["posix", "ordered"])
@given(plan=steps)
@settings(max_examples=60)
def test_every_state_and_no_other(directory, plan):
    with tempfile.TemporaryDirectory() as scratch:
        path = record(Path(scratch) / "t", plan)
        states: dict[int, set[Any]] = {}

        def judge(case: Case) -> None:
            states.setdefault(case.position, set()).add(seen(case.store))

        outcome = explore_store(path, judge, options=Options(directory=directory))
        assert outcome.verdict is Verdict.HOLDS
        assert list(states.values()) == list(epochs_of(plan, (), directory))


@given(first=steps, second=more)
@example(
    first=BEGINNINGS[3],
    second=[Step("truncate", "a"), Step("write", "a", 1, 3, 5), Step("write", "a", 3, 2, 2), Step("create", "a")],
)
@settings(max_examples=60)
def test_every_state_of_a_crash_inside_a_recovery(first, second):
    with tempfile.TemporaryDirectory() as scratch:
        path = record(Path(scratch) / "t", first)
        last = Trace(path).length
        states: list[set[Any]] = [set(), set()]

        def judge(case: Case) -> None:
            if case.level == 0:
                do(case.store, second)
            states[case.level].add(seen(case.store))

        explore_store(path, judge, depth=1, positions=[last])
        expected: set[Any] = set()
        for start in list(epochs_of(first, (), "posix"))[-1]:
            if changes(second, start):
                expected |= set().union(*epochs_of(second, start, "posix"))
        assert states[1] == expected


@given(plans=st.lists(steps, min_size=2, max_size=6))
def test_what_counts_as_alike_has_the_same_states(plans):
    known: dict[bytes, set[Any]] = {}
    for plan in plans:
        with tempfile.TemporaryDirectory() as scratch:
            trace = Trace(record(Path(scratch) / "t", plan))
            files = FileSet(trace, Options())
            for position, states in zip(epochs(trace), epochs_of(plan, (), "posix"), strict=True):
                files.advance(position)
                found = possible(CrashSet(files, Search()))
                assert found is not None
                assert known.setdefault(found.digest(), states) == states


CUT = [Step("truncate", "a", value=256), Step("truncate", "a", value=1024), Step("sync", "a")]


@given(first=steps, second=st.lists(more, min_size=1, max_size=3), looks=st.booleans())
@example(
    first=BEGINNINGS[1], second=[[Step("write", "a", 0, 2, value), Step("sync", "a")] for value in (1, 2)], looks=True
)
@example(first=BEGINNINGS[2], second=[[], CUT], looks=False)
@example(first=BEGINNINGS[2], second=[CUT, [*CUT, Step("write", "a", 0, 4, 5), Step("sync", "a")]], looks=True)
@example(first=BEGINNINGS[1], second=[[Step("unlink", "a"), Step("sync_dir")], [Step("sync_dir")]], looks=False)
@settings(max_examples=60)
def test_what_counts_as_alike_in_a_recovery_has_the_same_states(first, second, looks):
    known: dict[bytes, set[Any]] = {}
    states: set[Any] = set()

    def judge(plan: list[Step], case: Case) -> None:
        if case.level:
            states.add(seen(case.store))
            return
        if looks:
            seen(case.store)
        do(case.store, plan)

    def every(epoch: Any, here: Possible | None, level: int, part: Any) -> None:
        """In place of `stores._Epoch._once`: everything is searched, and what is alike is compared."""
        states.clear()
        epoch.search.explore(part)
        if level and here is not None:
            assert known.setdefault(here.digest(), set(states)) == states

    with tempfile.TemporaryDirectory() as scratch, mock.patch("powercut.stores._Epoch._once", every):
        path = record(Path(scratch) / "t", first)
        for plan in second:
            explore_store(path, partial(judge, plan), depth=1, positions=[Trace(path).length])


MADE = [Step("create", "a"), Step("sync_dir")]


@pytest.mark.parametrize(
    ("one", "other", "alike"),
    [
        (MADE, [Step("create", "a")], False),
        (MADE, [*MADE, Step("truncate", "a", value=512)], False),
        ([*MADE, Step("write", "a", 0, 2, 1)], [*MADE, Step("write", "a", 0, 2, 1), Step("sync", "a")], False),
        ([*MADE, Step("write", "a", 0, 2, 1)], [*MADE, Step("write", "a", 0, 2, 2)], False),
        (MADE, [*MADE, Step("write", "a", 0, 2, 1), Step("sync", "a")], False),
        (MADE, [*MADE, Step("rename", "a", value="b")], False),
        (MADE, [Step("create", "b"), Step("unlink", "b"), *MADE], True),
        ([*MADE, Step("write", "a", 0, 2, 1)], [*MADE, Step("sync", "a"), Step("write", "a", 0, 2, 1)], True),
    ],
)
def test_alike_or_not(tmp_path, one, other, alike):
    digests = set()
    for plan in (one, other):
        trace = Trace(record(tmp_path / "t", plan))
        files = FileSet(trace, Options())
        files.advance(trace.length)
        found = possible(CrashSet(files, Search()))
        assert found is not None
        digests.add(found.digest())
    assert (len(digests) == 1) == alike


def changes(plan: list[Step], start: Any) -> bool:
    """Whether `plan` does anything that counts as a change."""
    definition = Definition(start)
    for step in plan:
        definition.step(step)
    return bool(definition.flight) or any(file.flight for file in definition.files)


def test_a_finding_names_what_was_lost(tmp_path, planted):
    """A record is written before its data is synced: found, and told by file; with the sync in place, it holds."""

    def workload(store: Any, sync: bool) -> None:
        data, index = store.create("data"), store.create("index")
        store.sync_dir()
        data.write(0, b"d" * 512)
        if sync:
            data.sync()
        index.write(0, b"i" * 512)
        index.sync()
        data.sync()

    def judge(case: Case) -> None:
        if "index" not in case.store.names() or "data" not in case.store.names():
            return
        index, data = case.store.open("index", write=False), case.store.open("data", write=False)
        if index.read(0, 1) == b"i" and data.read(0, 1) != b"d":
            case.report(Problem("order", "dangling", 0, Severity.CORRUPT, "the index names data that is not there"))

    for sync in (False, True):
        path = tmp_path / f"{sync}.trace"
        with TraceWriter(path, {}) as writer:
            workload(RecordingStore(in_memory(), writer), sync)
        for jobs in (1, 2):
            outcome = explore_store(path, judge, jobs=jobs)
            assert outcome.verdict is (Verdict.HOLDS if sync else Verdict.BROKEN)
        if not sync:
            planted("store: index before data", bool(outcome.findings))
            assert "of data" in str(outcome.findings[0])


def test_several_directories(tmp_path):
    path = tmp_path / "t"
    with TraceWriter(path, {}) as writer:
        store = RecordingStore(in_memory("../other"), writer)
        store.at("../other").create("x")
        store.at("../other").sync_dir()
        store.create("x")
    found: set[tuple[tuple[str, ...], tuple[str, ...]]] = set()

    def judge(case: Case) -> None:
        found.add((tuple(case.store.names()), tuple(case.store.at("../other").names())))

    explore_store(path, judge)
    assert found == {((), ()), ((), ("x",)), (("x",), ("x",))}


FILES = 14  # names in flight: 16,384 states


@pytest.mark.parametrize(
    ("name", "state"),
    [
        ("drop one", set(range(FILES)) - {0}),
        ("keep one", {1}),
        ("prefix", set(range(7))),
        ("pairs", set(range(FILES)) - {0, 9}),
        ("none", None),
    ],
)
def test_a_sample_finds_what_the_budget_does_not_come_to(tmp_path, planted, name, state):
    """One bad state of 16,384, far from where the search begins; without one the verdict is UNKNOWN all the same."""
    path = tmp_path / "t"
    with TraceWriter(path, {}) as writer:
        store = RecordingStore(in_memory(), writer)
        for number in range(FILES):
            store.create(f"{number:02}")
    wanted = None if state is None else [f"{number:02}" for number in sorted(state)]

    def judge(case: Case) -> None:
        if case.store.names() == wanted:
            case.report(Problem("order", "names", 0, Severity.CORRUPT, "this and nothing else"))

    for jobs in (1, 2):
        outcome = explore_store(path, judge, budget=500, jobs=jobs)
        assert outcome.sampled is not None, "the search did not come to it"
        assert outcome.checks <= 500
        if state is None:
            assert (outcome.verdict, outcome.reasons, outcome.findings) == (Verdict.UNKNOWN, ["budget spent"], [])
            assert outcome.sampled.done["drop one"] == outcome.sampled.of["drop one"]
        else:
            planted(f"the one bad state of several files: {name}", outcome.verdict is Verdict.BROKEN)
            assert outcome.verdict is Verdict.BROKEN
            survived = {told.event - 1 for told in outcome.findings[0].decisions if not told.durable}
            assert survived == state, "event 0 is the tree as it was"


@pytest.mark.parametrize("broken", [True, False])
def test_a_finding_inside_a_recovery_ends_the_search_of_its_epoch(tmp_path, planted, broken):
    """A repair in place leaves 2^64 states; where they are wrong a few are enough, where they are not a budget ends."""
    path = tmp_path / "t"
    with TraceWriter(path, {}) as writer:
        RecordingStore(in_memory(), writer).create("a")

    def judge(case: Case) -> None:
        if "a" not in case.store.names():
            return
        file = case.store.open("a", write=True)
        content = file.read(0, 64 * SECTOR)
        if case.level == 0:
            file.write(0, b"x" * (64 * SECTOR))
        elif broken and 0 < content.count(b"x") < 64 * SECTOR:
            case.report(Problem("recovers", "torn", 0, Severity.CORRUPT, "half mended"))

    outcome = explore_store(path, judge, depth=1, budget=None if broken else 500)
    if broken:
        planted("states without end inside a recovery", outcome.verdict is Verdict.BROKEN)
    assert outcome.verdict is (Verdict.BROKEN if broken else Verdict.UNKNOWN)
    assert outcome.checks <= 500
