"""More than the header is damaged, or something else lies there; and what the guest's disk tells of the header."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from formats.qcow2.damaged import content, overwrite, seen, truth
from formats.qcow2.handmade import set_refcount
from formats.qcow2.images import Mutator, Shape, needs_qemu, qemu_check, qemu_img, qemu_io
from powercut.inspection import inspect
from powercut.rescue import Known, rescue

pytestmark = needs_qemu

MIB = 1 << 20
SHARED = ("write -P 1 0 64k", "write -P 2 4M 64k", "one", "write -P 3 0 4k")


def image(path: Path, shape: Shape, *steps: str, size: int = 8 * MIB) -> Path:
    assert shape.create(path, size)
    for step in steps:
        if " " in step:
            qemu_io(path, step)
        else:
            assert qemu_img("snapshot", "-c", step, path)
    return path


def rescued(path: Path, known: Known = Known()) -> tuple[int, str, Path]:  # noqa: B008 - it is frozen
    saved = path.with_name("saved.qcow2")
    result = rescue(str(path), str(saved), known)
    assert qemu_check(saved).exit_code == 0, result.text
    return result.exit_code, result.text, saved


@pytest.mark.parametrize("patched", [False, True], ids=["plain", "patched"])
def test_a_snapshots_l1_table_over_the_header(
    patched: bool, tmp_path: Path, planted: Callable[[str, bool], None]
) -> None:
    """With 24 L1 entries, of which the header's snapshot count and offset cover two."""
    writes = [f"write -P {7 + index} {index * 2}M 64k" for index in (0, 3, 7, 8, 11, 20)]
    path = image(tmp_path / "a.qcow2", Shape(2, 4096), *writes, "one", "write -P 2 0 4k", size=48 * MIB)
    expected = truth(path)
    whole = bytearray(path.read_bytes())
    m = Mutator(bytes(whole))
    l1 = struct.unpack_from(">Q", whole, m.snapshots)[0]
    whole[:4096] = whole[l1 : l1 + 4096]
    struct.pack_into(">Q", whole, m.snapshots, 0)
    set_refcount(whole, m.blocks[0], 4, l1 // 4096, 0)
    if patched:
        struct.pack_into(">IQ", whole, 60, 1, m.snapshots)
    path.write_bytes(whole)
    told = inspect(str(path), None)
    planted("a snapshot's L1 table over the header", told.document["offset_zero"]["kind"] == "l1-table")
    assert told.document["offset_zero"]["kind"] == "l1-table"
    code, text, saved = rescued(path)
    assert code == 0, text
    assert seen(saved) == expected, text


def test_a_refcount_block_over_the_header(tmp_path: Path, planted: Callable[[str, bool], None]) -> None:
    """Then the refcount table has no entry for it, and the refcounts are counted afresh."""
    path = image(tmp_path / "a.qcow2", Shape(2, 4096), *SHARED)
    expected = truth(path)
    whole = bytearray(path.read_bytes())
    m = Mutator(bytes(whole))
    whole[:4096] = whole[m.blocks[0] : m.blocks[0] + 4096]
    struct.pack_into(">Q", whole, m.reftable, 0)
    path.write_bytes(whole)
    told = inspect(str(path), None)
    planted("a refcount block over the header", told.document["offset_zero"]["kind"] == "refcount-block")
    assert told.document["offset_zero"]["kind"] == "refcount-block"
    code, text, saved = rescued(path)
    assert code == 0, text
    assert seen(saved) == expected, text


@pytest.mark.parametrize("cluster", [4096, 65536])
def test_refcounts_gone_with_the_header(cluster: int, tmp_path: Path) -> None:
    path = image(tmp_path / "a.qcow2", Shape(3, cluster), *SHARED)
    expected = truth(path)
    m = Mutator(path.read_bytes())
    for offset in (0, m.reftable, m.blocks[0]):
        overwrite(path, bytes(cluster), offset)
    code, text, saved = rescued(path)
    assert code == 0, text
    assert "no refcount table was found" in text
    assert seen(saved) == expected, text


def test_a_file_cut_off(tmp_path: Path) -> None:
    """What lies beyond the end is lost, and told; the rest is there."""
    path = image(tmp_path / "a.qcow2", Shape(3, 4096), "write -P 1 0 1M", "write -P 2 4M 1M")
    expected = content(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) - 512 * 1024])
    code, text, saved = rescued(path)
    assert code == 1
    assert "beyond the end of the file" in text
    found = content(saved)
    same = [found[at : at + 4096] == expected[at : at + 4096] for at in range(0, len(expected), 4096)]
    assert same.count(False) == 128
    assert all(same[: (4 * MIB) // 4096])
    overwrite(path, bytes(4096))
    (tmp_path / "saved.qcow2").unlink()
    code, text, saved = rescued(path)
    assert code == 1
    again = content(saved)
    assert again == found[: len(again)]


def test_the_name_of_the_backing_file_behind_the_first_sector(tmp_path: Path) -> None:
    path = image(tmp_path / "a.qcow2", Shape(3, 65536, backing=True), "write -P 1 0 64k")
    expected = truth(path)
    overwrite(path, b"\xfa" * 510 + b"\x55\xaa")
    code, text, saved = rescued(path, Known(size=8 * MIB))
    assert code == 0, text
    assert "a.below: the name is left in the first cluster" in text
    assert seen(saved) == expected


def test_the_guests_partition_table_tells_the_size(tmp_path: Path) -> None:
    gpt = bytes(510) + b"\x55\xaa" + b"EFI PART" + bytes(24) + struct.pack("<Q", 8 * MIB // 512 - 1) + bytes(464)
    raw = tmp_path / "gpt"
    raw.write_bytes(gpt)
    path = image(tmp_path / "a.qcow2", Shape(3, 4096), f"write -s {raw} 0 1024", "write -P 3 1M 64k")
    overwrite(path, bytes(4096))
    code, text, _ = rescued(path)
    assert code == 0
    assert "size: 8,388,608 bytes: the guest's GPT names its last sector" in text


def test_zstd(tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    if not qemu_img("create", "-q", "-f", "qcow2", "-o", "compression_type=zstd", path, "8M"):
        pytest.skip("this qemu-img knows no zstd")
    for command in ("write -c -P 5 0 64k", "write -c -P 6 1M 64k", "write -P 7 2M 64k"):
        qemu_io(path, command)
    expected = truth(path)
    overwrite(path, bytes(4096))
    code, text, saved = rescued(path)
    assert code == 0
    assert "compression: zstd" in text
    assert seen(saved) == expected
