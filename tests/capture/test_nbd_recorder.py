"""The recording export under the real server and client: what overlapped is told, lies are marked, bytes are right."""

from __future__ import annotations

import errno
import os
import random
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from powercut.capture.nbd import RecordingExport
from powercut.crash.model import Durability
from powercut.guest.nbd_client import Client
from powercut.report import tracetext
from powercut.trace import NEVER, SECTOR, Flag, Kind, Trace, TraceWriter
from quire.nbd import Server
from quire.nbd_protocol import Command

SIZE = 8 << 20
LYING = frozenset({"flush"})


@contextmanager
def recording(tmp_path: Path, lie: frozenset[str] = frozenset(), holding: type | None = None) -> Iterator[Client]:
    image = tmp_path / "image"
    image.write_bytes(bytes(SIZE))
    socket = str(tmp_path / "s")
    with TraceWriter(tmp_path / "t", {}) as writer:
        export = (holding or RecordingExport)(image, writer, writer.file("image", SIZE, "image"), lie)
        with Server(export, socket), Client(socket) as client:
            yield client
        export.write_back()


def recorded(tmp_path: Path) -> Trace:
    trace = Trace(tmp_path / "t")
    trace.verify()
    return trace


def drive(client: Client, count: int, depth: int, seed: int = 1) -> list[bytes]:
    """Random writes with `depth` on the way; returns what was written, in order."""
    rnd = random.Random(seed)
    written = []
    for number in range(count):
        while client.pending >= depth:
            assert not client.wait().error
        data = rnd.randbytes(SECTOR * rnd.choice((1, 8, 128, 1024)))
        client.submit(Command.WRITE, rnd.randrange((SIZE - len(data)) // SECTOR) * SECTOR, data=data, tag=number)
        written.append(data)
    while client.pending:
        assert not client.wait().error
    return written


def test_at_depth_16_requests_overlap_and_every_byte_is_there(tmp_path, figure):
    with recording(tmp_path) as client:
        written = drive(client, 300, 16)
        read = bytes(client.read(0, SIZE))
    assert read == (tmp_path / "image").read_bytes()
    trace = recorded(tmp_path)
    events = trace.events
    assert [bytes(trace.payload(event)) for event in events] == written, "in the order in which they were asked"
    assert (np.diff(events["issued"]) > 0).all()
    assert (events["completed"] != NEVER).all()
    assert (events["completed"] > events["issued"]).all()
    assert not events["result"].any()
    overlapping = tracetext.overlapping(trace)
    figure("nbd recorder at depth 16: writes issued while another was in flight", f"{overlapping}/300")
    assert overlapping > 0
    latest = np.zeros(SIZE, dtype=np.uint8)
    for event in events[np.argsort(events["completed"])]:
        data = trace.payload(event)
        latest[event["offset"] : event["offset"] + len(data)] = np.frombuffer(data, dtype=np.uint8)
    assert latest.tobytes() == (tmp_path / "image").read_bytes(), "completion is the order in which they took effect"


@given(data=st.data())
@settings(max_examples=20)
def test_what_is_read_is_what_was_written_last(data):
    """Reads of any range are put together from the trace, the image as it was, and zeros."""
    sectors = 16
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder) / "image"
        content = bytearray(random.Random(1).randbytes(sectors * SECTOR))
        image.write_bytes(content)
        with TraceWriter(f"{folder}/t", {}) as writer:
            export = RecordingExport(image, writer, writer.file("image", len(content), "image"), frozenset())
            with Server(export, f"{folder}/s"), Client(f"{folder}/s") as client:
                for number in range(data.draw(st.integers(1, 8))):
                    first = data.draw(st.integers(0, sectors - 1))
                    count = data.draw(st.integers(1, sectors - first))
                    begin, end = first * SECTOR, (first + count) * SECTOR
                    if data.draw(st.booleans()):
                        client.write(begin, new := bytes([number + 1]) * (end - begin))
                    else:
                        client.zero(begin, end - begin)
                        new = bytes(end - begin)
                    content[begin:end] = new
                    first = data.draw(st.integers(0, sectors - 1))
                    count = data.draw(st.integers(1, sectors - first))
                    begin, end = first * SECTOR, (first + count) * SECTOR
                    assert bytes(client.read(begin, end - begin)) == content[begin:end]
                assert image.read_bytes() == random.Random(1).randbytes(sectors * SECTOR), "the file is only read"
            export.write_back()
        assert image.read_bytes() == content


def test_control_at_depth_1_nothing_overlaps(tmp_path):
    with recording(tmp_path) as client:
        drive(client, 50, 1)
    assert tracetext.overlapping(recorded(tmp_path)) == 0


def test_every_kind_of_request_is_an_event(tmp_path):
    with recording(tmp_path) as client:
        client.write(0, b"w" * SECTOR, fua=True)
        client.write(SECTOR, b"v" * SECTOR)
        client.zero(4096, 8192)
        client.zero(16384, 4096, may_unmap=True)
        client.discard(65536, 65536)
        client.read(0, SECTOR)
        client.flush()
    events = recorded(tmp_path).events
    assert list(zip(*(events[name].tolist() for name in ("kind", "offset", "length", "flags")), strict=True)) == [
        (Kind.WRITE, 0, SECTOR, Flag.FUA),
        (Kind.WRITE, SECTOR, SECTOR, 0),
        (Kind.ZERO, 4096, 8192, 0),
        (Kind.ZERO, 16384, 4096, Flag.MAY_UNMAP),
        (Kind.DISCARD, 65536, 65536, 0),
        (Kind.FLUSH, 0, 0, 0),
    ]


@pytest.mark.parametrize("lie", [frozenset(), LYING], ids=["honest", "lying"])
def test_a_lie_is_marked_and_makes_nothing_durable(tmp_path, lie):
    """The honest half is the control."""
    with recording(tmp_path, lie) as client:
        client.write(0, b"w" * SECTOR, fua=True)
        client.write(SECTOR, b"v" * SECTOR)
        client.flush()
    trace = recorded(tmp_path)
    assert trace.events["flags"].tolist() == ([0, 0, Flag.LIED] if lie else [Flag.FUA, 0, 0])
    disk = Durability(trace, 0)
    disk.advance(trace.length)
    assert len(disk.in_flight) == (2 if lie else 0)
    assert disk.writer[:2].tolist() == ([0, 0] if lie else [1, 2])


class Holding(RecordingExport):
    """Keeps the write to sector 5 back until it is told to go on."""

    kept: list[object] = []  # noqa: RUF012 - one test uses it

    def held(self, request: object) -> bool:
        if request.kind is Command.WRITE and request.offset == 5 * SECTOR:  # type: ignore[attr-defined]
            self.kept.append(request)
            return True
        return False


def test_a_flush_does_not_cover_what_completed_while_it_ran(tmp_path):
    """A write held back in the server, a flush that begins and ends meanwhile, and one after it."""
    Holding.kept.clear()
    with recording(tmp_path, holding=Holding) as client:
        client.write(0, b"a" * SECTOR)
        client.submit(Command.WRITE, 5 * SECTOR, data=b"b" * SECTOR, tag="late")
        client.flush()
        (request,) = Holding.kept
        request.connection.finish(request)
        assert client.wait().tag == "late"
    trace = recorded(tmp_path)
    _, late, flush = trace.events
    assert late["issued"] < flush["issued"] < flush["completed"] < late["completed"]
    disk = Durability(trace, 0)
    disk.advance(trace.length)
    assert disk.writer[[0, 5]].tolist() == [1, 0]
    assert disk.in_flight == [1]


def test_an_order_written_down_by_hand(tmp_path):
    """The same as positions: issue, flush issued, write done, flush done: only the next one covers it."""
    with TraceWriter(tmp_path / "t", {}) as writer:
        file = writer.file("image", SIZE, "image")
        write = writer.issue(Kind.WRITE, file, 0, SECTOR, data=b"x" * SECTOR)
        flush = writer.issue(Kind.FLUSH, file)
        writer.complete(write)
        writer.complete(flush)
        between = writer._position
        writer.complete(writer.issue(Kind.FLUSH, file))
    disk = Durability(recorded(tmp_path), 0)
    disk.advance(between)
    assert disk.in_flight == [0]
    disk.advance(recorded(tmp_path).length)
    assert (disk.in_flight, disk.writer[0]) == ([], 1)


def test_requests_that_were_refused_are_no_events(tmp_path):
    with recording(tmp_path) as client:
        for offset in (SIZE, 100):
            client.submit(Command.WRITE, offset, data=b"x" * SECTOR)
            assert client.wait().error in (errno.ENOSPC, errno.EINVAL)
        client.write(0, b"x" * SECTOR)
    assert len(recorded(tmp_path).events) == 1


def test_two_connections_at_once(tmp_path):
    """Each keeps its own order; every write is there once."""
    with recording(tmp_path) as first:

        def other() -> None:
            with Client(first.path) as second:
                drive(second, 100, 8, seed=2)

        thread = threading.Thread(target=other)
        thread.start()
        drive(first, 100, 8, seed=3)
        thread.join()
    events = recorded(tmp_path).events
    assert len(events) == 200
    assert (events["completed"] != NEVER).all()


FULL = """
import resource, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from capture.test_nbd_recorder import drive, recording
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (9 << 20, 9 << 20))
try:
    with recording(Path(sys.argv[1])) as client:
        try:
            drive(client, 300, 16)
        except AssertionError:
            print("a request failed", flush=True)
except Exception as error:
    print(type(error).__name__, error)
"""


def test_a_trace_that_cannot_grow_ends_the_recording(tmp_path):
    """The guest hears an error, whoever records hears why, and the trace so far is whole."""
    done = subprocess.run(
        [sys.executable, "-c", FULL, tmp_path, Path(__file__).parents[1]],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.stdout.startswith("a request failed\nEnvironmentFault "), (done.stdout, done.stderr)
    assert "recording stopped" in done.stdout
    assert len(recorded(tmp_path).events) > 10
