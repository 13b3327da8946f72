"""The command `quire`, as a user runs it: with real files, the real qemu-img, and mistakes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from quire.cli import main
from quire.layout import BLOCK

needs_qemu = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="no qemu-img")
MIB = 1 << 20


def quire(*words: object, code: int = 0) -> str:
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exit_code == code, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.output


def qemu(*words: object) -> str:
    return subprocess.run([str(w) for w in words], check=True, capture_output=True, text=True, timeout=60).stdout


@pytest.fixture
def vm(tmp_path: Path) -> Path:
    quire("create", tmp_path / "vm.quire", "--size", "8M")
    return tmp_path / "vm.quire"


@needs_qemu
@pytest.mark.parametrize("format", ["qcow2", "vmdk", "vdi", "vhdx", "qed", "raw"])
def test_what_goes_in_comes_out(tmp_path, format):
    disk, vm = tmp_path / f"disk.{format}", tmp_path / "vm.quire"
    qemu("qemu-img", "create", "-f", format, disk, "16M")
    qemu("qemu-io", "-f", format, "-c", "write -P 7 1M 3M", "-c", "write -P 9 15M 64k", disk)
    quire("create", vm, "--size", "8M")
    quire("import", vm, disk, "--format", format)
    quire("snapshot", vm, "before")
    quire("export", f"{vm}@before", tmp_path / f"out.{format}")
    assert qemu("qemu-img", "compare", disk, tmp_path / f"out.{format}").startswith("Images are identical")
    quire("export", f"{vm}@before", tmp_path / "out.img")
    assert qemu("qemu-img", "compare", "-F", "raw", disk, tmp_path / "out.img").startswith("Images are identical")
    assert (tmp_path / "out.img").stat().st_blocks * 512 < 5 * MIB, "holes stay holes"


@needs_qemu
def test_importing_replaces_what_was_there(tmp_path, vm):
    (tmp_path / "ones").write_bytes(b"\x01" * (8 * MIB))
    (tmp_path / "small").write_bytes(b"\0" * 8192 + b"\x02" * 1000)
    quire("import", vm, tmp_path / "ones", "--format", "raw")
    quire("import", vm, tmp_path / "small", "--format", "raw")
    quire("export", vm, tmp_path / "out.img")
    held = (tmp_path / "out.img").read_bytes()
    assert held == (tmp_path / "small").read_bytes().ljust(8 * MIB, b"\0")


def test_tree(tmp_path, vm):
    (tmp_path / "one").write_bytes(b"\x01" * BLOCK)
    quire("import", vm, tmp_path / "one", "--format", "raw")
    quire("snapshot", vm, "before")
    quire("clone", f"{vm}@before", "test")
    (tmp_path / "two").write_bytes(b"\x02" * BLOCK * 2)
    quire("import", f"{vm}@test", tmp_path / "two", "--format", "raw")
    listed = json.loads(quire("list", vm, "--json"))
    assert {(n["name"], n["kind"]) for n in listed["names"]} == {
        ("main", "head"), ("before", "snapshot"), ("test", "head"),
    }  # fmt: skip
    assert json.loads(quire("diff", f"{vm}@before", "test", "--json", code=1))["ranges"] == [[0, 2 * BLOCK]]
    assert "0 bytes" in quire("diff", f"{vm}@before", "main")
    quire("revert", f"{vm}@test", "before")
    assert "0 bytes" in quire("diff", f"{vm}@before", "test")
    quire("rename", f"{vm}@test", "other")
    quire("resize", f"{vm}@other", "4M")
    assert "4,194,304" in quire("list", vm)
    quire("delete", f"{vm}@other")
    quire("delete", f"{vm}@main")
    assert len(list(vm.glob("*.leaf"))) == 1
    quire("create", tmp_path / "child.quire", "--base", f"{vm}@before")
    quire("export", tmp_path / "child.quire", tmp_path / "out.img")
    assert (tmp_path / "out.img").read_bytes() == b"\x01" * BLOCK + bytes(8 * MIB - BLOCK)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["create", "{vm}", "--size", "1G"], "is not empty"),
        (["create", "{tmp}/x", "--size", "nonsense"], "not a size"),
        (["create", "{tmp}/x", "--size", "100"], "cannot be"),
        (["create", "{tmp}/x"], "--size"),
        (["create", "{tmp}/x", "--base", "{vm}"], "SNAPSHOT"),
        (["create", "{tmp}/x", "--base", "{vm}@main"], "must be a snapshot"),
        (["list", "{tmp}/nothing"], "No such file"),
        (["list", "{tmp}"], "no manifest"),
        (["clone", "{vm}@nope", "x"], "there are main"),
        (["clone", "{vm}@main", "x"], "take a snapshot"),
        (["snapshot", "{vm}", "a/b"], "cannot be a name"),
        (["snapshot", "{vm}", "main"], "taken"),
        (["delete", "{vm}"], "@NAME"),
        (["import", "{vm}", "{tmp}/nothing"], "not there"),
        (["import", "{vm}", "{tmp}"], "not a file"),
        (["export", "{vm}", "{vm}/lock"], "there already"),
        (["export", "{vm}", "{tmp}/x.img", "--format", "nonsense"], "nonsense"),
        (["serve", "{vm}", "--socket", "{tmp}/no/such"], "No such file"),
    ],
)
def test_a_mistake_is_one_sentence(tmp_path, vm, words, says):
    output = quire(*(word.format(tmp=tmp_path, vm=vm) for word in words), code=2)
    assert says in output
    assert "Traceback" not in output
    assert not (tmp_path / "x").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["vm.quire"], "nothing half-written stays"


@needs_qemu
def test_serving_to_qemu(tmp_path, vm):
    """A real client writes, flushes, reconnects and compares; the server is told to end, and all is there."""
    uri = f"nbd+unix:///?socket={tmp_path / 'socket'}"
    command = [sys.executable, "-m", "quire.cli", "serve", str(vm), "--socket", str(tmp_path / "socket")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    serving = subprocess.Popen(command, stderr=subprocess.PIPE, env=environment)
    try:
        deadline = time.monotonic() + 20
        while not (tmp_path / "socket").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        qemu("qemu-io", "-f", "raw", "-c", "write -P 3 1000448 70144", "-c", "write -P 4 4M 1M", "-c", "flush", uri)
        qemu("qemu-io", "-f", "raw", "-c", "write -z 4M 64k", "-c", "discard 4160k 64k", "-c", "flush", uri)
        said = qemu("qemu-io", "-f", "raw", "-c", "read -P 3 1000448 70144", "-c", "read -P 0 4M 128k",
                    "-c", "read -P 4 4224k 896k", uri)  # fmt: skip
        assert "failed" not in said
        busy = CliRunner().invoke(main, ["snapshot", str(vm), "now"])
        assert busy.exit_code == 2
        assert f"pid {serving.pid}" in busy.output, "the holder is named"
    finally:
        serving.send_signal(signal.SIGTERM)
        assert serving.wait(20) == 0
    quire("export", vm, tmp_path / "out.img")
    held = (tmp_path / "out.img").read_bytes()
    assert held[1000448:][:70144] == b"\x03" * 70144
    assert held[4 * MIB :][: 128 << 10] == bytes(128 << 10)
    assert held[(4224 << 10) :][: 896 << 10] == b"\x04" * (896 << 10)


def test_guest_state_goes_with_a_snapshot(tmp_path, vm):
    (tmp_path / "ram").write_bytes(b"r" * 3_000_000)
    quire("snapshot", vm, "s", "--state", tmp_path / "ram")
    assert "guest state 3,000,000 bytes" in quire("list", vm)
