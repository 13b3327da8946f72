"""Measures the search, the recorder, and their rivals, in one run: `make bench`.

Each row is a figure with what it is held against; ratios are of medians of interleaved rounds. Nothing here passes
or fails: what a figure should be is written beside it.
"""

from __future__ import annotations

import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import numpy as np

from powercut.capture.nbd import RecordingExport
from powercut.crash.contents import Contents
from powercut.crash.finding import write_image
from powercut.crash.model import epochs
from powercut.guest.daemon import Daemon, create_image, tool
from powercut.guest.workload import Workload, draw
from powercut.session import RULES, Plan, Session
from powercut.trace import Trace, TraceWriter
from quire.nbd import Server

SIZE = 256 << 20


def row(what: str, figure: str, wanted: str = "") -> None:
    click.echo(f"{what:58} {figure:>26}   {wanted}")


class Silent:
    """A recorder that keeps nothing: what serving alone costs."""

    def issue(self, *_: object, **__: object) -> int:
        return 0

    def complete(self, *_: object) -> None:
        return


def drive(scratch: Path, operations: int, writer: TraceWriter | Silent) -> float:
    """Seconds that the workload takes on a fresh qcow2 image whose requests `writer` records."""
    image = scratch / "image"
    create_image(image, "qcow2", SIZE, {})
    os.truncate(image, SIZE + SIZE // 16 + (16 << 20))
    file = guest = 0
    if isinstance(writer, TraceWriter):
        file = writer.file("image", image.stat().st_size, "image")
        writer.base_file(file, image)
        guest = writer.file("guest", SIZE, "guest")
    export = RecordingExport(image, writer, file, frozenset())  # type: ignore[arg-type]
    socket = str(scratch / "image.sock")
    nodes = [
        {"driver": "nbd", "node-name": "image", "server": {"type": "unix", "path": socket}},
        {"driver": "qcow2", "node-name": "disk", "file": "image"},
    ]
    with Server(export, socket), Daemon(nodes) as daemon:
        client = daemon.connect()
        begin = time.perf_counter()
        marks = writer if isinstance(writer, TraceWriter) else None
        Workload(client, marks or writer, guest, 4).run(draw(7, operations, SIZE))  # type: ignore[arg-type]
        taken = time.perf_counter() - begin
        client.close()
    return taken


def recording(scratch: Path) -> None:
    """What recording costs beside the same server that keeps nothing."""
    times: dict[str, list[float]] = {"recorded": [], "served": []}
    for _ in range(5):
        with TraceWriter(scratch / "cost.trace", {}) as writer:
            times["recorded"].append(drive(scratch, 1000, writer))
        times["served"].append(drive(scratch, 1000, Silent()))
    ratio = statistics.median(times["recorded"]) / statistics.median(times["served"])
    row("recording / serving alone, 1,000 operations", f"{ratio:.2f}", "at most 1.3")


def record(path: Path, operations: int, *more: str) -> None:
    command = [sys.executable, "-m", "powercut.cli", "record", "qcow2", "--ops", str(operations), "--seed", "7", *more]
    subprocess.run([*command, "--out", str(path)], check=True, stdout=subprocess.DEVNULL)


def explored(path: Path, jobs: int) -> tuple[float, int, dict[str, object]]:
    """Seconds, peak resident bytes (the largest process) and the verdict of the command a user runs."""
    result = path.with_suffix(".json")
    command = [sys.executable, "-m", "powercut.cli", "explore", str(path), "--jobs", str(jobs), "--json", str(result)]
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, _, usage = os.wait4(process.pid, 0)
    taken = time.perf_counter() - begin
    return taken, usage.ru_maxrss * 1024, json.loads(result.read_text())


def searching(path: Path, name: str, wanted: str, jobs: int) -> float:
    taken, memory, verdict = explored(path, jobs)
    coverage = verdict["coverage"]
    assert isinstance(coverage, dict)
    how = f"{verdict['verdict']}{', exhausted' if coverage['exhausted'] else ''}"
    row(f"{name}, {jobs} process(es): {how}", f"{taken:.2f} s", wanted)
    checks = f"{coverage['epochs']:,} epochs, 2^{coverage['log2_states']:,.0f} states"
    row(f"  {checks}", f"{coverage['checks']:,} checks", "")
    row("  memory, largest process", f"{memory >> 20} MiB", "under 500 MiB")
    return taken


def plain(path: Path) -> None:
    """The same search without sets: one decided disk at a time, as a check that knows nothing of sets is run."""
    session = Session(Plan(str(path), "qcow2", 512, RULES, sets=False))
    image = session.trace.file("image")
    assert image is not None
    tasks = [(index, position, 150) for index, position in enumerate(epochs(session.trace, image.id))]
    begin = time.perf_counter()
    results = list(session.explore(tasks))
    rate = sum(result.checks for result in results) / (time.perf_counter() - begin)
    row("one decided disk at a time, one process, 150 an epoch", f"{rate:,.0f} checks/s", "at least 3,000")
    row("  exhausted by then", f"{sum(result.exhausted for result in results)} of {len(results)} epochs", "")


@contextmanager
def timed(times: list[float]) -> Iterator[None]:
    begin = time.perf_counter()
    yield
    times.append(time.perf_counter() - begin)


def rival(path: Path, scratch: Path) -> None:
    """Materialise one random state after the other and run `qemu-img check` on it."""
    trace = Trace(path)
    image = trace.file("image")
    assert image is not None
    positions = epochs(trace, image.id)
    rnd = random.Random(1)
    times: list[float] = []
    crash = scratch / "crash.qcow2"
    for _ in range(60):
        contents = Contents(trace, image)
        contents.advance(rnd.choice(positions))
        flight = contents.in_flight_atoms()
        with timed(times):
            survives = np.array([rnd.random() < 0.5 for _ in range(len(flight.atom))], dtype=bool)
            contents.rows[flight.atom[survives]] = flight.rows[survives, 0]
            write_image(contents, str(crash))
            subprocess.run([tool("qemu-img"), "check", "-q", "-f", "qcow2", str(crash)], capture_output=True)
    rate = 1 / statistics.median(times)
    row("rival: write each state out, run qemu-img check", f"{rate:,.0f} states/s", "one state each")


@click.command()
def main() -> None:
    """Run all benchmarks."""
    with tempfile.TemporaryDirectory(prefix="powercut-bench-") as directory:
        scratch = Path(directory)
        small, large = scratch / "1k.trace", scratch / "10k.trace"
        record(small, 1000)
        record(large, 10000)
        searching(small, "1,000 operations", "under 5 s", 2)
        searching(small, "1,000 operations", "", 1)
        one = searching(large, "10,000 operations", "", 1)
        two = searching(large, "10,000 operations", "under 40 s", 2)
        row("  one process / two", f"{one / two:.2f}", "")
        plain(small)
        rival(small, scratch)
        recording(scratch)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        row("memory of the benchmark itself", f"{peak} MiB", "")


if __name__ == "__main__":
    main()
