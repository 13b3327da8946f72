"""How fast recordings are exhausted, with one process and with more; and the same without sets."""

from __future__ import annotations

import os
import time
from pathlib import Path

from rows import Explored, explored, record, row

from powercut.crash.explore import Task
from powercut.crash.model import epochs
from powercut.explore.session import RULES, Plan, Session


def exhausted(path: Path, name: str, jobs: int, wanted: str = "") -> Explored:
    """Explore and print what it took."""
    taken = explored(path, jobs)
    coverage = taken.verdict["coverage"]
    row(f"{name}, {jobs} process(es): {taken.how}", f"{taken.seconds:.2f} s", wanted)
    row("  seconds of processor time, all processes", f"{taken.processor:.2f} s")
    states = f"{coverage['epochs']:,} epochs ({coverage['epochs_exhausted']:,} exhausted)"
    row(f"  {states}, 2^{coverage['log2_states']:,.0f} states", f"{coverage['checks']:,} checks")
    row("  memory, largest process", f"{taken.memory >> 20} MiB", "under 500 MiB")
    return taken


def scaling(path: Path, name: str, wanted: str) -> None:
    """Explore with one process, with two, and with as many as there are processors."""
    one = exhausted(path, name, 1)
    for jobs in sorted({2, os.cpu_count() or 2}):
        many = exhausted(path, name, jobs, wanted if jobs == 2 else "")
        row(f"  one process / {jobs}", f"{one.seconds / many.seconds:.2f}", "at least 1.6" if jobs == 2 else "")


def plain(path: Path) -> None:
    """The same search without sets: one decided disk at a time, as a check that knows nothing of sets is run."""
    session = Session(Plan(str(path), "qcow2", 512, RULES, sets=False))
    tasks = [Task(i, position, 150) for i, position in enumerate(epochs(session.trace, session.image.file))]
    begin = time.process_time()
    results = list(session.explore(tasks))
    rate = sum(result.checks for result in results) / (time.process_time() - begin)
    row("one decided disk at a time, 150 an epoch, processor time", f"{rate:,.0f} checks/s", "at least 3,000")
    row("  exhausted by then", f"{sum(result.exhausted for result in results)} of {len(results)} epochs")


def searching(scratch: Path) -> None:
    """10,000 operations by one process and more; 1,000 without sets; clusters of 512 bytes."""
    large, small, tiny = scratch / "10k.trace", scratch / "1k.trace", scratch / "512.trace"
    record(large, 10_000)
    scaling(large, "10,000 operations", "under 10 s")
    large.unlink()
    record(small, 1_000)
    plain(small)
    record(tiny, 300, "--option", "cluster_size=512", "--size", "64M")
    exhausted(tiny, "300 operations, clusters of 512 bytes", 1)


def hundred_thousand(scratch: Path) -> None:
    """100,000 operations."""
    path = scratch / "100k.trace"
    record(path, 100_000)
    scaling(path, "100,000 operations", "under 150 s")
    path.unlink()
