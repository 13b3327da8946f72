"""What recording costs beside the same server that keeps nothing: medians of interleaved rounds."""

from __future__ import annotations

import mmap
import os
import statistics
import time
from pathlib import Path

from rows import row

from powercut.capture.nbd import RecordingExport
from powercut.guest.daemon import Daemon, create_image
from powercut.guest.workload import Workload, draw
from powercut.trace import SECTOR, TraceWriter
from quire.nbd import Server
from quire.nbd_protocol import Data

SIZE = 256 << 20
ROUNDS = 7


class Silent:
    """A recorder that keeps nothing."""

    def issue(self, *_: object, **__: object) -> int:
        return 0

    def complete(self, *_: object) -> None:
        return


class Served:
    """The file at `path`, memory mapped: what serving alone costs."""

    block_size = SECTOR

    def __init__(self, path: Path) -> None:
        with open(path, "r+b") as file:
            self._map = mmap.mmap(file.fileno(), 0)
        self.size = len(self._map)
        self._view = memoryview(self._map)

    def read(self, offset: int, length: int) -> Data:
        return self._view[offset : offset + length]

    def write(self, offset: int, data: Data, fua: bool) -> None:
        self._view[offset : offset + len(data)] = data

    def zero(self, offset: int, length: int, may_unmap: bool, fua: bool) -> None:
        self._view[offset : offset + length] = bytes(length)

    def discard(self, offset: int, length: int) -> None:
        self.zero(offset, length, True, False)

    def flush(self) -> None:
        return


def drive(scratch: Path, operations: int, writer: TraceWriter | Silent) -> tuple[float, float]:
    """Seconds, and seconds of this process's processor time, that the workload takes on a fresh qcow2 image whose
    requests `writer` records."""
    image = scratch / "image"
    create_image(image, "qcow2", SIZE, {})
    os.truncate(image, SIZE + SIZE // 16 + (16 << 20))
    guest = 0
    export: RecordingExport | Served = Served(image)
    if isinstance(writer, TraceWriter):
        file = writer.file("image", image.stat().st_size, "image")
        writer.base_file(file, image)
        guest = writer.file("guest", SIZE, "guest")
        export = RecordingExport(image, writer, file, frozenset())
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
