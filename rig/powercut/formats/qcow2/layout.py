"""The structures of a qcow2 file: one dtype each, big-endian, sizes asserted. No behaviour.

Source: QEMU's docs/interop/qcow2.txt; each structure names its section. Limits marked "QEMU" are not part
of the format: QEMU refuses what exceeds them (block/qcow2.h, block/qcow2-bitmap.c, include/block).
"""

from __future__ import annotations

import numpy as np

MAGIC = 0x514649FB  # "QFI\xfb"

BE64 = np.dtype(">u8")

# "Header": version 2 ends after snapshots_offset; version 3 has at least the fields up to header_length.
_V2 = [
    ("magic", ">u4"),
    ("version", ">u4"),
    ("backing_file_offset", ">u8"),
    ("backing_file_size", ">u4"),
    ("cluster_bits", ">u4"),
    ("size", ">u8"),
    ("crypt_method", ">u4"),
    ("l1_size", ">u4"),
    ("l1_table_offset", ">u8"),
    ("refcount_table_offset", ">u8"),
    ("refcount_table_clusters", ">u4"),
    ("nb_snapshots", ">u4"),
    ("snapshots_offset", ">u8"),
]
_V3 = [
    ("incompatible_features", ">u8"),
    ("compatible_features", ">u8"),
    ("autoclear_features", ">u8"),
    ("refcount_order", ">u4"),
    ("header_length", ">u4"),
]
# "Additional fields (version 3 and higher)" and "Header padding".
_ADDITIONAL = [("compression_type", "u1"), ("padding", "u1", 7)]

HEADER_V2 = np.dtype(_V2)
HEADER_V3 = np.dtype(_V2 + _V3)
HEADER = np.dtype(_V2 + _V3 + _ADDITIONAL)
assert HEADER_V2.itemsize == 72
assert HEADER_V3.itemsize == 104
assert HEADER.itemsize == 112

# "Header extensions", "Feature name table", "Bitmaps extension", "Full disk encryption header pointer".
EXTENSION = np.dtype([("type", ">u4"), ("length", ">u4")])
FEATURE = np.dtype([("type", "u1"), ("bit", "u1"), ("name", "S46")])
BITMAPS_EXTENSION = np.dtype(
    [("nb_bitmaps", ">u4"), ("reserved", ">u4"), ("directory_size", ">u8"), ("directory_offset", ">u8")]
)
CRYPTO_EXTENSION = np.dtype([("offset", ">u8"), ("length", ">u8")])
assert EXTENSION.itemsize == 8
assert FEATURE.itemsize == 48
assert BITMAPS_EXTENSION.itemsize == 24
assert CRYPTO_EXTENSION.itemsize == 16

# "Snapshots": the fixed part of an entry; then extra data, ID, name, padding to 8.
SNAPSHOT = np.dtype(
    [
        ("l1_table_offset", ">u8"),
        ("l1_size", ">u4"),
        ("id_size", ">u2"),
        ("name_size", ">u2"),
        ("date_seconds", ">u4"),
        ("date_nanoseconds", ">u4"),
        ("vm_clock", ">u8"),
        ("vm_state_size", ">u4"),
        ("extra_size", ">u4"),
    ]
)
SNAPSHOT_EXTRA = np.dtype([("vm_state_size", ">u8"), ("disk_size", ">u8")])
assert SNAPSHOT.itemsize == 40
assert SNAPSHOT_EXTRA.itemsize == 16

# "Bitmap directory": the fixed part of an entry; then extra data, name, padding to 8.
BITMAP = np.dtype(
    [
        ("table_offset", ">u8"),
        ("table_size", ">u4"),
        ("flags", ">u4"),
        ("type", "u1"),
        ("granularity_bits", "u1"),
        ("name_size", ">u2"),
        ("extra_size", ">u4"),
    ]
)
assert BITMAP.itemsize == 24

# "Header": feature bits.
INCOMPATIBLE_DIRTY = 1 << 0
INCOMPATIBLE_CORRUPT = 1 << 1
INCOMPATIBLE_DATA_FILE = 1 << 2
INCOMPATIBLE_COMPRESSION = 1 << 3
INCOMPATIBLE_EXTENDED_L2 = 1 << 4
INCOMPATIBLE_KNOWN = (1 << 5) - 1
COMPATIBLE_LAZY_REFCOUNTS = 1 << 0
AUTOCLEAR_BITMAPS = 1 << 0
AUTOCLEAR_DATA_FILE_RAW = 1 << 1

CRYPT_NONE, CRYPT_AES, CRYPT_LUKS = 0, 1, 2
COMPRESSION_ZLIB, COMPRESSION_ZSTD = 0, 1

# "Header extensions": types.
EXTENSION_END = 0x00000000
EXTENSION_BACKING_FORMAT = 0xE2792ACA
EXTENSION_FEATURE_NAMES = 0x6803F857
EXTENSION_BITMAPS = 0x23852875
EXTENSION_CRYPTO = 0x0537BE77
EXTENSION_DATA_FILE = 0x44415441

# "Cluster mapping": L1 and L2 entries share the offset field and the top bit.
COPIED = 1 << 63
COMPRESSED = 1 << 62
ZERO = 1 << 0
OFFSET_MASK = 0x00FF_FFFF_FFFF_FE00
L1_RESERVED = 0x7F00_0000_0000_01FF
L2_STANDARD_RESERVED = 0x3F00_0000_0000_01FE
SECTOR = 512  # the unit in which "Compressed Clusters Descriptor" counts additional data

# "Extended L2 Entries": the low half says allocated, the high half says reads as zeros.
SUBCLUSTERS = 32
SUB_ALLOCATED = 0x0000_0000_FFFF_FFFF

# "Host cluster management".
REFCOUNT_TABLE_OFFSET_MASK = 0xFFFF_FFFF_FFFF_FE00
REFCOUNT_TABLE_RESERVED = 0x1FF

# "Bitmap table", "Bitmap directory".
BITMAP_TABLE_OFFSET_MASK = 0x00FF_FFFF_FFFF_FE00
BITMAP_TABLE_RESERVED = 0xFF00_0000_0000_01FE
BITMAP_TABLE_ALL_ONES = 1
BITMAP_IN_USE = 1 << 0
BITMAP_FLAGS_RESERVED = 0xFFFF_FFFC  # QEMU: it does not know extra_data_compatible
BITMAP_DIRTY_TRACKING = 1

# QEMU: limits.
MIN_CLUSTER_BITS, MAX_CLUSTER_BITS = 9, 21
MAX_REFCOUNT_ORDER = 6
MAX_L1_BYTES = 32 << 20
MAX_REFCOUNT_TABLE_BYTES = 8 << 20
MAX_SNAPSHOTS = 65536
MAX_SNAPSHOT_TABLE_BYTES = 1024 * MAX_SNAPSHOTS
MAX_SNAPSHOT_EXTRA = 1024
MAX_BITMAPS = 65535
MAX_BITMAP_DIRECTORY_BYTES = 1024 * MAX_BITMAPS
MAX_BITMAP_TABLE_ENTRIES = 0x800_0000
MAX_BITMAP_BYTES = 0x2000_0000
MIN_GRANULARITY_BITS, MAX_GRANULARITY_BITS = 9, 31
MAX_BITMAP_NAME = 1023
MAX_BACKING_NAME = 1023
MAX_BACKING_FORMAT = 15
MAX_OFFSET = (1 << 63) - 1
MAX_LENGTH = MAX_OFFSET & -(1 << 30)  # no request and no disk may reach beyond (BDRV_MAX_LENGTH)
MAX_CLUSTERS = (1 << 31) - 1
