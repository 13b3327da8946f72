"""The dtypes against bytes written by hand from the format's specification: two witnesses."""

from __future__ import annotations

import numpy as np
import pytest

from powercut.formats.qcow2 import layout as q

# One dump per structure, after the sections of docs/interop/qcow2.txt; every field holds another value.
DUMPS = {
    "HEADER": (
        q.HEADER,
        """
        51 46 49 fb  00 00 00 03  00 00 00 00 00 00 02 00  00 00 00 11  00 00 00 10
        00 00 00 00 10 00 00 00  00 00 00 02  00 00 00 05  00 00 00 00 00 03 00 00
        00 00 00 00 00 01 00 00  00 00 00 06  00 00 00 07  00 00 00 00 00 08 00 00
        00 00 00 00 00 00 00 09  00 00 00 00 00 00 00 0a  00 00 00 00 00 00 00 0b
        00 00 00 04  00 00 00 70  01  00 00 00 00 00 00 00
        """,
        {
            "magic": q.MAGIC,
            "version": 3,
            "backing_file_offset": 0x200,
            "backing_file_size": 0x11,
            "cluster_bits": 16,
            "size": 0x10000000,
            "crypt_method": 2,
            "l1_size": 5,
            "l1_table_offset": 0x30000,
            "refcount_table_offset": 0x10000,
            "refcount_table_clusters": 6,
            "nb_snapshots": 7,
            "snapshots_offset": 0x80000,
            "incompatible_features": 9,
            "compatible_features": 10,
            "autoclear_features": 11,
            "refcount_order": 4,
            "header_length": 112,
            "compression_type": 1,
        },
    ),
    "EXTENSION": (q.EXTENSION, "e2 79 2a ca  00 00 00 05", {"type": q.EXTENSION_BACKING_FORMAT, "length": 5}),
    "FEATURE": (
        q.FEATURE,
        "00 04 65 78 74 65 6e 64 65 64 20 4c 32 20 65 6e 74 72 69 65 73" + " 00" * 27,
        {"type": 0, "bit": 4, "name": b"extended L2 entries"},
    ),
    "BITMAPS_EXTENSION": (
        q.BITMAPS_EXTENSION,
        "00 00 00 02  00 00 00 00  00 00 00 00 00 00 00 40  00 00 00 00 00 09 00 00",
        {"nb_bitmaps": 2, "reserved": 0, "directory_size": 0x40, "directory_offset": 0x90000},
    ),
    "CRYPTO_EXTENSION": (
        q.CRYPTO_EXTENSION,
        "00 00 00 00 00 04 00 00  00 00 00 00 00 20 00 00",
        {"offset": 0x40000, "length": 0x200000},
    ),
    "SNAPSHOT": (
        q.SNAPSHOT,
        """
        00 00 00 00 00 06 00 00  00 00 00 01  00 02  00 03  5f 00 00 01  00 00 00 04
        00 00 00 00 00 00 00 05  00 00 00 06  00 00 00 10
        """,
        {
            "l1_table_offset": 0x60000,
            "l1_size": 1,
            "id_size": 2,
            "name_size": 3,
            "date_seconds": 0x5F000001,
            "date_nanoseconds": 4,
            "vm_clock": 5,
            "vm_state_size": 6,
            "extra_size": 16,
        },
    ),
    "SNAPSHOT_EXTRA": (
        q.SNAPSHOT_EXTRA,
        "00 00 00 01 00 00 00 00  00 00 00 00 10 00 00 00",
        {"vm_state_size": 1 << 32, "disk_size": 1 << 28},
    ),
    "BITMAP": (
        q.BITMAP,
        "00 00 00 00 00 0a 00 00  00 00 00 01  00 00 00 02  01  10  00 03  00 00 00 00",
        {
            "table_offset": 0xA0000,
            "table_size": 1,
            "flags": 2,
            "type": 1,
            "granularity_bits": 16,
            "name_size": 3,
            "extra_size": 0,
        },
    ),
}


@pytest.mark.parametrize("name", DUMPS)
def test_bytes_written_by_hand(name: str) -> None:
    dtype, dump, expected = DUMPS[name]
    row = np.frombuffer(bytes.fromhex(dump), dtype)
    assert len(row) == 1
    assert {field: row[0][field] for field in expected} == expected
    assert set(dtype.names or ()) - set(expected) <= {"padding"}


def test_version_2_and_3_are_the_start_of_the_full_header() -> None:
    full = q.HEADER.fields
    assert full is not None
    for short in (q.HEADER_V2, q.HEADER_V3):
        assert short.fields is not None
        assert {name: full[name] for name in short.fields} == dict(short.fields)


def test_bits_of_an_entry_do_not_overlap() -> None:
    l1 = [q.COPIED, q.L1_RESERVED, q.OFFSET_MASK]
    l2 = [q.COPIED, q.COMPRESSED, q.L2_STANDARD_RESERVED, q.OFFSET_MASK, q.ZERO]
    table = [q.REFCOUNT_TABLE_OFFSET_MASK, q.REFCOUNT_TABLE_RESERVED]
    bitmap = [q.BITMAP_TABLE_OFFSET_MASK, q.BITMAP_TABLE_RESERVED, q.BITMAP_TABLE_ALL_ONES]
    for masks in (l1, l2, table, bitmap):
        assert sum(masks) == (1 << 64) - 1
        assert np.bitwise_xor.reduce(np.array(masks, dtype=np.uint64)) == (1 << 64) - 1
