"""A header written out, and a header of which only the first bytes are gone.

Source: QEMU's docs/interop/qcow2.txt, sections "Header" and "Header extensions".
"""

from __future__ import annotations

import struct

from powercut.disk import Disk
from powercut.formats.qcow2 import layout as q
from powercut.formats.qcow2.forensics.overlay import Overlaid
from powercut.formats.qcow2.header import Header, read_header

# Within the second sector, without and with a backing format in front (QEMU 4.0 and later: 6 to 8 feature names).
_BACKING_NAME_AT = (0, 16)


def pack(header: Header) -> bytes:
    """Header, extensions and backing file name: what an image must have, without bitmaps and feature names."""
    start = q.HEADER_V2.itemsize if header.version == 2 else q.HEADER.itemsize
    extensions = b""
    if header.backing_file is not None and header.backing_format:
        extensions += _extension(q.EXTENSION_BACKING_FORMAT, header.backing_format)
    if header.crypto_header is not None:
        extensions += _extension(q.EXTENSION_CRYPTO, struct.pack(">QQ", *header.crypto_header))
    if header.data_file_name is not None:
        extensions += _extension(q.EXTENSION_DATA_FILE, header.data_file_name)
    extensions += struct.pack(">II", q.EXTENSION_END, 0)
    name = header.backing_file or b""
    out = struct.pack(
        ">IIQIIQIIQQIIQ", q.MAGIC, header.version, start + len(extensions) if name else 0, len(name),
        header.cluster_bits, header.size, header.crypt_method, header.l1_size, header.l1_table_offset,
        header.refcount_table_offset, header.refcount_table_clusters, header.nb_snapshots, header.snapshots_offset,
    )  # fmt: skip
    if header.version > 2:
        out += struct.pack(
            ">QQQIIB7x", header.incompatible, header.compatible, header.autoclear, header.refcount_order,
            q.HEADER.itemsize, header.compression_type,
        )  # fmt: skip
    return out + extensions + name


def _extension(kind: int, data: bytes) -> bytes:
    return struct.pack(">II", kind, len(data)) + data.ljust(-(-len(data) // 8) * 8, b"\0")


def without_magic(disk: Disk) -> list[Header]:
    """What the header may be if no more than its first 8 bytes, magic and version, are lost."""
    found = []
    for version in (3, 2):
        start = struct.pack(">II", q.MAGIC, version)
        header = read_header(Overlaid(disk, {0: start})).header
        if header is None or not header.l1_size:
            continue
        tables = (header.l1_table_offset, header.refcount_table_offset)
        if all(0 < offset < disk.size for offset in tables) and (version == 2 or header.header_length in (104, 112)):
            found.append(header)
    return found


def backing_name(disk: Disk) -> bytes | None:
    """The backing file's name, where QEMU puts it behind its feature names: in the second sector. That is left when
    the first was overwritten by a master boot record, or another thing of one sector."""
    raw = disk.read(q.SECTOR, q.SECTOR).tobytes()
    for at in _BACKING_NAME_AT:
        name, behind = raw[at:].split(b"\0", 1)[0], raw[at:].lstrip(b"\0")
        alone = not raw[:at].strip(b"\0") and not behind[len(name) :].strip(b"\0")
        if name and alone and name.decode("latin-1").isprintable() and name[:8] not in (b"EFI PART", b"LABELONE"):
            return name
    return None
