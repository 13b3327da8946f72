"""The end of the reproducer of 2009: `savevm`, and the L2 table of the VM state lies over the header.

The snapshots are taken by a real QEMU with a machine. The write that a QEMU of 2009 would have put at offset 0 is put
there by hand, and so are bytes 60 to 71. After the rescue a real QEMU loads the VM state.
"""

from __future__ import annotations

import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from formats.qcow2.damaged import seen, truth
from formats.qcow2.handmade import set_refcount
from formats.qcow2.images import Mutator, Shape, needs_qemu, qemu_check, qemu_io
from powercut.inspection import inspect
from powercut.rescue import Known, rescue

MACHINE = "qemu-system-x86_64"
pytestmark = [
    needs_qemu,
    pytest.mark.skipif(shutil.which(MACHINE) is None, reason=f"{MACHINE} is not installed"),
]


def monitor(path: Path, *commands: str) -> str:
    """What a machine that never starts answers to monitor commands."""
    words = [MACHINE, "-M", "isapc", "-m", "1", "-accel", "tcg", "-nodefaults", "-nographic", "-S", "-monitor", "stdio"]
    words += ["-drive", f"if=none,file={path},format=qcow2,id=disk"]
    said = subprocess.run(words, input="\n".join([*commands, "quit", ""]), text=True, capture_output=True, timeout=60)
    return said.stdout + said.stderr


def vm_state_over_header(path: Path) -> int:
    """Put the L2 table of the last snapshot's VM state where 2009 put it. How many entries it has."""
    image = bytearray(path.read_bytes())
    m = Mutator(bytes(image))
    at = m.snapshots
    for _ in range(m.snapshots_count):
        l1, _, id_size, name_size, extra = struct.unpack_from(">QIHH20xI", image, at)
        at += -(-(40 + extra + id_size + name_size) // 8) * 8
    table = int.from_bytes(image[l1 + 8 : l1 + 16], "big") & ~(1 << 63)
    image[:4096] = image[table : table + 4096]
    entries = sum(entry != 0 for entry in struct.unpack_from(">512Q", image, 0))
    struct.pack_into(">IQ", image, 60, m.snapshots_count, m.snapshots)
    struct.pack_into(">Q", image, l1 + 8, 0)
    set_refcount(image, m.blocks[0], 4, table // 4096, 0)
    path.write_bytes(image)
    return entries


def test_the_vm_state_loads(tmp_path: Path, planted: Callable[[str, bool], None]) -> None:
    path, saved = tmp_path / "a.qcow2", tmp_path / "saved.qcow2"
    assert Shape(2, 4096).create(path, 1 << 20)
    qemu_io(path, "write -P 7 0 64k")
    assert "Error" not in monitor(path, "savevm x", "savevm y")
    expected = truth(path)
    assert list(expected) == [None, "x", "y"]
    entries = vm_state_over_header(path)
    told = inspect(str(path), None)
    assert f"an L2 table: {entries + 1} entries" in told.text or f"an L2 table: {entries} entries" in told.text
    assert "bytes 60 to 71 hold the snapshot count 2" in told.text
    planted("the L2 table of a VM state over the header", told.exit_code == 1)
    result = rescue(str(path), str(saved), Known())
    assert result.exit_code == 0, result.text
    assert qemu_check(saved).exit_code == 0
    assert seen(saved) == expected
    for name in ("x", "y"):
        said = monitor(saved, f"loadvm {name}")
        assert "rror" not in said, f"{name}: {said}"


def test_the_control_notices_a_vm_state_that_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    assert Shape(2, 4096).create(path, 1 << 20)
    assert "rror" not in monitor(path, "savevm x")
    image = bytearray(path.read_bytes())
    m = Mutator(bytes(image))
    l1 = struct.unpack_from(">Q", image, m.snapshots)[0]
    struct.pack_into(">Q", image, l1 + 8, 0)
    path.write_bytes(image)
    assert "rror" in monitor(path, "loadvm x")
