"""The snapshot table: where each snapshot's L1 table is, and how long the table itself is.

Sources: QEMU's docs/interop/qcow2.txt, section "Snapshots"; block/qcow2-snapshot.c (qcow2_do_read_snapshots,
qcow2_check_read_snapshot_table) for what is refused. IDs and names are not read: nothing depends on them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from powercut.disk import Disk
from powercut.formats.qcow2 import layout as q
from powercut.formats.qcow2.header import Header


@dataclass(frozen=True, slots=True)
class Snapshot:
    where: int  # byte offset of the entry
    l1_table_offset: int
    l1_size: int
    vm_state_size: int
    disk_size: int
    extra_size: int


@dataclass(frozen=True, slots=True)
class SnapshotTable:
    snapshots: tuple[Snapshot, ...] = ()
    size: int = 0
    broken: str = ""  # why QEMU refuses to open the image


def read_snapshots(disk: Disk, header: Header) -> SnapshotTable:
    offset, count = header.snapshots_offset, header.nb_snapshots
    if count > q.MAX_SNAPSHOTS:
        return SnapshotTable(broken=f"{count} snapshots: too many")
    end = offset + count * q.SNAPSHOT.itemsize
    if offset % header.cluster_size or end > q.MAX_OFFSET or (count and end > q.MAX_LENGTH):
        return SnapshotTable(broken=f"snapshot table at {offset:#x}: invalid offset")
    snapshots = []
    for number in range(count):
        offset = -(-offset // 8) * 8
        row = np.frombuffer(disk.read(offset, q.SNAPSHOT.itemsize).tobytes(), q.SNAPSHOT)[0]
        extra_size = int(row["extra_size"])
        if extra_size > q.MAX_SNAPSHOT_EXTRA:
            return SnapshotTable(broken=f"snapshot table entry {number} has {extra_size} bytes of extra data")
        vm_state, disk_size = int(row["vm_state_size"]), header.size
        if extra_size >= 8:
            known = disk.read(offset + q.SNAPSHOT.itemsize, min(extra_size, q.SNAPSHOT_EXTRA.itemsize)).tobytes()
            vm_state = int.from_bytes(known[:8], "big")
            disk_size = int.from_bytes(known[8:16], "big") if extra_size >= 16 else disk_size
        l1_offset, l1_size = int(row["l1_table_offset"]), int(row["l1_size"])
        snapshots.append(Snapshot(offset, l1_offset, l1_size, vm_state, disk_size, extra_size))
        offset += q.SNAPSHOT.itemsize + extra_size + int(row["id_size"]) + int(row["name_size"])
        if offset - header.snapshots_offset > q.MAX_SNAPSHOT_TABLE_BYTES:
            return SnapshotTable(broken="the snapshot table is too long")
    return SnapshotTable(tuple(snapshots), offset - header.snapshots_offset if count else 0)
