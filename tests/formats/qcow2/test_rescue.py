"""Rescue of images whose header is gone: `qemu-img check` accepts the new image, and it holds what the old one held."""

from __future__ import annotations

import json
import lzma
import os
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from formats.qcow2.damaged import OVER_HEADER, content, overwrite, record_vm_state, seen, truth
from formats.qcow2.images import Shape, make, needs_qemu, qemu_check, recipes
from powercut.errors import InputError
from powercut.inspection import inspect
from powercut.rescue import Known, rescue

EVIDENCE = Path(__file__).resolve().parents[4] / "shared" / "evidence" / "qemu-2009"
needs_evidence = pytest.mark.skipif(not EVIDENCE.exists(), reason="the genuine images of 2009 are not here")

SHAPES = [
    Shape(2, 4096),
    Shape(2, 65536),
    Shape(3, 512),
    Shape(3, 4096),
    Shape(3, 65536),
    Shape(3, 65536, 8),
    Shape(3, 4096, 32),
    Shape(3, 16384, extended_l2=True),
    Shape(3, 65536, lazy=True),
    Shape(3, 65536, backing=True),
]


def unpacked(name: str, folder: Path) -> Path:
    path = folder / name
    path.write_bytes(lzma.decompress((EVIDENCE / f"{name}.xz").read_bytes()))
    return path


@needs_evidence
@needs_qemu
def test_the_image_of_2009(tmp_path: Path, planted: Callable[[str, bool], None]) -> None:
    """The L2 table over the header is named, and moved; the guest's data and the snapshot are as they were."""
    damaged, before = (unpacked(f"{name}.qcow2", tmp_path) for name in ("l2-over-header", "header-refcount-0"))
    told = inspect(str(damaged), None)
    assert told.exit_code == 1
    assert told.document["offset_zero"]["kind"] == "l2-table"
    assert "16 entries, which map guest bytes 0x400000 to 0x40ffff" in told.text
    assert told.document["header_was"]["size"] == 8 << 20
    assert told.document["header_was"]["cluster_size"] == 4096
    saved = tmp_path / "saved.qcow2"
    result = rescue(str(damaged), str(saved), Known())
    assert result.exit_code == 0, result.text
    assert qemu_check(saved).exit_code == 0
    expected, found = truth(before), truth(saved)
    assert found["s1"] == expected["s1"]
    assert len(found) == len(expected) == 2
    data = (0xC3, 65536), (0xA1, (1 << 20) - 65536), (0, 3 << 20), (0xD4, 4096), (0xB2, 61440)
    assert content(saved)[: (4 << 20) + 65536] == b"".join(bytes([byte]) * length for byte, length in data)
    planted("an L2 table over the header (2009)", told.document["offset_zero"]["kind"] == "l2-table")


@needs_qemu
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_headers_overwritten(shape: Shape, tmp_path: Path, planted: Callable[[str, bool], None]) -> None:
    """Each shape meets two recipes and two of the things that overwrite."""
    chosen = [recipe for recipe in recipes() if recipe not in ("fresh", "killed", "bitmaps")]
    for number in (2 * SHAPES.index(shape), 2 * SHAPES.index(shape) + 1):
        recipe = chosen[number % len(chosen)]
        path = tmp_path / f"{recipe}.qcow2"
        if not make(path, shape, recipe, 3):
            continue
        if recipe == "vmstate":
            record_vm_state(path, 131072)
        expected = truth(path)
        what = sorted(OVER_HEADER)[number % len(OVER_HEADER)]
        overwrite(path, OVER_HEADER[what][: shape.cluster])
        assert inspect(str(path), None).exit_code == 1
        saved = tmp_path / f"{recipe}-saved.qcow2"
        backing = str(path.with_suffix(".below")) if shape.backing else None
        result = rescue(str(path), str(saved), Known(None, backing, "raw" if backing else None))
        assert result.exit_code == 0, f"{recipe}: {result.text}"
        outcome = qemu_check(saved)
        assert outcome.exit_code == 0, f"{recipe}: {outcome}"
        assert seen(saved) == expected, f"{recipe}: {result.text}"
        planted(f"a header overwritten by {what}", True)


@needs_qemu
def test_what_lies_there_is_named(tmp_path: Path) -> None:
    kinds = {
        "zeros": "zeros", "mbr": "partition-table", "gpt": "partition-table", "luks": "other-format",
        "refcount block": "refcount-block", "random": "data",
    }  # fmt: skip
    path = tmp_path / "a.qcow2"
    assert make(path, Shape(), "snapshots", 1)
    whole = path.read_bytes()
    assert inspect(str(path), None).document["offset_zero"] is None
    for what, kind in kinds.items():
        path.write_bytes(whole)
        overwrite(path, OVER_HEADER[what])
        assert inspect(str(path), None).document["offset_zero"]["kind"] == kind


@needs_qemu
def test_never_in_place(tmp_path: Path) -> None:
    path, link = tmp_path / "a.qcow2", tmp_path / "b.qcow2"
    assert make(path, Shape(), "writes", 1)
    link.hardlink_to(path)
    before = path.read_bytes()
    for out in (path, link):
        with pytest.raises(InputError, match="the damaged image itself"):
            rescue(str(path), str(out), Known())
    (tmp_path / "c").write_bytes(b"precious")
    with pytest.raises(InputError, match="exists"):
        rescue(str(path), str(tmp_path / "c"), Known())
    with pytest.raises(InputError, match="cannot be written"):
        rescue(str(path), str(tmp_path / "nowhere" / "c"), Known())
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.qcow2", "b.qcow2", "c"]


def test_nothing_to_rescue(tmp_path: Path) -> None:
    for name, data in (("empty", b""), ("zeros", bytes(1 << 20)), ("random", random.Random(1).randbytes(1 << 20))):
        path = tmp_path / f"{name}.qcow2"
        path.write_bytes(data)
        assert inspect(str(path), None).exit_code == 1
        with pytest.raises(InputError, match="no table of a qcow2 image"):
            rescue(str(path), str(tmp_path / "out"), Known())


@needs_qemu
def test_documents(tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    assert make(path, Shape(), "snapshots", 1)
    overwrite(path, bytes(65536))
    result = rescue(str(path), str(tmp_path / "b.qcow2"), Known(size=64 << 20))
    document = json.loads(json.dumps(result.document))
    assert document["schema"] == "powercut.rescue/1"
    assert document["header"]["size"] == 64 << 20
    assert document["lost"] == []
    assert {"cluster size", "size", "snapshot"} <= {note["what"] for note in document["recovered"]}


def test_a_file_of_nothing_but_pointers_has_an_end(tmp_path: Path) -> None:
    """Everything in it looks like a table. What comes of it does not matter; that it comes does."""
    path = tmp_path / "a.qcow2"
    words = np.random.default_rng(1).integers(1, (2 << 20) // 512, size=(2 << 20) // 8).astype(np.uint64) * 512
    path.write_bytes(words.astype(">u8").tobytes())
    assert inspect(str(path), None).exit_code == 1
    assert rescue(str(path), str(tmp_path / "b.qcow2"), Known()).exit_code == 1


@needs_qemu
def test_more_clusters_than_can_be_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    assert make(path, Shape(3, 512), "writes", 1)
    os.truncate(path, 1 << 40)
    with pytest.raises(InputError, match="2,147,483,648 clusters are more than can be counted"):
        rescue(str(path), str(tmp_path / "b.qcow2"), Known())
    assert not (tmp_path / "b.qcow2.partial").exists()
