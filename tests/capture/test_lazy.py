"""Bytes that the recorder leaves in the files: the trace holds every version that was written, whoever destroyed it."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from tests.support.filetrace import files_of, files_under

from powercut.capture import lazy
from powercut.cli import main
from powercut.trace import NEVER, Kind, Trace

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")

PRELUDE = """
import ctypes, fcntl, mmap, os, sys, threading
def block(seed, length):
    return bytes((seed * 37 + i * (seed | 1)) & 255 for i in range(256)) * (length // 256 + 1)
def put(fd, seed, length, at):
    return os.pwrite(fd, block(seed, length)[:length], at)
libc = ctypes.CDLL(None)
def punch(fd, mode, at, length):
    libc.fallocate(fd, mode, ctypes.c_long(at), ctypes.c_long(length))
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def run(folder: Path, program: str, *options: str):
    script = folder.parent / "program.py"
    script.write_text(f"{PRELUDE}\nos.chdir({str(folder)!r})\n{program}")
    path = folder.parent / "t"
    command = ["capture", "--out", str(path), "--dir", str(folder), *options, "--", sys.executable, str(script)]
    return CliRunner().invoke(main, command), path


def told(trace: Trace) -> list[tuple]:
    """The events in words that do not depend on inode numbers or on the time."""
    names = {info.id: info.name for info in trace.files}
    events = []
    for event in trace.events:
        kind = Kind(event["kind"])
        body = bytes(trace.payload(event)) if kind is Kind.WRITE else b""
        events.append((kind.name, names[event["file"]], int(event["offset"]), int(event["length"]), body))
    return events


def random_program(seed: int) -> str:
    """Calls on a few files, through descriptors of every kind, that mostly destroy what earlier ones wrote."""
    draw = random.Random(seed)
    lines = ["fds = {}"]
    flags = ["os.O_RDWR", "os.O_WRONLY", "os.O_WRONLY | os.O_APPEND", "os.O_RDWR | os.O_DSYNC"]
    opened: list[str] = []
    for number in range(120):
        name = draw.choice("abc")
        at, length = draw.randrange(0, 150_000), draw.choice([1, 700, 4096, 5000, 16384, 70_000])
        if number < 4 or draw.random() < 0.1:
            truncating = draw.choice(["", "", " | os.O_TRUNC"])
            lines.append(f"fds[{number}] = os.open({name!r}, os.O_CREAT | {draw.choice(flags)}{truncating}, 0o600)")
            opened.append(f"fds[{number}]")
            continue
        fd = draw.choice(opened)
        lines.append(
            draw.choices(
                [
                    f"put({fd}, {number}, {length}, {at})",
                    f"os.write({fd}, block({number}, {length})[:{length}])",
                    f"os.writev({fd}, [block({number}, {length})[:{length}], b'tail'])",
                    f"os.lseek({fd}, {at}, os.SEEK_SET)",
                    f"os.ftruncate({fd}, {at})",
                    f"os.path.exists({name!r}) and os.truncate({name!r}, {at})",
                    f"punch({fd}, 3, {at}, {length})",
                    f"punch({fd}, 16, {at}, {length})",
                    f"os.path.exists({name!r}) and os.unlink({name!r})",
                    f"os.path.exists({name!r}) and os.rename({name!r}, {draw.choice('abc')!r})",
                    f"os.fork() or (put({fd}, {number + 100}, {length}, {at}), os._exit(0)); os.wait()",
                ],
                [40, 15, 5, 10, 3, 2, 4, 3, 2, 2, 4],
            )[0]
        )
    return "\n".join(lines)


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
@pytest.mark.parametrize("seed", range(6))
def test_strace_sees_the_same_of_a_random_program(folder, seed):
    program = random_program(seed)
    seen = []
    for recorder in ("preload", "strace"):
        result, path = run(folder, program, "--recorder", recorder)
        assert result.exit_code == 0, f"{recorder}: {result.output}"
        trace = Trace(path)
        trace.verify()
        assert files_of(trace) == files_under(folder)
        seen.append(told(trace))
        for file in folder.iterdir():
            file.unlink()
    assert len(seen[0]) > 60
    for one, other in zip(*seen, strict=True):
        assert one == other, (one[:4], other[:4])


WAYS = {
    "a write over it": "put(os.open('x', os.O_RDWR), 2, 8192, 100)",
    "a write through a descriptor that cannot read": "put(os.open('x', os.O_WRONLY), 2, 8192, 100)",
    "a small write": "put(os.open('x', os.O_RDWR), 2, 10, 5000)",
    "a truncation": "os.ftruncate(fd, 100)",
    "a truncation by name": "os.truncate('x', 100)",
    "an open that truncates": "os.open('x', os.O_WRONLY | os.O_TRUNC)",
    "a hole": "punch(fd, 3, 4096, 20000)",
    "zeros": "punch(fd, 16, 4096, 20000)",
    "the loss of its name": "os.unlink('x')",
    "the loss of its name while another is left": "os.link('x', 'y'); os.unlink('x')",
    "a file renamed over it": "os.close(os.open('y', os.O_CREAT)); os.rename('y', 'x')",
    "a move elsewhere": "os.rename('x', '../moved')",
    "a move of its directory": "os.mkdir('d'); os.rename('x', 'd/x'); os.rename('d', '../moved')",
    "a child process": "os.fork() or (put(os.open('x', os.O_RDWR), 2, 8192, 100), os._exit(0)); os.wait()",
    "the end of it without a name": "os.unlink('x'); put(fd, 2, 50000, 8192); os.ftruncate(fd, 0)",
    "a mapping, before its bytes are gone": "mmap.mmap(fd, 4096).write(b'new'); os.unlink('x')",
}


def written(seed: int, length: int) -> bytes:
    return bytes((seed * 37 + i * (seed | 1)) & 255 for i in range(256)) * (length // 256) + bytes(
        (seed * 37 + i * (seed | 1)) & 255 for i in range(length % 256)
    )


@pytest.mark.parametrize("way", WAYS)
def test_what_is_destroyed_was_saved(folder, planted, monkeypatch, way):
    """And without what was saved, the capture is refused, unless the bytes are only elsewhere."""
    program = f"fd = os.open('x', os.O_CREAT | os.O_RDWR)\nput(fd, 1, 100_000, 0)\n{WAYS[way]}"
    result, path = run(folder, program)
    assert result.exit_code == 0, result.output
    trace = Trace(path)
    assert bytes(trace.payload(trace.events[trace.events["kind"] == Kind.WRITE][0])) == written(1, 100_000)

    shutil.rmtree(folder)
    folder.mkdir()
    shutil.rmtree(folder.parent / "moved", ignore_errors=True)
    (folder.parent / "moved").unlink(missing_ok=True)
    real = lazy.find
    monkeypatch.setattr(lazy, "find", lambda calls, undos, *rest: real(calls, [], *rest))
    result, _ = run(folder, program)
    if "move" in way or "another" in way:
        assert result.exit_code == 0, result.output
    else:
        planted("bytes that were not saved", "were changed later: it was written past the recorder" in result.output)
        assert result.exit_code == 2


def test_bytes_that_something_unseen_changed_are_not_taken_for_the_programs(folder, planted):
    """Found though the end is as it was recorded, which a comparison of the end alone would miss."""
    unseen = "subprocess.run(['sh', '-c', 'printf sly | dd of=x bs=1 seek=70000 conv=notrunc status=none'], env={})"
    for ending, there in (("put(fd, 2, 200_000, 0)", True), ("", True), ("os._exit(0)", False)):
        change = unseen if there else ""
        program = (
            f"import subprocess\nfd = os.open('x', os.O_CREAT | os.O_RDWR)\nput(fd, 1, 100_000, 0)\n{change}\n{ending}"
        )
        result, _ = run(folder, program)
        assert result.exit_code == (2 if there else 0), result.output
        if there:
            planted("a change of lazy bytes", "were changed later: it was written past the recorder" in result.output)
            assert "x: the 100,000 bytes that were written at byte 0 (0x0)" in result.output
        (folder / "x").unlink()


def test_overlapping_writes_of_threads_and_processes_are_exact(folder):
    """Two threads in each of two processes: every write is in the trace once, with its bytes and in order; and
    the file at the end is one that some order makes (the capture itself compares that)."""
    program = """
fd = os.open('x', os.O_CREAT | os.O_RDWR)
def work(who):
    for i in range(60):
        put(fd, who * 64 + i, 20_000, (i * 7 + who * 3) % 11 * 5_000)
child = os.fork()
threads = [threading.Thread(target=work, args=(2 * bool(child) + i,)) for i in range(2)]
[one.start() for one in threads], [one.join() for one in threads]
if not child: os._exit(0)
os.wait()
"""
    result, path = run(folder, program)
    assert result.exit_code == 0, result.output
    trace = Trace(path)
    who_wrote = {written(who * 64 + i, 20_000): (who, i) for who in range(4) for i in range(60)}
    writes = trace.events[trace.events["kind"] == Kind.WRITE]
    seen = [who_wrote[bytes(trace.payload(event))] for event in writes]
    assert [event["offset"] for event in writes] == [(i * 7 + who * 3) % 11 * 5_000 for who, i in seen]
    for who in range(4):
        assert [i for one, i in seen if one == who] == list(range(60))


def test_locks_of_the_program_are_not_given_up(folder):
    """Closing any descriptor of a file gives up a process's POSIX locks on it: the recorder closes none."""
    program = """
fd = os.open('x', os.O_CREAT | os.O_WRONLY)
put(fd, 1, 100_000, 0)
fcntl.lockf(fd, fcntl.LOCK_EX)
put(fd, 2, 100_000, 500)
os.ftruncate(fd, 1000)
os.truncate('x', 100)
if not os.fork():
    try: fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError: os._exit(0)
    os._exit(1)
sys.exit(os.wait()[1])
"""
    result, _ = run(folder, program)
    assert result.exit_code == 0, result.output


def test_a_program_killed_in_the_middle_of_its_writes_leaves_a_trace(folder):
    for number in range(4):
        program = f"""
import signal
for i in range(3):
    fd = os.open(f'x{{i}}', os.O_CREAT | os.O_RDWR)
    threading.Thread(target=lambda fd=fd: [put(fd, n, 300_000, n % 5 * 200_000) for n in range(10_000)]).start()
threading.Event().wait(0.1 + {number} / 30)
os.kill(os.getpid(), signal.SIGKILL)
"""
        result, path = run(folder, program)
        assert result.exit_code == 2, result.output
        assert f"signal {int(signal.SIGKILL)}" in result.output
        trace = Trace(path)
        trace.verify()
        writes = trace.events[trace.events["kind"] == Kind.WRITE]
        assert len(writes) > 3
        assert (writes["completed"] == NEVER).sum() <= 3
        for file in folder.iterdir():
            file.unlink()


def test_the_recorder_compiles_without_a_warning(tmp_path):
    source = Path("rig/powercut/capture/recorder.c")
    command = ["cc", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-fvisibility=hidden"]
    done = subprocess.run([*command, "-o", os.devnull, str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
