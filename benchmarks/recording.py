"""What recording costs beside the same server that keeps nothing: medians of interleaved rounds."""

from __future__ import annotations

import os
import statistics
import time
from pathlib import Path

from rows import row

from powercut.capture.nbd import RecordingExport
from powercut.guest.daemon import Daemon, create_image
from powercut.guest.workload import Workload, draw
from powercut.trace import TraceWriter
from quire.nbd import Server

SIZE = 256 << 20
ROUNDS = 7


class Silent:
    """A recorder that keeps nothing: what serving alone costs."""

    def issue(self, *_: object, **__: object) -> int:
        return 0

    def complete(self, *_: object) -> None:
        return


def drive(scratch: Path, operations: int, writer: TraceWriter | Silent) -> tuple[float, float]:
    """Seconds, and seconds of this process's processor time, that the workload takes on a fresh qcow2 image whose
    requests `writer` records."""
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
        begin, used = time.perf_counter(), time.process_time()
        Workload(client, writer, guest, 4).run(draw(7, operations, SIZE))  # type: ignore[arg-type]
        taken = time.perf_counter() - begin, time.process_time() - used
        client.close()
    return taken


def recording(scratch: Path) -> None:
    """Compare."""
    wall: dict[str, list[float]] = {"recorded": [], "served": []}
    used: dict[str, list[float]] = {"recorded": [], "served": []}
    for _ in range(ROUNDS):
        for name in wall:
            if name == "recorded":
                with TraceWriter(scratch / "cost.trace", {}) as writer:
                    seconds, processor = drive(scratch, 1000, writer)
            else:
                seconds, processor = drive(scratch, 1000, Silent())
            wall[name].append(seconds)
            used[name].append(processor)
    for times, what in ((wall, "recording / serving alone, 1,000 operations"), (used, "  the same, processor time")):
        ratio = statistics.median(times["recorded"]) / statistics.median(times["served"])
        row(what, f"{ratio:.2f}", "at most 1.3")
