"""Recorders that die, meet a full disk, or have several threads: what is whole stays, and the rest is said."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from powercut.errors import EnvironmentFault
from powercut.trace import NEVER, Kind, TraceWriter
from support.traces import loaded

# ---- a recorder that dies, or cannot go on

ENDLESS = """
import sys
from powercut.trace import Kind, TraceWriter
writer = TraceWriter(sys.argv[1], {})
file = writer.file("image", 1 << 30, "image")
number = 0
while True:
    data = number.to_bytes(8, "little") * (64 * (1 + number % 50))
    position = writer.issue(Kind.WRITE, file, number * 512 % (1 << 29), len(data), data=data)
    writer.complete(position)
    number += 1
    if number % 50 == 0:
        print(number, flush=True)
"""


@pytest.mark.parametrize("after", [1, 7])
def test_a_killed_recorder_leaves_every_whole_record(tmp_path, after):
    """SIGKILL in the middle: every write that was reported is there, byte for byte, and in its order."""
    process = subprocess.Popen([sys.executable, "-c", ENDLESS, tmp_path / "t"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for _ in range(after):
        reported = int(process.stdout.readline())
    process.send_signal(signal.SIGKILL)
    process.wait(30)
    process.stdout.close()
    trace = loaded(tmp_path / "t")
    assert reported == 50 * after
    assert len(trace.events) >= reported
    assert (trace.events["completed"][: reported - 1] != NEVER).all(), "only the newest completions may be missing"
    for number, event in enumerate(trace.events):
        assert bytes(trace.payload(event)) == number.to_bytes(8, "little") * (64 * (1 + number % 50))


FULL = """
import resource, signal, sys
from powercut.errors import EnvironmentFault
from powercut.trace import Kind, TraceWriter
if sys.argv[2] != "0":
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
writer = TraceWriter(sys.argv[1], {})
file = writer.file("image", 1 << 30, "image")
done = 0
try:
    while done < 1000:
        writer.complete(writer.issue(Kind.WRITE, file, done * 512, 10000, data=b"x" * 10000))
        done += 1
except EnvironmentFault as fault:
    print(fault, file=sys.stderr)
refused = 0
for _ in range(200):  # whoever goes on recording must not make it unreadable
    try:
        writer.complete(writer.issue(Kind.FLUSH, file))
    except EnvironmentFault:
        refused += 1
writer.close()
print(done, refused)
"""


def until_full(path: Path, limit: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL, path, str(limit)], capture_output=True, text=True, timeout=60, check=True
    )
    number, refused = map(int, done.stdout.split())
    assert 10 < number < 1000
    assert refused == 200
    assert done.stderr.startswith(f"{path}: recording stopped at byte ")
    assert "Traceback" not in done.stderr
    trace = loaded(path)
    assert trace.truncated is not None, "a reader is told that the end is missing"
    assert "read up to there" in trace.truncated
    assert number <= len(trace.events) <= number + 1
    assert (trace.events["completed"][: number - 1] != NEVER).all()


@pytest.mark.parametrize("limit", [300_000, 300_700, 301_312])
def test_a_limit_on_the_file_stops_the_recording_and_leaves_it_readable(tmp_path, limit):
    until_full(tmp_path / "t", limit)


def test_a_full_disk_stops_the_recording_and_leaves_it_readable(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"a small tmpfs cannot be mounted: {mounted.stderr.decode().strip()}")
    try:
        until_full(disk / "t", 0)
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)  # the trace is still mapped


def test_a_full_disk_from_the_start(tmp_path):
    if not os.path.exists("/dev/full"):
        pytest.skip("there is no /dev/full")
    with pytest.raises(EnvironmentFault, match="No space left"):
        TraceWriter("/dev/full", {})


# ---- several threads


def test_threads_write_whole_records_and_each_keeps_its_order(tmp_path):
    threads, each = 8, 200
    with TraceWriter(tmp_path / "t", {}) as writer:
        file = writer.file("image", 1 << 30, "image")
        start = threading.Barrier(threads)

        def work(me: int) -> None:
            rnd = random.Random(me)
            start.wait()
            for number in range(each):
                data = bytes([me]) * rnd.randrange(1, 3000)
                writer.complete(writer.issue(Kind.WRITE, file, rnd.randrange(9999), len(data), data=data, ref=number))

        running = [threading.Thread(target=work, args=(me,)) for me in range(threads)]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()
    trace = loaded(tmp_path / "t")
    assert len(trace.events) == threads * each
    order: dict[int, list[int]] = {me: [] for me in range(threads)}
    for event in trace.events:
        data = bytes(trace.payload(event))
        assert data == data[:1] * len(data)
        order[data[0]].append(int(event["ref"]))
    assert all(refs == list(range(each)) for refs in order.values())
    assert (trace.events["completed"] > trace.events["issued"]).all()
