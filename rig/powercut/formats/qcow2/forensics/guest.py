"""What the guest sees at a few places, and what that says of the size of its disk.

Sources: UEFI specification, "GPT Header" (the alternate header is in the last sector); the four entries of a
PC's master boot record; Linux's fs/ext4/ext4.h (struct ext4_super_block) and fs/xfs/libxfs/xfs_format.h (struct
xfs_dsb).
"""

from __future__ import annotations

import struct
import zlib

import numpy as np

from powercut.disk import Disk
from powercut.formats.qcow2 import layout as q
from powercut.formats.qcow2.entries import U64, Kind, compressed_extent, kind
from powercut.formats.qcow2.header import Header

SECTOR = q.SECTOR


class Guest:
    """Reads of a layer whose L1 table is `l1`. What is not stored reads as zeros, as does what cannot be unpacked."""

    def __init__(self, disk: Disk, header: Header, l1: U64) -> None:
        self._disk, self._header, self._l1 = disk, header, l1

    def cluster(self, number: int) -> bytes:
        header = self._header
        index, slot = divmod(number, header.l2_entries)
        table = int(self._l1[index]) & q.OFFSET_MASK if index < len(self._l1) else 0
        if not table or table % header.cluster_size:
            return bytes(header.cluster_size)
        raw = self._disk.read(table + slot * header.l2_entry_size, 8)
        entry = raw.view(q.BE64).astype(np.uint64)
        what = int(kind(entry, header)[0])
        if what == Kind.NORMAL:
            return self._disk.read(int(entry[0]) & q.OFFSET_MASK, header.cluster_size).tobytes()
        if what == Kind.COMPRESSED:
            offset, length = (int(part[0]) for part in compressed_extent(entry, header))
            return _inflated(self._disk.read(offset, length).tobytes(), header.cluster_size)
        return bytes(header.cluster_size)

    def read(self, offset: int, length: int) -> bytes:
        size = self._header.cluster_size
        first, last = offset // size, (offset + length - 1) // size
        joined = b"".join(self.cluster(number) for number in range(first, last + 1))
        return joined[offset - first * size :][:length]


def _inflated(data: bytes, size: int) -> bytes:
    try:
        return zlib.decompressobj(-12).decompress(data, size).ljust(size, b"\0")
    except zlib.error:
        return bytes(size)


def told_size(start: bytes) -> tuple[int, str] | None:
    """The size in bytes of a disk that begins with these 4 KiB, and who says so. None if nobody does."""
    if start[512:520] == b"EFI PART":
        return (struct.unpack_from("<Q", start, 512 + 32)[0] + 1) * SECTOR, "the guest's GPT names its last sector"
    if start[1080:1082] == b"\x53\xef" and struct.unpack_from("<I", start, 1048)[0] <= 6:
        blocks, shift = struct.unpack_from("<I", start, 1028)[0], struct.unpack_from("<I", start, 1048)[0]
        return blocks << (10 + shift), "the guest's ext file system ends there"
    if start[:4] == b"XFSB":
        block, blocks = struct.unpack_from(">IQ", start, 4)
        return block * blocks, "the guest's XFS ends there"
    ends = [end for used, end in partitions(start) if used]
    return (max(ends), "the guest's last partition ends there") if ends else None


def partitions(sector: bytes) -> list[tuple[bool, int]]:
    """The four entries of a master boot record: whether used, and the end in bytes. Empty if it is none."""
    if sector[510:512] != b"\x55\xaa":
        return []
    out = []
    for at in range(446, 510, 16):
        status, system, first, count = struct.unpack_from("<B3xB3xII", sector, at)
        if status not in (0, 0x80):
            return []
        out.append((bool(system and first and count and system != 0xEE), (first + count) * SECTOR))
    return out
