"""Internal snapshots: create, apply, delete.

Sources: QEMU's docs/interop/qcow2.txt, "Snapshots"; block/qcow2-snapshot.c, and qcow2_update_snapshot_refcount in
block/qcow2-refcount.c. A snapshot is a copy of the L1 table; every cluster below it is counted once more, and loses
its copied flag. Nothing of the guest's may be in flight.
"""

from __future__ import annotations

import struct

from powercut.errors import InputError
from powercut.formats.qcow2 import layout as q
from powercut.formats.qcow2.driver import host
from powercut.formats.qcow2.driver.core import Snapshot, SnapshotTable, pack, unpack
from powercut.formats.qcow2.driver.image import Image
from powercut.formats.qcow2.driver.mapping import offset_of

_COUNT_FIELD = 60  # of the header: nb_snapshots, then snapshots_offset
_ENTRY = struct.Struct(">QIHHIIQII")
assert _ENTRY.size == q.SNAPSHOT.itemsize


async def create(image: Image, name: str, vm_state_size: int = 0) -> None:
    """Take a snapshot of the guest's disk, and of the state of a machine of so many bytes."""
    async with image.lock, image.rebuilding():
        known = await table(image)
        number = 1 + max((int(snapshot.id) for snapshot in known.snapshots if snapshot.id.isdigit()), default=0)
        await count(image, image.l1, 1, flags=True)
        length = max(1, len(image.l1)) * 8
        offset = await image.refcounts.allocate(length)
        await host.write(offset, pack([entry & ~q.COPIED for entry in image.l1] + [0] * (-len(image.l1) % 64)))
        snapshot = Snapshot(offset, len(image.l1), str(number), name, vm_state_size, image.size)
        await _write(image, known, [*known.snapshots, snapshot])
    if not image.practice.through and vm_state_size:
        await image.discard_vmstate(vm_state_size)


async def apply(image: Image, name: str) -> None:
    """Make the guest's disk what it was. Raises InputError."""
    async with image.lock, image.rebuilding():
        snapshot = _find((await table(image)).snapshots, name)
        if snapshot.disk_size != image.size or snapshot.l1_size > len(image.l1):
            raise InputError(f"snapshot {name!r} is of a disk of {snapshot.disk_size} bytes, this one has {image.size}")
        old = image.l1
        then = unpack(await host.read(snapshot.l1_offset, snapshot.l1_size * 8))
        await count(image, then, 1)
        await image.flush()
        await image.refcounts.write()
        await image.barrier()
        image.l1 = [entry & ~q.COPIED for entry in then] + [0] * (len(old) - len(then))
        await image.write_whole_l1()
        await image.barrier()
        await count(image, old, -1)
        await count(image, image.l1, 0, flags=True)


async def delete(image: Image, name: str) -> None:
    """Forget a snapshot. Raises InputError."""
    async with image.lock, image.rebuilding():
        known = await table(image)
        snapshot = _find(known.snapshots, name)
        await _write(image, known, [other for other in known.snapshots if other is not snapshot])
        l1 = unpack(await host.read(snapshot.l1_offset, snapshot.l1_size * 8))
        await count(image, l1, -1, to_zero=image.practice.has("snapshot-delete-frees-shared"))
        await image.refcounts.free(snapshot.l1_offset, max(1, snapshot.l1_size) * 8)
        await count(image, image.l1, 0, flags=True)


