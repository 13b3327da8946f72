"""Opening an image."""

from __future__ import annotations

from powercut.disk import Disk
from powercut.errors import InputError
from powercut.formats.qcow2 import layout as q
from powercut.formats.qcow2.driver import host, snapshots
from powercut.formats.qcow2.driver.core import unpack
from powercut.formats.qcow2.driver.host import MemoryFile
from powercut.formats.qcow2.driver.image import Backing, Image
from powercut.formats.qcow2.driver.practice import Practice
from powercut.formats.qcow2.driver.repair import rebuild
from powercut.formats.qcow2.header import Header, read_header

TODAY = Practice()
_AUTOCLEAR_FIELD = 88  # of the header: autoclear_features


async def open_image(practice: Practice = TODAY, backing: Backing | None = None) -> Image:
    """Open the image in the file. A dirty one gets its refcounts rebuilt. Raises InputError for what is no image, or
    has features that this driver does not know."""
    raw = await host.read(0, q.SECTOR)
    bits = int.from_bytes(raw[20:24], "big")
    if q.MIN_CLUSTER_BITS <= bits <= q.MAX_CLUSTER_BITS:
        raw = await host.read(0, 1 << bits)
    header = _readable(MemoryFile(raw))
    l1 = unpack(await host.read(header.l1_table_offset, header.l1_size * 8))
    length = header.refcount_table_clusters << header.cluster_bits
    image = Image(practice, header, l1, unpack(await host.read(header.refcount_table_offset, length)))
    image.backing = backing
    await snapshots.table(image)
    if header.autoclear:  # what this driver does not keep up to date (bitmaps) must not be believed any more
        await image.patch_header(_AUTOCLEAR_FIELD, bytes(8))
    if image.dirty:
        await rebuild(image)
    return image


def _readable(disk: Disk) -> Header:
    parsed = read_header(disk)
    header = parsed.header
    if header is None:
        raise InputError(parsed.problems[0].text)
    unknown = [
        name
        for name, has in (
            ("extended L2 entries", header.extended_l2),
            ("an external data file", header.data_file),
            ("encryption", bool(header.crypt_method)),
            ("zstd compression", header.compression_type != q.COMPRESSION_ZLIB),
            (f"refcounts of {header.refcount_bits} bits", header.refcount_bits < 8),
            ("the corrupt bit", header.corrupt),
        )
        if has
    ]
    if unknown:
        raise InputError(f"this driver cannot open an image with {', '.join(unknown)}")
    return header
