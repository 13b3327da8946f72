"""The header: what is read from it, what is refused, and that nothing is allocated on its word."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from formats.qcow2.images import needs_qemu, qemu_check, qemu_img
from formats.qcow2.spans import PlainDisk
from powercut.disk import ImageDisk
from powercut.formats.qcow2 import layout as q
from powercut.formats.qcow2.header import Header, Parsed, read_header
from powercut.verdict import Severity

OFFSETS = {name: q.HEADER.fields[name][1] for name in q.HEADER.names or ()}  # type: ignore[index]
FORMATS = {4: ">I", 8: ">Q", 1: ">B"}


def build(extensions: bytes = b"", **fields: int) -> bytearray:
    """A header by hand: version 3, 4 KiB clusters, 1 MiB disk, no extensions."""
    out = bytearray(4096 * 64)
    values = {
        "magic": q.MAGIC,
        "version": 3,
        "cluster_bits": 12,
        "size": 1 << 20,
        "l1_size": 1,
        "l1_table_offset": 3 * 4096,
        "refcount_table_offset": 4096,
        "refcount_table_clusters": 1,
        "refcount_order": 4,
        "header_length": 112,
        **fields,
    }
    for name, value in values.items():
        width = q.HEADER.fields[name][0].itemsize  # type: ignore[index]
        struct.pack_into(FORMATS[width], out, OFFSETS[name], value)
    start = values["header_length"] if values["version"] == 3 else 72
    out[start : start + len(extensions)] = extensions
    return out


def extension(kind: int, data: bytes) -> bytes:
    return struct.pack(">II", kind, len(data)) + data + bytes(-len(data) % 8)


def parse(image: bytes | bytearray) -> Parsed:
    return read_header(PlainDisk(image))


def header_of(image: bytes | bytearray) -> Header:
    parsed = parse(image)
    assert parsed.header is not None, parsed.problems
    return parsed.header


def test_plain_header() -> None:
    header = header_of(build())
    assert (header.version, header.size, header.cluster_size) == (3, 1 << 20, 4096)
    assert (header.l2_entries, header.l2_entry_size, header.guest_clusters) == (512, 8, 256)
    assert (header.refcount_bits, header.refcount_max, header.refcounts_per_block) == (16, 65535, 2048)
    assert not any((header.dirty, header.corrupt, header.data_file, header.extended_l2))


def test_version_2_has_no_feature_bits() -> None:
    header = header_of(build(version=2, autoclear_features=(1 << 64) - 1, refcount_order=99, header_length=0))
    assert (header.incompatible, header.autoclear, header.refcount_order, header.header_length) == (0, 0, 4, 72)


def test_extensions() -> None:
    features = struct.pack(">BB46s", 0, 0, b"dirty bit") + struct.pack(">BB46s", 2, 0, b"bitmaps")
    header = header_of(
        build(
            extension(q.EXTENSION_BACKING_FORMAT, b"qcow2")
            + extension(q.EXTENSION_FEATURE_NAMES, features)
            + extension(0x12345678, b"of the future")
            + extension(q.EXTENSION_BITMAPS, struct.pack(">IIQQ", 2, 0, 64, 5 * 4096))
            + extension(q.EXTENSION_DATA_FILE, b"data.raw")
            + extension(q.EXTENSION_CRYPTO, struct.pack(">QQ", 6 * 4096, 100))
            + extension(q.EXTENSION_END, b""),
            autoclear_features=q.AUTOCLEAR_BITMAPS,
            incompatible_features=q.INCOMPATIBLE_DATA_FILE | q.INCOMPATIBLE_DIRTY,
            crypt_method=q.CRYPT_LUKS,
            backing_file_offset=2048,
            backing_file_size=7,
        )[:2048]
        + b"base.qc"
    )
    assert header.backing_format == b"qcow2"
    assert header.backing_file == b"base.qc"
    assert header.feature_names == ((0, 0, "dirty bit"), (2, 0, "bitmaps"))
    assert header.unknown_extensions == ((0x12345678, 13),)
    assert header.bitmaps is not None
    assert (header.bitmaps.count, header.bitmaps.directory_size, header.bitmaps.directory_offset) == (2, 64, 20480)
    assert header.data_file_name == b"data.raw"
    assert header.crypto_header == (24576, 100)
    assert header.dirty


def test_bitmaps_without_their_autoclear_bit_are_stale() -> None:
    header = header_of(build(extension(q.EXTENSION_BITMAPS, struct.pack(">IIQQ", 2, 9, 64, 1))))
    assert header.bitmaps is None


BITMAPS = {"autoclear_features": 1}
REFUSED: list[tuple[str, bytes, dict[str, int]]] = [
    ("magic", b"", {"magic": 0x12345678}),
    ("version", b"", {"version": 1}),
    ("version", b"", {"version": 4}),
    ("cluster-bits", b"", {"cluster_bits": 8}),
    ("cluster-bits", b"", {"cluster_bits": 22}),
    ("cluster-bits", b"", {"cluster_bits": 0xFFFFFFFF}),
    ("header-length", b"", {"header_length": 103}),
    ("header-length", b"", {"header_length": 4097}),
    ("backing-file", b"", {"backing_file_offset": 4097}),
    ("backing-file", b"", {"backing_file_offset": 1024, "backing_file_size": 1024}),
    ("backing-file", b"", {"backing_file_offset": 4000, "backing_file_size": 97}),
    ("compression-type", b"", {"compression_type": 2}),
    ("compression-type", b"", {"compression_type": 1}),
    ("compression-type", b"", {"incompatible_features": q.INCOMPATIBLE_COMPRESSION}),
    ("incompatible-features", b"", {"incompatible_features": 1 << 63}),
    ("subcluster-size", b"", {"incompatible_features": q.INCOMPATIBLE_EXTENDED_L2}),
    ("refcount-order", b"", {"refcount_order": 7}),
    ("encryption", b"", {"crypt_method": 3}),
    ("encryption", b"", {"crypt_method": q.CRYPT_LUKS}),
    ("encryption", extension(q.EXTENSION_CRYPTO, bytes(16)), {}),
    ("encryption", extension(q.EXTENSION_CRYPTO, bytes(15)), {"crypt_method": q.CRYPT_LUKS}),
    ("encryption", extension(q.EXTENSION_CRYPTO, struct.pack(">QQ", 5, 5)), {"crypt_method": q.CRYPT_LUKS}),
    ("refcount-table", b"", {"refcount_table_clusters": 2049}),
    ("refcount-table", b"", {"refcount_table_clusters": 0xFFFFFFFF}),
    ("refcount-table", b"", {"refcount_table_offset": 4097}),
    ("refcount-table", b"", {"refcount_table_offset": 1 << 63}),
    ("l1-table", b"", {"l1_size": (4 << 20) + 1}),
    ("l1-table", b"", {"l1_table_offset": 512}),
    ("l1-table", b"", {"l1_size": 0}),
    ("l1-table", b"", {"size": 1 << 40}),
    ("size", b"", {"size": (1 << 64) - 1}),
    ("data-file", b"", {"incompatible_features": q.INCOMPATIBLE_DATA_FILE}),
    ("data-file", b"", {"autoclear_features": q.AUTOCLEAR_DATA_FILE_RAW}),
    ("extension", struct.pack(">II", 7, 0xFFFFFFFF), {}),
    ("extension", struct.pack(">II", q.EXTENSION_FEATURE_NAMES, 4096), {}),
    ("extension", extension(q.EXTENSION_BACKING_FORMAT, b"sixteen letters!"), {}),
    ("extension", extension(q.EXTENSION_BITMAPS, bytes(23)), {}),
    ("extension", extension(q.EXTENSION_BITMAPS, struct.pack(">IIQQ", 0, 0, 64, 4096)), BITMAPS),
    ("extension", extension(q.EXTENSION_BITMAPS, struct.pack(">IIQQ", 65536, 0, 64, 4096)), BITMAPS),
    ("extension", extension(q.EXTENSION_BITMAPS, struct.pack(">IIQQ", 1, 1, 64, 4096)), BITMAPS),
    ("extension", extension(q.EXTENSION_BITMAPS, struct.pack(">IIQQ", 1, 0, 1 << 60, 4096)), BITMAPS),
    ("extension", extension(q.EXTENSION_BITMAPS, struct.pack(">IIQQ", 1, 0, 64, 4097)), BITMAPS),
]


@pytest.mark.parametrize(("kind", "extensions", "fields"), REFUSED)
def test_refused(kind: str, extensions: bytes, fields: dict[str, int]) -> None:
    disk = PlainDisk(build(extensions, **fields))
    parsed = read_header(disk)
    assert parsed.header is None
    (problem,) = parsed.problems
    assert (problem.rule, problem.kind, problem.severity) == ("opens", kind, Severity.UNOPENABLE)
    assert parsed.magic == (kind != "magic")
    assert disk.total <= 16384


@needs_qemu
@pytest.mark.parametrize(("kind", "extensions", "fields"), REFUSED)
def test_qemu_refuses_it_too(kind: str, extensions: bytes, fields: dict[str, int], tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    path.write_bytes(build(extensions, **fields))
    outcome = qemu_check(path)
    assert (outcome.exit_code, outcome.counted) == (1, False)


@needs_qemu
def test_qemu_accepts_the_header_these_are_made_from(tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    path.write_bytes(build())
    assert qemu_check(path).counted


def test_the_corrupt_bit_and_a_missing_refcount_table_do_not_stop_the_checker() -> None:
    for fields, kind in (
        ({"incompatible_features": 2}, "corrupt-bit"),
        ({"refcount_table_clusters": 0}, "refcount-table"),
    ):
        parsed = parse(build(**fields))
        assert parsed.header is not None
        assert [problem.kind for problem in parsed.problems] == [kind]


def test_names_of_unknown_features_are_shown() -> None:
    names = extension(q.EXTENSION_FEATURE_NAMES, struct.pack(">BB46s", 0, 60, b"time travel"))
    (problem,) = parse(build(names, incompatible_features=1 << 60)).problems
    assert "time travel" in problem.text


@pytest.mark.parametrize("content", [b"", b"\0", b"QFI\xfb", b"QFI\xfb\0\0\0\3", bytes(111), b"x" * 4096])
def test_short_files(content: bytes) -> None:
    parsed = parse(content)
    assert parsed.header is None
    assert parsed.magic == content.startswith(b"QFI\xfb")


def test_reads_no_further_than_needed() -> None:
    disk = PlainDisk(build())
    read_header(disk)
    assert disk.total == 512


@given(st.binary(min_size=0, max_size=1200), st.booleans())
def test_random_bytes_behind_the_magic(content: bytes, plausible: bool) -> None:
    image = build() if plausible else bytearray(b"QFI\xfb") + bytes(8)
    image[112 if plausible else 4 :] = content
    disk = PlainDisk(image)
    assert isinstance(read_header(disk), Parsed)
    assert disk.total <= 40 << 20  # at most the whole cluster, a sector at a time


@given(st.dictionaries(st.sampled_from(sorted(OFFSETS.keys() - {"magic", "padding"})), st.integers(0, (1 << 64) - 1)))
def test_random_fields(fields: dict[str, int]) -> None:
    widths = {name: q.HEADER.fields[name][0].itemsize * 8 for name in fields}  # type: ignore[index]
    disk = PlainDisk(build(**{name: value % (1 << widths[name]) for name, value in fields.items()}))
    assert isinstance(read_header(disk), Parsed)


@needs_qemu
def test_images_of_qemu(tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    assert qemu_img("create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on,extended_l2=on", path, "1G")
    header = read_header(ImageDisk(path)).header
    assert header is not None
    assert header.extended_l2
    assert header.compatible == q.COMPATIBLE_LAZY_REFCOUNTS
    assert {name for _, _, name in header.feature_names} >= {"dirty bit", "corrupt bit"}
