"""Recording any program: what its trace says is what it did, and what cannot be seen is not passed over."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from tests.support.filetrace import files_of, files_under

from powercut.cli import main
from powercut.trace import NEVER, SECTOR, Flag, Kind, Trace

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")


def captured(folder, program: str, *options: str):
    trace = folder.parent / "program.trace"
    command = ["capture", "--out", str(trace), "--dir", str(folder), *options, "--", sys.executable, "-c", program]
    result = CliRunner().invoke(main, command)
    return result, trace


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


@pytest.fixture(scope="module")
def every_call(tmp_path_factory) -> str:
    """A C program that makes every call there is."""
    program = tmp_path_factory.mktemp("program") / "every_call"
    source = Path(__file__).with_name("every_call.c")
    subprocess.run(["cc", "-O2", "-w", "-pthread", "-o", str(program), str(source)], check=True)
    return str(program)


@pytest.mark.parametrize("recorder", ["preload", "strace"])
def test_the_trace_of_every_call_there_is_replays_to_the_files_that_are_there(folder, every_call, recorder):
    if recorder == "strace" and shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    path = folder.parent / "every.trace"
    command = ["capture", "--out", str(path), "--dir", str(folder), "--json", str(folder.parent / "json")]
    plain = ["plain"] if recorder == "strace" else []  # it is not told the bytes of copies in the kernel
    result = CliRunner().invoke(main, [*command, "--recorder", recorder, "--", every_call, str(folder), *plain])
    assert result.exit_code == 0, result.output
    trace = Trace(path)
    trace.verify()
    assert json.loads((folder.parent / "json").read_text())["refused"] == {}
    assert files_of(trace) == files_under(folder)
    kinds = {Kind(kind).name for kind in trace.events["kind"]}
    assert kinds >= {"WRITE", "ZERO", "DISCARD", "TRUNCATE", "FLUSH", "CREATE", "LINK", "RENAME", "UNLINK", "SYNC_DIR"}
    durable = trace.events[(trace.events["flags"] & Flag.FUA) != 0]
    assert sorted(trace.files[event["file"]].name for event in durable) == ["synced", "synced", "writes"]
    assert (trace.events["completed"][trace.events["kind"] != Kind.MARK] != NEVER).all()


def test_threads_and_processes_share_one_sequence(folder, every_call):
    """Their writes overlap in time, and each flush covers what had completed before it began."""
    path = folder.parent / "every.trace"
    CliRunner().invoke(main, ["capture", "--out", str(path), "--dir", str(folder), "--", every_call, str(folder)])
    trace = Trace(path)
    shared = next(info.id for info in trace.files if info.name == "shared")
    mine = trace.events[trace.events["file"] == shared]
    assert (mine["kind"] == Kind.WRITE).sum() == 200
    assert (mine["kind"] == Kind.FLUSH).sum() == 4
    positions = np.concatenate([trace.events["issued"], trace.events["completed"]])
    assert len(np.unique(positions)) == len(positions)
    for event in mine[mine["kind"] == Kind.WRITE]:  # each from one of four, in that one's order
        payload = bytes(trace.payload(event))
        assert payload == bytes([payload[0]]) * SECTOR
        assert event["offset"] // SECTOR % 4 == payload[0] - ord("A")


def test_writes_syncs_and_renames_are_seen(folder):
    program = f"""
