"""The search against brute force: on small random traces both must see exactly the same states."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from powercut.crash.contents import Contents
from powercut.crash.disk import CrashDisk
from powercut.crash.explore import explore_epoch
from powercut.crash.model import epochs
from powercut.crash.search import BudgetSpent, Search
from powercut.errors import Nondeterministic
from powercut.trace import Trace
from powercut.verdict import Problem, Severity
from support.histories import SECTOR, SECTORS, states, steps, write


def open_contents(path: Path) -> tuple[Trace, Contents]:
    trace = Trace(path)
    image = trace.file("image")
    assert image is not None
    return trace, Contents(trace, image)


def all_states(contents: Contents) -> tuple[set[bytes], int]:
    """Every state that a check which reads the whole disk is shown, and how many runs that took."""
    disk = CrashDisk(contents)
    seen: set[bytes] = set()
    disk.explore(lambda: seen.add(disk.read(0, SECTORS * SECTOR).tobytes()))
    return seen, disk.search.checks


@given(plan=steps())
def test_every_state_and_no_other(plan):
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "t.trace"
        events = write(path, plan)
        trace, contents = open_contents(path)
        union = set()
        for position in epochs(trace, 0):
            contents.advance(position)
            seen, checks = all_states(contents)
            assert seen == states(events, position)
            assert checks == len(seen), "one run for each state that can be told apart"
            assert 2 ** float(np.log2(contents.undecided()).sum()) == pytest.approx(len(seen))
            union |= seen
        for t in range(trace.length + 1):
            assert states(events, t) <= union, "an epoch's end must stand for every moment in it"


@given(plan=steps(), lying=st.integers(1, 3))
def test_last_flushes_that_lied(plan, lying):
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "t.trace"
        events = write(path, plan)
        trace = Trace(path)
        contents = Contents(trace, trace.files[0], lying=lying)
        for position in epochs(trace, 0):
            contents.advance(position)
            assert all_states(contents)[0] == states(events, position, lying=lying)


@given(plan=steps(), seed=st.integers(0, 1 << 16))
def test_lazy_check_finds_a_bad_state_exactly_if_there_is_one(plan, seed):
    """A check that reads a sector, and depending on it another, and so on: BROKEN exactly where brute force says so."""
    rnd = random.Random(seed)
    order = {value: rnd.sample(range(SECTORS), SECTORS) for value in range(256)}
    bad = {value for value in range(256) if rnd.random() < 0.3}

    def breaks(read) -> bool:
        sector, seen = rnd_first, set()
        for _ in range(3):
            seen.add(sector)
            value = int(read(sector))
            following = [s for s in order[value] if s not in seen]
            if value in bad and len(seen) > 1:
                return True
            sector = following[0]
        return False

    rnd_first = rnd.randrange(SECTORS)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "t.trace"
        events = write(path, plan)
        trace, contents = open_contents(path)
        for index, position in enumerate(epochs(trace, 0)):
            contents.advance(position)

            def judge(disk, report, enough):
                if breaks(lambda sector: disk.read(sector * SECTOR, 1)[0]):
                    report(Problem("structure", "bad", 0, Severity.CORRUPT, "bad"))

            result = explore_epoch(index, contents, judge)
            truth = any(breaks(lambda sector, s=state: s[sector * SECTOR]) for state in states(events, position))
            assert bool(result.found) == truth
            assert result.exhausted or truth
            if truth:
                plain = explore_epoch(index, contents, judge, sets=False)
                assert plain.found[0].decisions == result.found[0].decisions


@given(plan=steps())
def test_parts_cover_what_the_whole_covers(plan):
    """Two parts that read two sectors each: every pair of contents is seen, in a sum of runs and not a product."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "t.trace"
        events = write(path, plan)
        trace, contents = open_contents(path)
        contents.advance(trace.length)
        disk = CrashDisk(contents)
        seen: set[tuple[int, bytes]] = set()

        def part(first: int) -> None:
            seen.add((first, disk.read(first * SECTOR, 2 * SECTOR).tobytes()))

        def whole() -> None:
            disk.read(0, 1)
            for first in (0, 1, 2):
                disk.explore(lambda first=first: part(first))

        disk.explore(whole)
        wanted = {
            (first, state[first * SECTOR : (first + 2) * SECTOR])
            for state in states(events, trace.length)
            for first in (0, 1, 2)
        }
        assert seen == wanted
        assert not disk.search.path


def racing(tmp_path: Path, count: int) -> Contents:
    """`count` sectors, each rewritten and not flushed."""
    from powercut.trace import Kind, TraceWriter

    with TraceWriter(tmp_path / "t.trace", {}) as writer:
        file = writer.file("disk", count * SECTOR, "image")
        for sector in range(count):
            writer.complete(writer.issue(Kind.WRITE, file, sector * SECTOR, SECTOR, data=b"x" * SECTOR))
    trace, contents = open_contents(tmp_path / "t.trace")
    contents.advance(trace.length)
    return contents


