"""A trace of a million operations: memory, whether the rate is steady, and whether it resumes after a SIGKILL."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from rows import explored, row

from powercut.capture.nbd import RecordingExport
from powercut.guest.daemon import Daemon, create_image
from powercut.guest.lifetime import with_parent
from powercut.guest.workload import Operation, Workload
from powercut.trace import SECTOR, Kind, Trace, TraceWriter
from quire.nbd import Server

SIZE = 256 << 20
CLUSTER = "4k"


def draw(operations: int) -> Iterator[Operation]:
    """Small writes all over the disk, and a flush after every hundred on average."""
    rnd = random.Random(7)
    for _ in range(operations):
        if rnd.random() < 0.01:
            yield Operation(Kind.FLUSH)
            continue
        length = rnd.choice((1, 1, 2, 8))
        place = rnd.randrange(SIZE // SECTOR - length)
        yield Operation(Kind.WRITE, place * SECTOR, length * SECTOR)


def record(path: Path, operations: int) -> float:
    """Record them on a qcow2 image; seconds taken."""
    image, socket = path.with_suffix(".image"), str(path.with_suffix(".sock"))
    create_image(image, "qcow2", SIZE, {"cluster_size": CLUSTER})
    os.truncate(image, SIZE + SIZE // 16 + (16 << 20))
    meta = {"recorder": "nbd", "scope": "overlap", "format": "qcow2"}
    begin = time.perf_counter()
    with TraceWriter(path, meta) as writer:
        file = writer.file("image", image.stat().st_size, "image")
        writer.base_file(file, image)
        guest = writer.file("guest", SIZE, "guest")
        export = RecordingExport(image, writer, file, frozenset())
        nodes = [
            {"driver": "nbd", "node-name": "image", "server": {"type": "unix", "path": socket}},
            {"driver": "qcow2", "node-name": "disk", "file": "image"},
        ]
        with Server(export, socket), Daemon(nodes) as daemon:
            client = daemon.connect()
            Workload(client, writer, guest, 4).run(draw(operations))
            client.close()
    image.unlink()
    return time.perf_counter() - begin


def rates(path: Path) -> tuple[float, float, int]:
    """Epochs per second of processor time in the second and in the last tenth of the walk, and peak bytes."""
    code = f"""
import resource, sys, time
from powercut.crash.explore import Task
from powercut.crash.model import epochs
from powercut.explore.session import Plan, Session
session = Session(Plan({str(path)!r}, "qcow2"))
positions = epochs(session.trace, session.image.file)
marks = [time.process_time()]
tenth = len(positions) // 10
for result in session.explore(Task(i, p, None) for i, p in enumerate(positions)):
    if (result.index + 1) % tenth == 0:
        marks.append(time.process_time())
rates = [tenth / (b - a) for a, b in zip(marks, marks[1:])]
print(rates[1], rates[9], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""
    done = subprocess.run(with_parent([sys.executable, "-c", code]), capture_output=True, text=True, check=True)
    early, late, memory = done.stdout.split()
    return float(early), float(late), int(memory)


def killed(path: Path) -> tuple[int, float]:
    """Explore, kill that when it has kept a third, and resume: epochs taken over, and seconds to the verdict."""
    command = [sys.executable, "-m", "powercut.cli", "explore", str(path), "--jobs", "2"]
    progress = Path(f"{path}.progress")
    count = sum(1 for _ in _epochs(path))
    process = subprocess.Popen(with_parent(command), stdout=subprocess.DEVNULL)
    while not progress.exists() or progress.read_bytes().count(b"\n") < count // 3:
        if process.poll() is not None:
            raise RuntimeError("the exploration ended before it could be killed")
        time.sleep(0.5)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = progress.read_bytes().count(b"\n") - 1
    return kept, explored(path, 2, "--resume").seconds


def _epochs(path: Path) -> list[int]:
    from powercut.crash.model import epochs

    return epochs(Trace(path), 0)


def million(scratch: Path, operations: int = 1_000_000) -> None:
    """Measure it."""
    path = scratch / "million.trace"
    taken = record(path, operations)
    row(f"{operations:,} small operations recorded ({path.stat().st_size >> 20:,} MiB)", f"{taken:.0f} s")
    whole = explored(path, 2)
    coverage = whole.verdict["coverage"]
    row(f"{operations:,} operations, 2 processes: {whole.how}", f"{whole.seconds:.0f} s", "steady, resumable")
    row(f"  {coverage['epochs']:,} epochs", f"{coverage['checks']:,} checks")
    row("  memory, largest process", f"{whole.memory >> 20} MiB", "under 1,024 MiB")
    early, late, memory = rates(path)
    row("  epochs a second of processor time, second / last tenth", f"{early:.0f} / {late:.0f}", "steady")
    row("  memory of that one process", f"{memory >> 20} MiB", "under 1,024 MiB")
    kept, seconds = killed(path)
    verdict = json.loads(path.with_suffix(".json").read_text())
    row(f"  killed (SIGKILL) with {kept:,} epochs kept, resumed", f"{seconds:.0f} s")
    row("  verdict and coverage as without the kill", str(verdict == whole.verdict), "True")
    path.unlink()