import os
os.chdir({str(folder)!r})
fd = os.open("new", os.O_CREAT | os.O_RDWR)
os.write(fd, b"a" * 1000)
os.pwrite(fd, b"b" * 512, 4096)
os.ftruncate(fd, 8192)
os.fsync(fd)
os.rename("new", "final")
os.fsync(os.open(".", os.O_RDONLY))
direct = os.open("final", os.O_RDWR | os.O_DSYNC)
os.pwrite(direct, b"c" * 512, 0)
"""
    result, path = captured(folder, program)
    assert result.exit_code == 0, result.output
    trace = Trace(path)
    trace.verify()
    kinds = [Kind(kind).name for kind in trace.events["kind"]]
    for kind in ("CREATE", "WRITE", "TRUNCATE", "FLUSH", "RENAME", "SYNC_DIR"):
        assert kind in kinds, kinds
    last = trace.events[trace.events["kind"] == Kind.WRITE][-1]
    assert last["flags"] & Flag.FUA
    assert bytes(trace.payload(last)) == b"c" * 512


def test_a_program_that_fails_is_reported_and_its_trace_kept(folder):
    result, path = captured(folder, f"open({str(folder / 'x')!r}, 'wb').write(b'x' * 512); raise SystemExit(9)")
    assert result.exit_code == 2, result.output
    assert "9" in result.output
    assert len(Trace(path).events)


def test_stores_through_a_mapping_are_not_passed_over(folder, planted):
    """Control: what the recorder cannot see must not look like nothing happened."""
    (folder / "m").write_bytes(bytes(8192))
    program = f"""
import mmap
with open({str(folder / "m")!r}, "r+b") as file:
    mapped = mmap.mmap(file.fileno(), 8192)
    mapped[0:5] = b"stealth"[:5]
    mapped.flush()
"""
    result, _ = captured(folder, program)
    planted("a store through a mapping", result.exit_code == 2)
    assert result.exit_code == 2, result.output


def c_program(folder: Path, source: str, *flags: str) -> str:
    (folder / "program.c").write_text(f"#include <unistd.h>\n#include <sys/syscall.h>\n{source}")
    subprocess.run(["cc", "-w", "-o", str(folder / "program"), str(folder / "program.c"), *flags], check=True)
    return str(folder / "program")


def run_captured(folder: Path, *command: str):
    return CliRunner().invoke(
        main, ["capture", "--out", str(folder.parent / "t"), "--dir", str(folder), "--", *command]
    )


@pytest.mark.parametrize("way", ["io_uring", "libaio"])
def test_ways_past_the_recorder_are_refused_to_the_program(folder, planted, way):
    number = {"io_uring": 425, "libaio": 206}[way]
    program = c_program(
        folder.parent, f"int main() {{ long x[64] = {{0}}; return syscall({number}, 8, x) < 0 ? 7 : 0; }}"
    )
    result = run_captured(folder, program)
    planted(f"writes by {way}", result.exit_code == 2 and way in result.output)
    assert result.exit_code == 2
    assert f"ended with exit status 7; the recorder refused it {way}" in result.output


def test_a_static_program_is_refused(folder, planted):
    program = c_program(folder.parent, "int main() { return 0; }", "-static")
    result = run_captured(folder, program)
    planted("a static program", "statically linked" in result.output)
    assert result.exit_code
    assert "statically linked" in result.output


def test_a_write_that_no_library_sees_is_found_at_the_end(folder, planted):
    """A program's own system calls: the files at the end are not what the trace makes of them."""
    (folder / "x").write_bytes(b"a" * 512)
    source = """
#include <fcntl.h>
int main(int n, char **w) {
    int fd = open(w[1], O_WRONLY);
    long r, number = 1;
    __asm__ volatile ("syscall" : "=a"(r) : "0"(number), "D"((long)fd), "S"("sly"), "d"(3L) : "rcx", "r11", "memory");
    return r != 3;
}"""
    result = run_captured(folder, c_program(folder.parent, source), str(folder / "x"))
    said = result.output
    planted("a bare system call", "written past the recorder" in said)
    assert "x: byte 0 (0x0) is 0x73, and what was recorded makes it 0x61: it was written past the recorder" in said


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small file system")
def test_a_full_disk_under_the_trace_keeps_what_was_recorded(folder):
    small = folder.parent / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(small)], check=True)
    try:
        program = (
            f"f = open({str(folder / 'x')!r}, 'wb', 0)\nfor i in range(2000): f.write(bytes([i % 251 + 1]) * 4096)"
        )
        command = ["capture", "--out", str(small / "t"), "--dir", str(folder), "--", sys.executable, "-c", program]
        result = CliRunner().invoke(main, command)
        said = result.output
        assert "No space left on device" in said, said
        assert f"{small / 't'} holds what came before" in said
        trace = Trace(small / "t")
        assert 10 < len(trace.events) < 2000
        assert trace.truncated or trace.meta["truncated"]
    finally:
        subprocess.run(["umount", "--lazy", str(small)], check=True)  # the trace is still mapped


