"""A crash inside a recovery against brute force: each of its states on each state it may have started from."""

from __future__ import annotations

import tempfile
from pathlib import Path

from hypothesis import assume, given

from powercut.crash.contents import Contents
from powercut.crash.disk import CrashDisk
from powercut.crash.model import epochs
from powercut.crash.recovery import Overlay, RecoveredDisk
from powercut.crash.search import BudgetSpent, Search
from powercut.crash.visited import Visited
from powercut.trace import Trace
from support.histories import SECTOR, SECTORS, states, steps, write


@given(first=steps(), second=steps())
def test_every_state_of_a_crash_inside_a_recovery(first, second):
    with tempfile.TemporaryDirectory() as scratch:
        program, recovery = Path(scratch) / "program.trace", Path(scratch) / "recovery.trace"
        before, after = write(program, first), write(recovery, second)
        trace, repair = Trace(program), Trace(recovery)
        contents, written = Contents(trace, trace.files[0]), Contents(repair, repair.files[0])
        contents.advance(trace.length)
        starts = states(before, trace.length)
        for position in epochs(repair, 0)[-2:]:
            written.advance(position)
            assume(len(starts) * len(states(after, position)) < 4000)  # as many runs as there are pairs
            disk = RecoveredDisk(CrashDisk(contents), written, 1)
            seen: set[bytes] = set()
            disk.explore(lambda disk=disk, seen=seen: seen.add(disk.read(0, SECTORS * SECTOR).tobytes()))
            wanted = set().union(*(states(after, position, start) for start in starts))
            # The recovery's trace says that sector 1 held something before; here it holds what the crash left.
            assert seen == wanted


@given(plan=steps())
def test_an_overlay_keeps_writes_and_reads_the_rest_below(plan):
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "t.trace"
        write(path, plan)
        trace = Trace(path)
        contents = Contents(trace, trace.files[0])
        contents.advance(trace.length)
        disk = CrashDisk(contents)

        def check() -> None:
            overlay = Overlay(disk)
            overlay.write(SECTOR, b"o" * SECTOR)
            overlay.zero(SECTOR, SECTOR)
            assert overlay.read(SECTOR, SECTOR) == bytes(SECTOR)
            overlay.zero(SECTOR, 2 * SECTOR)
            overlay.write(SECTOR, b"n" * SECTOR)
            assert not disk.search.path, "a whole sector that is overwritten need not be decided"
            overlay.write(100, b"m" * 10)
            below = disk.read(0, SECTORS * SECTOR).tobytes()
            overlay.zero(50, 20)
            wanted = below[:50] + bytes(20) + below[70:100] + b"m" * 10 + below[110:SECTOR]
            wanted += b"n" * SECTOR + bytes(SECTOR) + below[3 * SECTOR :]
            assert overlay.read(0, SECTORS * SECTOR) == wanted

        disk.explore(check)


def leaves(contents: Contents, repairs: list[Trace], visited: bool) -> tuple[set[bytes], int]:
    """Every state that a program leaves which is cut off, restarted and cut off again, and how often it was run. What
    it writes depends on the first sector."""
    below, seen, runs = CrashDisk(contents, Search(500)), set[bytes](), 0
    known = Visited(below)

    def run(disk: CrashDisk | RecoveredDisk, depth: int) -> None:
        nonlocal runs
        runs += 1
        repair = repairs[sum(disk.read(0, SECTOR)[:100].tolist()) % len(repairs)]
        disk.explore(lambda: seen.add(disk.read(0, SECTORS * SECTOR).tobytes()))
        if depth == 0 or (visited and known.again(disk, depth)):
            return
        written = Contents(repair, repair.files[0])
        for position in epochs(repair, 0)[-2:]:
            written.advance(position)
            crashed = RecoveredDisk(disk, written, 3 - depth)
            crashed.explore(lambda crashed=crashed: run(crashed, depth - 1))

    below.explore(lambda: run(below, 2))
    return seen, runs


@given(first=steps(), second=steps(), third=steps())
def test_nothing_is_missed_where_a_state_is_met_again(first, second, third):
    with tempfile.TemporaryDirectory() as scratch:
        paths = [Path(scratch) / f"{number}.trace" for number in range(3)]
        for path, plan in zip(paths, (first, second, third), strict=True):
            write(path, plan)
        trace, *repairs = map(Trace, paths)
        contents = Contents(trace, trace.files[0])
        contents.advance(trace.length)
        try:
            every, runs = leaves(contents, repairs, visited=False)
        except BudgetSpent:
            assume(False)
        new, fewer = leaves(contents, repairs, visited=True)
        assert new == every
        assert fewer <= runs
