"""The header and its extensions: what QEMU accepts, and why it refuses the rest.

Sources: QEMU's docs/interop/qcow2.txt, sections "Header" to "Full disk encryption header pointer";
block/qcow2.c (qcow2_do_open, qcow2_read_extensions) for what is refused. Nothing is allocated on the word
of a header: lengths are compared with their limits before anything of that length is read.

Bytes are asked for in steps of one sector, as far as the fields and extensions reach and no further: on a
crash disk every sector that is read is a sector that must be decided.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from powercut.disk import Disk
from powercut.formats.qcow2 import layout as q
from powercut.verdict import Problem, Severity


@dataclass(frozen=True)
class BitmapsExtension:
    count: int
    directory_size: int
    directory_offset: int


@dataclass(frozen=True)
class Header:
    version: int
    size: int
    cluster_bits: int
    crypt_method: int
    l1_size: int
    l1_table_offset: int
    refcount_table_offset: int
    refcount_table_clusters: int
    nb_snapshots: int
    snapshots_offset: int
    incompatible: int
    compatible: int
    autoclear: int
    refcount_order: int
    header_length: int
    compression_type: int
    backing_file: bytes | None = None
    backing_format: bytes | None = None
    data_file_name: bytes | None = None
    bitmaps: BitmapsExtension | None = None  # None also when the autoclear bit says they are stale
    crypto_header: tuple[int, int] | None = None  # offset, length
    feature_names: tuple[tuple[int, int, str], ...] = ()  # type, bit, name
    unknown_extensions: tuple[tuple[int, int], ...] = ()  # type, length

    @cached_property
    def cluster_size(self) -> int:
        return 1 << self.cluster_bits

    @cached_property
    def dirty(self) -> bool:
        return bool(self.incompatible & q.INCOMPATIBLE_DIRTY)

    @cached_property
    def corrupt(self) -> bool:
        return bool(self.incompatible & q.INCOMPATIBLE_CORRUPT)

    @cached_property
    def data_file(self) -> bool:
        return bool(self.incompatible & q.INCOMPATIBLE_DATA_FILE)

    @cached_property
    def extended_l2(self) -> bool:
        return bool(self.incompatible & q.INCOMPATIBLE_EXTENDED_L2)

    @cached_property
    def l2_entry_size(self) -> int:
        return 16 if self.extended_l2 else 8

    @cached_property
    def l2_entries(self) -> int:
        return self.cluster_size // self.l2_entry_size

    @cached_property
    def refcount_bits(self) -> int:
        return 1 << self.refcount_order

    @cached_property
    def refcount_max(self) -> int:
        return (1 << self.refcount_bits) - 1

    @cached_property
    def refcounts_per_block(self) -> int:
        return self.cluster_size * 8 // self.refcount_bits

    @cached_property
    def guest_clusters(self) -> int:
        return -(-self.size // self.cluster_size)


@dataclass(frozen=True)
class Parsed:
    """`header` is None when QEMU would not get past it; `magic` is False when the file is not qcow2 at all.

    Problems beside a header are those that QEMU's own checker passes over, while a user's open does not.
    """

    header: Header | None
    problems: tuple[Problem, ...] = ()
    magic: bool = True


class _Refused(Exception):
    def __init__(self, kind: str, where: int, text: str) -> None:
        self.kind, self.where, self.text = kind, where, text


class _Short(Exception):
    """More bytes are needed: up to `length`."""

    def __init__(self, length: int) -> None:
        self.length = length


def read_header(disk: Disk) -> Parsed:
    """Parse and validate the header of `disk`."""
    length = q.SECTOR
    while True:
        parsed = _parse(disk.read(0, length).tobytes())
        if isinstance(parsed, Parsed):
            return parsed
        length = -(-parsed // q.SECTOR) * q.SECTOR


@lru_cache(maxsize=16)  # a search checks the same few headers hundreds of thousands of times
def _parse(raw: bytes) -> Parsed | int:
    try:
        return _header(raw)
    except _Refused as no:
        return Parsed(None, (_unopenable(no.kind, no.where, no.text),), magic=no.kind != "magic")
    except _Short as short:
        return short.length


def _unopenable(kind: str, where: int, text: str) -> Problem:
    return Problem("opens", kind, where, Severity.UNOPENABLE, text)


def _slice(raw: bytes, offset: int, length: int) -> bytes:
    if offset + length > len(raw):
        raise _Short(offset + length)
    return raw[offset : offset + length]


def _header(raw: bytes) -> Parsed:
    fields = np.frombuffer(raw, q.HEADER, count=1)[0]
    f = {name: int(fields[name]) for name in q.HEADER_V3.names or ()}
    if f["magic"] != q.MAGIC:
        raise _Refused("magic", 0, f"not qcow2: the file starts with {raw[:4].hex()}, not {q.MAGIC:08x}")
    version, bits = f["version"], f["cluster_bits"]
    if version not in (2, 3):
        raise _Refused("version", 4, f"version {version} is neither 2 nor 3")
    if not q.MIN_CLUSTER_BITS <= bits <= q.MAX_CLUSTER_BITS:
        raise _Refused("cluster-bits", 20, f"cluster_bits {bits} is not in 9..21")
    cluster = 1 << bits
    if version == 2:
        f |= {"incompatible_features": 0, "compatible_features": 0, "autoclear_features": 0}
        f |= {"refcount_order": 4, "header_length": q.HEADER_V2.itemsize}
    length = f["header_length"]
    if (version == 3 and length < q.HEADER_V3.itemsize) or length > cluster:
        raise _Refused("header-length", 100, f"header_length {length} is not in 104..{cluster}")
    if f["backing_file_offset"] > cluster:
        raise _Refused("backing-file", 8, f"backing file name at {f['backing_file_offset']:#x}, past cluster 0")
    extensions_end = f["backing_file_offset"] or cluster

    compression = int(fields["compression_type"]) if length > q.HEADER_V3.itemsize else q.COMPRESSION_ZLIB
    incompatible = f["incompatible_features"]
    if compression > q.COMPRESSION_ZSTD:
        raise _Refused("compression-type", 104, f"unknown compression type {compression}")
    if bool(compression) != bool(incompatible & q.INCOMPATIBLE_COMPRESSION):
        raise _Refused("compression-type", 104, f"compression type {compression} contradicts its feature bit")
    unknown = incompatible & ~q.INCOMPATIBLE_KNOWN
    if unknown:
        raise _Refused("incompatible-features", 72, _name_features(raw, length, extensions_end, unknown))
    if incompatible & q.INCOMPATIBLE_EXTENDED_L2 and cluster // q.SUBCLUSTERS < q.SECTOR:
        raise _Refused("subcluster-size", 20, f"extended L2 entries with {cluster}-byte clusters")
    if f["refcount_order"] > q.MAX_REFCOUNT_ORDER:
        raise _Refused("refcount-order", 96, f"refcount_order {f['refcount_order']} exceeds 6")
    if f["crypt_method"] > q.CRYPT_LUKS:
        raise _Refused("encryption", 32, f"unknown encryption method {f['crypt_method']}")

    _validate_table(
        "refcount-table", 48, f["refcount_table_offset"], f["refcount_table_clusters"],
        cluster, q.MAX_REFCOUNT_TABLE_BYTES, cluster,
    )  # fmt: skip
    _validate_table("l1-table", 40, f["l1_table_offset"], f["l1_size"], 8, q.MAX_L1_BYTES, cluster)
    _validate_size(f["size"], f["l1_size"], bits, incompatible)

    found = _extensions(raw, f, extensions_end, cluster)
    backing = _backing_file(raw, f, cluster)
    data_file = bool(incompatible & q.INCOMPATIBLE_DATA_FILE)
    if data_file and found.data_file_name is None:
        raise _Refused("data-file", 72, "an external data file is required, and its name is not in the header")
    if f["autoclear_features"] & q.AUTOCLEAR_DATA_FILE_RAW and not data_file:
        raise _Refused("data-file", 88, "a raw external data file is announced, but there is no external data file")
    if f["crypt_method"] == q.CRYPT_LUKS and found.crypto_header is None:
        raise _Refused("encryption", 32, "LUKS encryption without an encryption header")

    header = Header(
        version=version,
        size=f["size"],
        cluster_bits=bits,
        crypt_method=f["crypt_method"],
        l1_size=f["l1_size"],
        l1_table_offset=f["l1_table_offset"],
        refcount_table_offset=f["refcount_table_offset"],
        refcount_table_clusters=f["refcount_table_clusters"],
        nb_snapshots=f["nb_snapshots"],
        snapshots_offset=f["snapshots_offset"],
        incompatible=incompatible,
        compatible=f["compatible_features"],
        autoclear=f["autoclear_features"],
        refcount_order=f["refcount_order"],
        header_length=length,
        compression_type=compression,
        backing_file=backing,
        backing_format=found.backing_format,
        data_file_name=found.data_file_name,
        bitmaps=found.bitmaps,
        crypto_header=found.crypto_header,
        feature_names=found.feature_names,
        unknown_extensions=tuple(found.unknown),
    )
    problems = []
    if header.corrupt:
        problems.append(_unopenable("corrupt-bit", 72, "the corrupt bit is set: QEMU opens the image read-only"))
    if not header.refcount_table_clusters:
        problems.append(_unopenable("refcount-table", 56, "there is no refcount table"))
    return Parsed(header, tuple(problems))


def _validate_table(
    kind: str, where: int, offset: int, entries: int, entry_size: int, limit: int, cluster: int
) -> None:
    if entries > limit // entry_size:
        raise _Refused(kind, where, f"{kind.replace('-', ' ')} with {entries} entries of {entry_size} bytes: too large")
    end = offset + entries * entry_size
    if end > q.MAX_OFFSET or offset % cluster or (entries and end > q.MAX_LENGTH):
        raise _Refused(kind, where, f"{kind.replace('-', ' ')} at {offset:#x}: invalid offset")


def _validate_size(size: int, l1_size: int, cluster_bits: int, incompatible: int) -> None:
    if size // q.SECTOR * q.SECTOR > q.MAX_LENGTH:
        raise _Refused("size", 24, f"disk size {size} is too big")
    entry_bits = 4 if incompatible & q.INCOMPATIBLE_EXTENDED_L2 else 3
    covered = 1 << (cluster_bits + cluster_bits - entry_bits)  # by one L1 entry
    if l1_size < -(-size // covered):
        raise _Refused("l1-table", 36, f"{l1_size} L1 entries do not cover {size} bytes")


@dataclass
class _Extensions:
    unknown: list[tuple[int, int]]
    backing_format: bytes | None = None
    data_file_name: bytes | None = None
    bitmaps: BitmapsExtension | None = None
    crypto_header: tuple[int, int] | None = None
    feature_names: tuple[tuple[int, int, str], ...] = ()


def _extensions(raw: bytes, f: dict[str, int], end: int, cluster: int) -> _Extensions:
    found = _Extensions([])
    offset = f["header_length"]
    while offset < end:
        kind, length = (int.from_bytes(_slice(raw, offset + at, 4), "big") for at in (0, 4))
        start = offset + q.EXTENSION.itemsize
        if start > end or length > end - start:
            raise _Refused("extension", offset, f"header extension {kind:#010x} of {length} bytes is too long")
        if kind == q.EXTENSION_END:
            break
        if kind == q.EXTENSION_BACKING_FORMAT:
            if length > q.MAX_BACKING_FORMAT:
                raise _Refused("extension", offset, f"backing format name of {length} bytes is too long")
            found.backing_format = _slice(raw, start, length)
        elif kind == q.EXTENSION_FEATURE_NAMES:
            found.feature_names = _feature_names(_slice(raw, start, length))
        elif kind == q.EXTENSION_BITMAPS:
            found.bitmaps = _bitmaps(_slice(raw, start, length), offset, f, cluster)
        elif kind == q.EXTENSION_CRYPTO:
            found.crypto_header = _crypto(_slice(raw, start, length), offset, f, cluster)
        elif kind == q.EXTENSION_DATA_FILE:
            found.data_file_name = _slice(raw, start, length)
        else:
            found.unknown.append((kind, length))
        offset = start + -(-length // 8) * 8
    return found


def _feature_names(data: bytes) -> tuple[tuple[int, int, str], ...]:
    rows = np.frombuffer(data, q.FEATURE, count=len(data) // q.FEATURE.itemsize)
    return tuple((int(r["type"]), int(r["bit"]), bytes(r["name"]).decode("latin-1")) for r in rows)


def _name_features(raw: bytes, offset: int, end: int, bits: int) -> str:
    """What the unknown bits are called, if the header tells. A broken extension area does not matter here."""
    names: list[str] = []
    while offset + q.EXTENSION.itemsize <= end:
        kind, length = (int.from_bytes(_slice(raw, offset + at, 4), "big") for at in (0, 4))
        offset += q.EXTENSION.itemsize
        if kind == q.EXTENSION_END or length > end - offset:
            break
        if kind == q.EXTENSION_FEATURE_NAMES:
            for group, bit, name in _feature_names(_slice(raw, offset, length)):
                if group == 0 and bit < 64 and bits >> bit & 1:
                    names.append(name)
        offset += -(-length // 8) * 8
    called = f" ({', '.join(names)})" if names else ""
    return f"unknown incompatible features {bits:#x}{called}"


def _bitmaps(data: bytes, where: int, f: dict[str, int], cluster: int) -> BitmapsExtension | None:
    if len(data) != q.BITMAPS_EXTENSION.itemsize:
        raise _Refused("extension", where, f"bitmaps extension of {len(data)} bytes")
    if not f["autoclear_features"] & q.AUTOCLEAR_BITMAPS:
        return None
    row = np.frombuffer(data, q.BITMAPS_EXTENSION)[0]
    count, size, offset = int(row["nb_bitmaps"]), int(row["directory_size"]), int(row["directory_offset"])
    if row["reserved"]:
        raise _Refused("extension", where, "bitmaps extension with a reserved field that is not zero")
    if not 1 <= count <= q.MAX_BITMAPS:
        raise _Refused("extension", where, f"bitmaps extension with {count} bitmaps")
    if offset % cluster:
        raise _Refused("extension", where, f"bitmap directory at {offset:#x}: not cluster aligned")
    if not 1 <= size <= q.MAX_BITMAP_DIRECTORY_BYTES:
        raise _Refused("extension", where, f"bitmap directory of {size} bytes")
    return BitmapsExtension(count, size, offset)


def _crypto(data: bytes, where: int, f: dict[str, int], cluster: int) -> tuple[int, int]:
    if f["crypt_method"] != q.CRYPT_LUKS:
        raise _Refused("encryption", where, "encryption header without LUKS encryption")
    if len(data) != q.CRYPTO_EXTENSION.itemsize:
        raise _Refused("encryption", where, f"encryption header extension of {len(data)} bytes")
    row = np.frombuffer(data, q.CRYPTO_EXTENSION)[0]
    if int(row["offset"]) % cluster:
        raise _Refused("encryption", where, f"encryption header at {int(row['offset']):#x}: not cluster aligned")
    return int(row["offset"]), int(row["length"])


def _backing_file(raw: bytes, f: dict[str, int], cluster: int) -> bytes | None:
    offset, length = f["backing_file_offset"], f["backing_file_size"]
    if not offset:
        return None
    if length > min(q.MAX_BACKING_NAME, cluster - offset):
        raise _Refused("backing-file", 16, f"backing file name of {length} bytes at {offset:#x} is too long")
    return _slice(raw, offset, length)
