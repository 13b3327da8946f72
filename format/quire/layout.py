"""Every structure on disk, byte by byte, and where the pages of a leaf lie. No behaviour: SPEC.md says what it means.

A test holds these types and SPEC.md's tables together. All numbers are little-endian.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final, NamedTuple, Self

import numpy as np
import xxhash

VERSION: Final = 1
BLOCK: Final = 4096
PAGE: Final = 4096
SECTOR: Final = 512
DATA_ALIGN: Final = 65536
MAX_SIZE: Final = 1 << 56
BLOCKS_PER_PAGE: Final = 16128
PAGES_PER_INDEX: Final = 504
MAX_ENTRIES: Final = 252
MAX_CHECKED: Final = 168  # entries of a C record
MAX_VERIFIED: Final = 1024  # blocks of data of a C record
SLOTS: Final = (4, 65536)
MAX_MANIFEST: Final = 64 << 20
MAX_NAME: Final = 120
MAX_PATH: Final = 236
NONE: Final = bytes(16)  # no id

HEADER_MAGIC: Final = b"QHDR"
INDEX_MAGIC: Final = b"QIDX"
MAP_MAGIC: Final = b"QMAP"
RECORD_MAGIC: Final = b"QREC"
MANIFEST_MAGIC: Final = b"QMAN"

PARENT, DATA, ZERO, DROPPED = range(4)  # states of blocks; the last only in R records
P, C, M, R = range(1, 5)  # kinds of records
HEAD, SNAPSHOT = 1, 2  # kinds of names
DEAD_LEAF, DEAD_STATE = 1, 2
CHECKED_RECORDS: Final = 1  # incompatible feature of a leaf: C records may occur
KNOWN_FEATURES: Final = CHECKED_RECORDS
SEALED: Final = 1  # flag of a leaf row

PREFIX = np.dtype(
    [
        ("checksum", "<u8"),
        ("magic", "S4"),
        ("kind", "<u2"),
        ("count", "<u2"),
        ("owner", "V16"),
        ("number", "<u8"),
        ("generation", "<u8"),
        ("previous", "<u8"),
        ("zero", "<u8"),
    ]
)
HEADER = np.dtype(  # at 64 in its page
    [
        ("version", "<u4"),
        ("slots", "<u4"),
        ("incompatible", "<u8"),
        ("compatible", "<u8"),
        ("size", "<u8"),
        ("set", "V16"),
        ("parent", "V16"),
        ("base", "V16"),
        ("created", "<u8"),
        ("name", "V120"),
    ]
)
ENTRY = np.dtype([("start", "<u8"), ("length", "<u4"), ("state", "<u4")])
MANIFEST = np.dtype(  # at 64 in its file
    [
        ("version", "<u4"),
        ("leaves", "<u4"),
        ("names", "<u4"),
        ("bases", "<u4"),
        ("dead", "<u4"),
        ("zero", "<u4"),
        ("incompatible", "<u8"),
    ]
)
LEAF_ROW = np.dtype(
    [
        ("leaf", "V16"),
        ("parent", "V16"),
        ("base", "<u4"),
        ("slots", "<u4"),
        ("size", "<u8"),
        ("flags", "<u8"),
        ("seal", "V16"),
        ("zero", "V24"),
    ]
)
NAME_ROW = np.dtype(
    [
        ("kind", "<u4"),
        ("length", "<u4"),
        ("leaf", "V16"),
        ("state", "V16"),
        ("state_size", "<u8"),
        ("state_check", "<u8"),
        ("created", "<u8"),
        ("zero", "<u8"),
        ("name", "V120"),
    ]
)
BASE_ROW = np.dtype([("set", "V16"), ("length", "<u4"), ("path", "V236")])
DEAD_ROW = np.dtype([("id", "V16"), ("kind", "<u4"), ("zero", "<u4")])

PREFIX_STRUCT = struct.Struct("<Q4sHH16sQQQQ")  # PREFIX, for where speed counts
assert PREFIX.itemsize == PREFIX_STRUCT.size == 64
assert HEADER.itemsize == 208
assert ENTRY.itemsize == 16
assert MANIFEST.itemsize == 32
assert (LEAF_ROW.itemsize, NAME_ROW.itemsize, BASE_ROW.itemsize, DEAD_ROW.itemsize) == (96, 192, 256, 24)
PAYLOAD: Final = PAGE - PREFIX.itemsize
assert PAYLOAD * 4 == BLOCKS_PER_PAGE
assert PAYLOAD // 8 == PAGES_PER_INDEX
assert PAYLOAD // ENTRY.itemsize == MAX_ENTRIES
assert PAYLOAD // (ENTRY.itemsize + 8) == MAX_CHECKED


def checksum(data: bytes | bytearray | memoryview) -> int:
    """The checksum of the format: xxh3-64 with seed 0."""
    return xxhash.xxh3_64_intdigest(data)


class Prefix(NamedTuple):
    """A page's prefix, decoded. `entries` is its field `count`."""

    checksum: int
    magic: bytes
    kind: int
    entries: int
    owner: bytes
    number: int
    generation: int
    previous: int
    zero: int