def test_a_check_that_does_not_repeat_itself_is_found_out(tmp_path):
    """Control: a check whose reads depend on something else than what it read."""
    contents = racing(tmp_path, 4)
    calls = iter(range(100))
    disk = CrashDisk(contents)
    with pytest.raises(Nondeterministic):
        disk.explore(lambda: [disk.read(s * SECTOR, 1) for s in ([0, 1] if next(calls) % 2 == 0 else [2, 3])])
    contents.advance(contents.position)
    result = explore_epoch(0, contents, lambda disk, report, enough: disk.read((next(calls) % 3) * SECTOR, 1))
    assert result.unknown
    assert not result.exhausted


def test_a_budget_ends_the_search_without_claiming_exhaustion(tmp_path):
    contents = racing(tmp_path, 8)
    disk = CrashDisk(contents, Search(budget=100))
    with pytest.raises(BudgetSpent):
        disk.explore(lambda: disk.read(0, 8 * SECTOR))
    assert disk.search.checks == 100
    result = explore_epoch(0, contents, lambda disk, report, enough: disk.read(0, 8 * SECTOR), budget=255)
    assert (result.unknown, result.exhausted, result.checks) == ("budget spent", False, 255)
    result = explore_epoch(0, contents, lambda disk, report, enough: disk.read(0, 8 * SECTOR), budget=256)
    assert (result.unknown, result.exhausted, result.checks) == (None, True, 256)


def test_variants_show_all_and_decide_nothing(tmp_path):
    contents = racing(tmp_path, 8)
    disk = CrashDisk(contents)

    def check() -> None:
        variants = disk.variants(100, 3 * SECTOR)
        assert [(span.start, span.stop) for span in variants.spans] == [(0, 412), (412, 924), (924, 1436), (1436, 1536)]
        assert not disk.search.path
        assert disk.read(SECTOR, 1)[0] in (0, ord("x"))
        assert len(disk.variants(0, 8 * SECTOR).spans) == 7

    disk.explore(check)
    assert disk.search.checks == 2


@given(plan=steps(partial=True), atom=st.sampled_from([512, 1024]), length=st.sampled_from([256, 512, 1024]))
def test_many_ranges_at_once_are_what_each_is_alone(plan, atom, length):
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "t.trace"
        write(path, plan)
        trace = Trace(path)
        contents = Contents(trace, trace.files[0], atom=atom)
        offsets = np.arange(0, (SECTORS + 1) * SECTOR, 256)
        for position in epochs(trace, 0):
            contents.advance(position)
            disk = CrashDisk(contents)
            first, several = disk.gather(offsets, length)
            alone = [disk.variants(offset, length) for offset in offsets.tolist()]
            assert (first == np.stack([variants.first for variants in alone])).all()
            assert [i for i, _ in several] == [i for i, variants in enumerate(alone) if variants.spans]
            for i, variants in several:
                assert [(s.start, s.stop, s.others.tolist()) for s in variants.spans] == [
                    (s.start, s.stop, s.others.tolist()) for s in alone[i].spans
                ]


def test_large_atoms_survive_whole(tmp_path):
    """With atoms of 4 KiB, eight sectors written one by one live or die together with the newest before them."""
    contents = racing(tmp_path, 8)
    trace = contents.trace
    large = Contents(trace, trace.files[0], atom=4096)
    large.advance(trace.length)
    disk = CrashDisk(large)
    seen = set()
    disk.explore(lambda: seen.add(disk.read(0, 4096).tobytes()))
    assert seen == {b"x" * SECTOR * n + bytes(SECTOR) * (8 - n) for n in range(9)}


def test_partial_sectors_keep_what_was_there(tmp_path):
    """A write of a part of a sector leaves its bytes over what the cache held when it was issued."""
    from powercut.trace import Kind, TraceWriter

    with TraceWriter(tmp_path / "t.trace", {}) as writer:
        file = writer.file("disk", SECTOR, "image")
        for offset, data in ((0, b"a" * 100), (50, b"b" * 100)):
            writer.complete(writer.issue(Kind.WRITE, file, offset, len(data), data=data))
    trace, contents = open_contents(tmp_path / "t.trace")
    contents.advance(trace.length)
    disk = CrashDisk(contents)
    seen = set()
    disk.explore(lambda: seen.add(disk.read(0, SECTOR).tobytes()))
    first = b"a" * 100 + bytes(412)
    assert seen == {bytes(SECTOR), first, b"a" * 50 + b"b" * 100 + bytes(362)}