def test_an_interrupted_program_leaves_a_trace(folder):
    """Ctrl-C reaches the program and us: what it did until then is kept."""
    path = folder.parent / "t"
    program = f"""
import time
open({str(folder / "x")!r}, "wb").write(b"x" * 512)
print("ready", flush=True)
for _ in range(600):
    time.sleep(0.1)  # a signal just before it is not missed for long
"""
    command = [sys.executable, "-m", "powercut.cli", "capture", "--out", str(path), "--dir", str(folder), "--"]
    with subprocess.Popen(
        [*command, sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == "ready\n"
        os.killpg(running.pid, signal.SIGINT)
        _, said = running.communicate(timeout=30)
    assert running.returncode == 2, said
    assert "signal 2" in said
    assert len(Trace(path).events)


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_without_a_compiler_strace_records(folder, monkeypatch, every_call):
    """Threads, processes and descriptors are followed; what strace cannot see is refused to the program."""
    tools = folder.parent / "tools"
    tools.mkdir()
    for tool in ("strace", "sh"):
        (tools / tool).symlink_to(shutil.which(tool))
    monkeypatch.setenv("PATH", str(tools))
    result = run_captured(folder, every_call, str(folder), "plain")
    assert result.exit_code == 0, result.output
    trace = Trace(folder.parent / "t")
    assert trace.meta["recorder"] == "strace"
    shared = next(info.id for info in trace.files if info.name == "shared")
    mine = trace.events[trace.events["file"] == shared]
    assert ((mine["kind"] == Kind.WRITE).sum(), (mine["kind"] == Kind.FLUSH).sum()) == (200, 4)
    refused = run_captured(folder, every_call, str(folder))
    assert "the recorder refused it copy_file_range" in refused.output


def test_without_a_compiler_there_is_a_clear_sentence(folder, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    result = run_captured(folder, sys.executable, "-c", "")
    assert "cc was not found" in result.output


@pytest.mark.skipif(shutil.which("qemu-io") is None, reason="QEMU's tools are not installed")
def test_an_image_that_qemu_io_writes_is_explored(folder):
    image = folder / "a.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(image), "4M"], check=True)
    trace = folder.parent / "image.trace"
    command = ["capture", "--out", str(trace), "--dir", str(folder), "--image", "a.qcow2", "--"]
    command += ["qemu-io", "-f", "qcow2", "-c", "write 0 64k", "-c", "flush", "-c", "write 1M 64k", str(image)]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    arguments = ["explore", str(trace), "--format", "qcow2", "--rule", "structure", "--save", str(folder.parent / "f")]
    explored = CliRunner().invoke(main, arguments)
    assert explored.exit_code == 0, explored.output


def test_what_a_killed_capture_left_behind_goes_with_the_next(folder):
    """And what one that still runs has beside it stays."""
    ready = folder.parent / "ready"
    waiting = f"import time; open({str(ready)!r}, 'w').close(); time.sleep(60)"
    command = [sys.executable, "-m", "powercut.cli", "capture", "--out", str(folder.parent / "t"), "--dir", str(folder)]
    with subprocess.Popen([*command, "--", sys.executable, "-c", waiting], start_new_session=True) as running:
        try:
            while not ready.exists():
                assert running.poll() is None
                time.sleep(0.05)
            left = list(folder.parent.glob(".powercut-capture-*"))
            assert len(left) == 1
            assert run_captured(folder, sys.executable, "-c", "").exit_code == 0
            assert list(folder.parent.glob(".powercut-capture-*")) == left
        finally:
            os.killpg(running.pid, signal.SIGKILL)
    assert left[0].exists()
    assert run_captured(folder, sys.executable, "-c", "").exit_code == 0
    assert list(folder.parent.glob(".powercut-capture-*")) == []
