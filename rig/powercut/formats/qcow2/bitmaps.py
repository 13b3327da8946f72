"""Persistent bitmaps: the directory and the bitmap tables.

Sources: QEMU's docs/interop/qcow2.txt, sections "Bitmap directory" and "Bitmap table"; block/qcow2-bitmap.c
(bitmap_list_load, check_dir_entry, load_bitmap, qcow2_check_bitmaps_refcounts). QEMU loads every bitmap that
is not in use when it opens the image, and refuses the image if that fails.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from powercut.disk import Disk
from powercut.formats.qcow2 import layout as q
from powercut.formats.qcow2.header import BitmapsExtension, Header


@dataclass(frozen=True, slots=True)
class Bitmap:
    where: int  # byte offset of the directory entry
    name: bytes
    table_offset: int
    table_size: int
    in_use: bool
    granularity_bits: int


@dataclass(frozen=True, slots=True)
class Directory:
    bitmaps: tuple[Bitmap, ...] = ()
    broken: str = ""  # why QEMU refuses to open the image


def read_directory(disk: Disk, header: Header, extension: BitmapsExtension) -> Directory:
    start, size = extension.directory_offset, extension.directory_size
    if start + size > q.MAX_LENGTH:
        return Directory(broken=f"bitmap directory at {start:#x}: out of reach")
    bitmaps: list[Bitmap] = []
    names: set[bytes] = set()
    position = 0
    while position < size:
        if position + q.BITMAP.itemsize > size:
            return Directory(broken="the bitmap directory ends inside an entry")
        if len(bitmaps) == extension.count:
            return Directory(broken=f"more than {extension.count} bitmaps in the directory")
        where = start + position
        row = np.frombuffer(disk.read(where, q.BITMAP.itemsize).tobytes(), q.BITMAP)[0]
        f = {name: int(row[name]) for name in q.BITMAP.names or ()}
        length = -(-(q.BITMAP.itemsize + f["name_size"] + f["extra_size"]) // 8) * 8
        if position + length > size:
            return Directory(broken="the last entry of the bitmap directory does not fit")
        broken = _defect(f, header)
        if broken:
            return Directory(broken=f"bitmap {len(bitmaps)}: {broken}")
        # QEMU reads the name as a C string.
        name = disk.read(where + q.BITMAP.itemsize, f["name_size"]).tobytes().split(b"\0")[0]
        in_use = bool(f["flags"] & q.BITMAP_IN_USE)
        if name in names and not in_use:
            return Directory(broken=f"two bitmaps of one name: {name!r}")
        names.add(name)
        bitmaps.append(Bitmap(where, name, f["table_offset"], f["table_size"], in_use, f["granularity_bits"]))
        position += length
    if len(bitmaps) != extension.count:
        return Directory(broken=f"{len(bitmaps)} bitmaps in the directory, {extension.count} announced")
    return Directory(tuple(bitmaps))


def _defect(f: dict[str, int], header: Header) -> str:
    if f["extra_size"]:
        return "extra data is not supported"
    if not f["table_size"] or not f["table_offset"] or f["table_offset"] % header.cluster_size:
        return f"bitmap table of {f['table_size']} entries at {f['table_offset']:#x}"
    data = f["table_size"] * header.cluster_size
    if f["table_size"] > q.MAX_BITMAP_TABLE_ENTRIES or data > q.MAX_BITMAP_BYTES:
        return f"bitmap table of {f['table_size']} entries is too large"
    if not q.MIN_GRANULARITY_BITS <= f["granularity_bits"] <= q.MAX_GRANULARITY_BITS:
        return f"granularity_bits {f['granularity_bits']}"
    if f["flags"] & q.BITMAP_FLAGS_RESERVED:
        return f"flags {f['flags']:#x}"
    if f["name_size"] > q.MAX_BITMAP_NAME:
        return f"name of {f['name_size']} bytes"
    if f["type"] != q.BITMAP_DIRTY_TRACKING:
        return f"type {f['type']}"
    covered = data * 8 << f["granularity_bits"]
    if not f["flags"] & q.BITMAP_IN_USE and guest_bytes(header) > covered:
        return f"its table covers {covered} of {guest_bytes(header)} bytes"
    return ""


def guest_bytes(header: Header) -> int:
    return header.size // q.SECTOR * q.SECTOR


def expected_table_size(bitmap: Bitmap, header: Header) -> int:
    """Table entries QEMU wants for a bitmap that is not in use: the bits are stored in words of 64."""
    bits = -(-guest_bytes(header) // (1 << bitmap.granularity_bits))
    return -(-(-(-bits // 64) * 8) // header.cluster_size)
