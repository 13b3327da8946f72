"""Recording any program: what its trace says is what it did, and what cannot be seen is not passed over."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
from click.testing import CliRunner

from powercut.cli import main
from powercut.trace import Flag, Kind, Trace

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