async def count(image: Image, l1: list[int], addend: int, *, flags: bool = False, to_zero: bool = False) -> None:
    """Add `addend` to the refcounts of all that `l1` leads to. With `flags`, `l1` is the active table, and copied flags
    are set right. `to_zero`: the clusters are freed whatever refers to them."""
    refcounts, changed = image.refcounts, False
    for l1_index, l1_entry in enumerate(l1):
        if not l1_entry:
            continue
        l2_offset = offset_of(l1_entry)
        for index, entry in await image.entries(l2_offset):
            offset, length = image.extent(entry)
            if not length:
                continue
            if addend:
                times = await refcounts.get(offset >> image.bits) if to_zero else 1
                await refcounts.add(offset, length, addend * times)
            if flags and not entry & q.COMPRESSED:
                flagged = await _flagged(image, entry)
                if flagged != entry:
                    await image.set_entries(await image.tables.load(l2_offset), index, [flagged])
        if addend:
            await refcounts.add(l2_offset, image.cluster, addend)
        if flags:
            flagged = await _flagged(image, l1_entry)
            changed |= flagged != l1_entry
            l1[l1_index] = flagged
    if changed:
        await image.write_whole_l1()


async def _flagged(image: Image, entry: int) -> int:
    """The entry with the copied flag that its refcount gives it."""
    alone = await image.refcounts.get(offset_of(entry) >> image.bits) == 1
    return entry & ~q.COPIED | (q.COPIED if alone else 0)


def _find(snapshots: list[Snapshot], name: str) -> Snapshot:
    for snapshot in snapshots:
        if name in (snapshot.name, snapshot.id):
            return snapshot
    raise InputError(f"there is no snapshot {name!r}")


async def table(image: Image) -> SnapshotTable:
    """The snapshot table: as it was on disk when it was first asked for, and as it was changed since."""
    if image.snapshot_table is None:
        image.snapshot_table = await _read(image)
    return image.snapshot_table


async def _read(image: Image) -> SnapshotTable:
    head = await host.read(_COUNT_FIELD, 12)
    number, start = int.from_bytes(head[:4], "big"), int.from_bytes(head[4:], "big")
    offset, snapshots = start, []
    for _ in range(number):
        offset += -offset % 8
        raw = await host.read(offset, _ENTRY.size)
        l1_offset, l1_size, id_size, name_size, _, _, _, vm_state_size, extra_size = _ENTRY.unpack(raw)
        extra = await host.read(offset + _ENTRY.size, extra_size)
        words = await host.read(offset + _ENTRY.size + extra_size, id_size + name_size)
        if extra_size >= 8:
            vm_state_size = int.from_bytes(extra[:8], "big")
        disk_size = int.from_bytes(extra[8:16], "big") if extra_size >= 16 else image.size
        identity, name = words[:id_size].decode(errors="replace"), words[id_size:].decode(errors="replace")
        snapshots.append(Snapshot(l1_offset, l1_size, identity, name, vm_state_size, disk_size))
        offset += _ENTRY.size + extra_size + id_size + name_size
    return SnapshotTable(start, offset - start, snapshots)


async def _write(image: Image, old: SnapshotTable, snapshots: list[Snapshot]) -> None:
    """Write a new table, point to it, and give up the old one."""
    new = bytearray()
    for snapshot in snapshots:
        new += bytes(-len(new) % 8)
        extra = b""
        if image.header.version >= 3:
            extra = snapshot.vm_state_size.to_bytes(8, "big") + snapshot.disk_size.to_bytes(8, "big")
        identity, name = snapshot.id.encode(), snapshot.name.encode()
        small = min(snapshot.vm_state_size, 0xFFFF_FFFF)
        new += _ENTRY.pack(snapshot.l1_offset, snapshot.l1_size, len(identity), len(name), 0, 0, 0, small, len(extra))
        new += extra + identity + name
    offset = 0
    if new:
        offset = await image.refcounts.allocate(len(new))
        await host.write(offset, bytes(new) + bytes(-len(new) % q.SECTOR))
    await image.flush()
    await image.refcounts.write()
    await image.patch_header(_COUNT_FIELD, len(snapshots).to_bytes(4, "big") + offset.to_bytes(8, "big"))
    image.snapshot_table = SnapshotTable(offset, len(new), snapshots)
    if old.length:
        await image.refcounts.free(old.offset, old.length)