def page(
    magic: bytes,
    owner: bytes,
    payload: bytes,
    *,
    number: int = 0,
    generation: int = 0,
    previous: int = 0,
    kind: int = 0,
    count: int = 0,
) -> bytes:
    """A whole page, or a manifest (which is not padded to a page)."""
    if magic != MANIFEST_MAGIC:
        payload = payload.ljust(PAYLOAD, b"\0")
    raw = PREFIX_STRUCT.pack(0, magic, kind, count, owner, number, generation, previous, 0) + payload
    return checksum(memoryview(raw)[8:]).to_bytes(8, "little") + raw[8:]


def read_page(raw: bytes, magic: bytes, owner: bytes) -> Prefix | None:
    """The prefix of a good page; None if its length, checksum, magic or owner are wrong."""
    if len(raw) != PAGE or raw[8:12] != magic or raw[16:32] != owner:
        return None
    prefix = Prefix._make(PREFIX_STRUCT.unpack_from(raw))
    return prefix if prefix.checksum == checksum(memoryview(raw)[8:]) and not prefix.zero else None


@dataclass(frozen=True, slots=True)
class Geometry:
    """Where the pages of a leaf lie. Counts are pages, places bytes."""

    size: int
    slots: int
    blocks: int
    data: int  # D: the first byte behind the disk's blocks
    map_pages: int
    index_pages: int

    @classmethod
    def of(cls, size: int, slots: int) -> Self:
        blocks = -(-size // BLOCK)
        map_pages = -(-blocks // BLOCKS_PER_PAGE)
        data = -(-size // DATA_ALIGN) * DATA_ALIGN
        return cls(size, slots, blocks, data, map_pages, -(-map_pages // PAGES_PER_INDEX))

    @property
    def pages(self) -> int:
        """n: the pages of one copy."""
        return 1 + self.index_pages + self.map_pages + self.slots

    @property
    def end(self) -> int:
        """The length of the file."""
        return self.data + 2 * self.pages * PAGE

    def header(self, copy: int) -> int:
        return self.end - PAGE if copy else self.data

    def index(self, number: int, copy: int) -> int:
        return self.data + (1 + number + copy * (self.pages - 1)) * PAGE

    def map(self, number: int, copy: int) -> int:
        return self.index(self.index_pages + number, copy)

    def slot(self, number: int, copy: int) -> int:
        return self.index(self.index_pages + self.map_pages + number % self.slots, copy)


def default_slots(size: int) -> int:
    """How long a new leaf's journal is: a slot for each 16 MiB of disk, a power of two from 64 to 4096."""
    return min(4096, max(64, 1 << (size >> 24).bit_length() - 1)) if size >> 24 else 64
