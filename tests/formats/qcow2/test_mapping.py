"""The guest's mapping against `qemu-img map`, and what the driver does where the checker adds to QEMU's."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

from formats.qcow2.images import TIMEOUT, Shape, make, needs_qemu, qemu_img, qemu_io, size_for
from powercut.disk import ImageDisk
from powercut.formats.qcow2.check import check
from powercut.formats.qcow2.entries import Kind, compressed_extent, host_offset, kind
from powercut.formats.qcow2.mapping import Mapping

SHAPES = [
    Shape(2, 512),
    Shape(3, 4096),
    Shape(3, 65536),
    Shape(3, 16384, extended_l2=True),
    Shape(3, 65536, extended_l2=True, backing=True),
    Shape(3, 4096, backing=True),
    Shape(3, 4096, data_file=True),
]


def qemu_map(path: Path, size: int, unit: int) -> list[tuple[bool, bool, int]]:
    """For each unit of the guest's disk: in this layer, reads as zeros, host offset (-1: none told)."""
    command = ["qemu-img", "map", "--output=json", "-f", "qcow2", str(path)]
    done = subprocess.run(command, capture_output=True, timeout=TIMEOUT, check=True)
    out = [(False, False, -1)] * -(-size // unit)
    for extent in json.loads(done.stdout):
        first = -(-extent["start"] // unit) * unit  # an extent may end inside a unit, where the file has a hole
        for at in range(first, extent["start"] + extent["length"], unit):
            offset = extent["offset"] + at - extent["start"] if "offset" in extent else -1
            out[at // unit] = (extent["present"] and extent["depth"] == 0, extent["zero"], offset)
    return out


def our_map(mapping: Mapping, unit: int) -> list[tuple[bool, bool, int]]:
    header = mapping.header
    per_cluster = header.cluster_size // unit
    out = []
    bitmap = mapping.bitmap if mapping.bitmap is not None else np.zeros_like(mapping.entry)
    rows = zip(kind(mapping.entry, header), host_offset(mapping.entry), bitmap.tolist(), strict=True)
    for what, offset, bits in rows:
        for sub in range(per_cluster):
            at = int(offset) + sub * unit
            if what == Kind.COMPRESSED:
                out.append((True, False, -1))
            elif header.extended_l2 and bits >> 32 + sub & 1:
                out.append((True, True, at if what == Kind.NORMAL else -1))
            elif header.extended_l2:
                out.append((True, False, at) if bits >> sub & 1 else (False, False, -1))
            elif what == Kind.UNALLOCATED:
                out.append((False, False, -1))
            else:
                zero = what in (Kind.ZERO_PLAIN, Kind.ZERO_ALLOCATED)
                out.append((True, zero, -1 if what == Kind.ZERO_PLAIN else at))
    return out[: -(-header.size // unit)]


@needs_qemu
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
@pytest.mark.parametrize("recipe", ["fresh", "mixed", "compressed", "vmstate"])
def test_agrees_with_qemu_img_map(shape: Shape, recipe: str, tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    assert make(path, shape, recipe, 1)
    unit = shape.cluster // 32 if shape.extended_l2 else shape.cluster
    disk = ImageDisk(path)
    mapping = check(disk).mapping
    theirs, ours = qemu_map(path, size_for(shape), unit), our_map(mapping, unit)
    assert len(theirs) == len(ours)
    for number, (a, b) in enumerate(zip(theirs, ours, strict=True)):
        if not b[0]:
            assert not a[0] or (a[1] and not shape.backing), number  # nothing here: absent, or zeros
        elif b[1]:
            assert a[1], number  # QEMU does not tell where zeros are preallocated
        elif a[1]:  # QEMU looks through to the file, and finds a hole there
            assert (a[0], a[2]) == (b[0], b[2]), number
            assert not disk.read(b[2], 512).any(), number
        else:
            assert a == b, number


@needs_qemu
def test_slots_are_where_the_entries_are(tmp_path: Path) -> None:
    for shape in SHAPES:
        path = tmp_path / f"{shape.name}.qcow2"
        assert make(path, shape, "mixed", 2)
        disk = ImageDisk(path)
        mapping = check(disk).mapping
        guest = np.arange(mapping.header.guest_clusters)
        slots = mapping.slot(guest)
        for number, slot in zip(guest.tolist(), slots.tolist(), strict=True):
            word = 0 if slot < 0 else int.from_bytes(disk.read(slot, 8).tobytes(), "big")
            assert word == mapping.entry[number]
        assert (slots >= 0).any()


@needs_qemu
def test_compressed_extents_hold_what_was_compressed(tmp_path: Path) -> None:
    import zlib

    path = tmp_path / "image.qcow2"
    assert qemu_img("create", "-q", "-f", "qcow2", path, "1M")
    qemu_io(path, "write -c -P 65 0 64k", "write -c -P 66 64k 64k")
    disk = ImageDisk(path)
    mapping = check(disk).mapping
    offset, length = compressed_extent(mapping.entry[:2], mapping.header)
    for at, size, letter in zip(offset.tolist(), length.tolist(), b"AB", strict=True):
        data = zlib.decompressobj(wbits=-12).decompress(disk.read(at, size).tobytes())
        assert data == bytes([letter]) * 65536


@needs_qemu
def test_the_driver_cannot_read_a_version_2_zero_flag(tmp_path: Path) -> None:
    """Why `v2-zero-flag` is a problem although QEMU's checker says nothing."""
    path = tmp_path / "image.qcow2"
    assert Shape(2, 4096).create(path, 1 << 20)
    qemu_io(path, "write -P 1 0 4096")
    slot = int(check(ImageDisk(path)).mapping.slot(np.array([0]))[0])
    image = bytearray(path.read_bytes())
    image[slot + 7] |= 1
    path.write_bytes(image)
    assert {problem.kind for problem in check(ImageDisk(path)).problems} == {"v2-zero-flag"}
    command = ["qemu-io", "-r", "-f", "qcow2", "-c", "read 0 4096", str(path)]
    done = subprocess.run(command, capture_output=True, timeout=TIMEOUT, check=False)
    assert b"Input/output error" in done.stdout + done.stderr
