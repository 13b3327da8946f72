"""New images: a header, an L1 table, a refcount table and as many refcount blocks as count them.

Source: QEMU's docs/interop/qcow2.txt, "Header"; the order of the parts is that of QEMU before 2010.
"""

from __future__ import annotations

import numpy as np

from powercut.formats.qcow2 import layout as q

_BACKING_NAME = 512  # where the name of the backing file is in the header's cluster: apart from fields that change
_REFCOUNT_ORDER = 4


def create(
    size: int, *, cluster_bits: int = 16, version: int = 3, lazy: bool = False, backing: str | None = None
) -> bytes:
    """The content of a new image of a disk of `size` bytes. `backing`: the name of a raw file below it."""
    cluster = 1 << cluster_bits
    covered = cluster * (cluster // 8)  # bytes of the disk, by an L2 table
    per_block = cluster * 8 >> _REFCOUNT_ORDER
    l1_size = -(-size // covered)
    l1_clusters = max(1, -(-l1_size * 8 // cluster))
    used = blocks = 0
    while blocks * per_block < (used := 2 + l1_clusters + blocks) or not blocks:
        blocks += 1
    table = 1 + l1_clusters
    assert blocks <= cluster // 8, "the refcount table has one cluster"
    header = np.zeros(1, q.HEADER_V2 if version == 2 else q.HEADER)
    header["magic"], header["version"], header["cluster_bits"], header["size"] = q.MAGIC, version, cluster_bits, size
    header["l1_size"], header["l1_table_offset"] = l1_size, cluster
    header["refcount_table_offset"], header["refcount_table_clusters"] = table * cluster, 1
    if version >= 3:
        header["refcount_order"], header["header_length"] = _REFCOUNT_ORDER, q.HEADER.itemsize
        header["compatible_features"] = q.COMPATIBLE_LAZY_REFCOUNTS if lazy else 0
    image = bytearray(used * cluster)
    extensions = b""
    if backing is not None:
        name = backing.encode()
        at = _BACKING_NAME if cluster > _BACKING_NAME else header.nbytes + 24
        header["backing_file_offset"], header["backing_file_size"] = at, len(name)
        image[at : at + len(name)] = name
        extensions = q.EXTENSION_BACKING_FORMAT.to_bytes(4, "big") + (3).to_bytes(4, "big") + b"raw".ljust(8, b"\0")
    image[: header.nbytes + len(extensions)] = header.tobytes() + extensions
    for block in range(blocks):
        at = (table + 1 + block) * cluster
        image[table * cluster + 8 * block : table * cluster + 8 * block + 8] = at.to_bytes(8, "big")
        counts = np.zeros(per_block, ">u2")
        counts[: max(0, min(per_block, used - block * per_block))] = 1
        image[at : at + cluster] = counts.tobytes()
    return bytes(image)
