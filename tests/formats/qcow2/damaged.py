"""Damage to images of QEMU's, and what the guest saw before it."""

from __future__ import annotations

import hashlib
import json
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np

from formats.qcow2.handmade import set_refcount
from formats.qcow2.images import TIMEOUT, Mutator

MBR = bytes(446) + bytes([0x80, 1, 1, 0, 0x83, 254, 255, 255]) + (2048).to_bytes(4, "little")
MBR += (2048).to_bytes(4, "little") + bytes(48) + b"\x55\xaa"

OVER_HEADER: dict[str, bytes] = {
    "zeros": bytes(4096),
    "mbr": MBR,
    "gpt": MBR[:450] + b"\xee" + MBR[451:] + b"EFI PART" + bytes(504),
    "luks": b"LUKS\xba\xbe\0\1aes".ljust(1024, b"\0"),
    "refcount block": np.full(1024, 1, dtype=">u2").tobytes(),
    "random": np.random.default_rng(5).bytes(8192),
}


def overwrite(path: Path, data: bytes, offset: int = 0) -> None:
    with path.open("r+b") as out:
        out.seek(offset)
        out.write(data)


def record_vm_state(path: Path, size: int) -> None:
    """Say in every snapshot's entry that it has VM state, as `savevm` does and `qemu-img snapshot` does not."""
    with path.open("r+b") as image:
        image.seek(60)
        count, at = struct.unpack(">IQ", image.read(12))
        for _ in range(count):
            image.seek(at)
            id_size, name_size, extra_size = struct.unpack(">12xHH20xI", image.read(40))
            image.write(struct.pack(">Q", size))
            at += -(-(40 + extra_size + id_size + name_size) // 8) * 8


def snapshots(path: Path) -> list[str]:
    done = subprocess.run(
        ["qemu-img", "info", "-U", "--output=json", str(path)], capture_output=True, timeout=TIMEOUT, check=True
    )
    return [one["name"] for one in json.loads(done.stdout).get("snapshots", [])]


def content(path: Path, snapshot: str | None = None) -> bytes:
    """All that the guest sees, as QEMU reads it."""
    raw = path.with_suffix(".content")
    raw.unlink(missing_ok=True)
    which = ["-l", f"snapshot.name={snapshot}"] if snapshot else []
    command = ["qemu-img", "convert", "-f", "qcow2", *which, "-O", "raw", str(path), str(raw)]
    subprocess.run(command, capture_output=True, timeout=TIMEOUT, check=True)
    data = raw.read_bytes()
    raw.unlink()
    return data


def truth(path: Path) -> dict[str | None, str]:
    """A digest of what each layer holds; zeros at the end do not count, for a disk's size may be a guess."""
    layers: list[str | None] = [None, *snapshots(path)]
    return {layer: digest(content(path, layer)) for layer in layers}


def digest(data: bytes) -> str:
    return hashlib.sha256(data.rstrip(b"\0")).hexdigest()


def seen(path: Path, read: Callable[[Path], dict[str | None, str]] = truth) -> dict[str | None, str] | str:
    """The same of a rescued image, or what QEMU says against it."""
    try:
        return read(path)
    except subprocess.CalledProcessError as error:
        return str(error.stderr)


def l2_over_header(path: Path, *, patched: bool, snapshot_after: bool = False) -> None:
    """What QEMU of early 2009 did once cluster 0 was free (version 2 images): the copy of a shared L2 table goes to
    offset 0. Then, if `patched`, the header's snapshot count and offset go to bytes 60 to 71 of that table; and
    with `snapshot_after`, the copied flag of its L1 entry is gone, so that the entry is 0."""
    image = bytearray(path.read_bytes())
    m = Mutator(bytes(image))
    index = next(i for i in range(m.l1_size) if image[m.l1 + 8 * i] & 0x80)
    old = int.from_bytes(image[m.l1 + 8 * index : m.l1 + 8 * index + 8], "big") & ~(1 << 63)
    table = bytearray(image[old : old + m.cluster])
    if patched:
        struct.pack_into(">IQ", table, 60, m.snapshots_count, m.snapshots)
    image[: m.cluster] = table
    struct.pack_into(">Q", image, m.l1 + 8 * index, 0 if snapshot_after else 1 << 63)
    set_refcount(image, m.blocks[0], 4, old // m.cluster, 0)
    path.write_bytes(image)
