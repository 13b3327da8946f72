"""Refcounts and copied flags rebuilt from what refers to what: what a dirty image needs when it is opened.

Source: QEMU's docs/interop/qcow2.txt, "incompatible_features", bit 0.
"""

from __future__ import annotations

from collections import Counter

from powercut.formats.qcow2.driver import host, snapshots
from powercut.formats.qcow2.driver.core import unpack
from powercut.formats.qcow2.driver.image import Image
from powercut.formats.qcow2.driver.mapping import offset_of


async def rebuild(image: Image) -> None:
    """Set every refcount to the number of references, then every copied flag, then take the dirty bit away."""
    references = await _references(image)
    refcounts = image.refcounts
    counted = [number for number, block in enumerate(refcounts.table) if block]
    behind = 1 + max(references)
    for block in counted:
        for cluster in range(block * refcounts.per_block, (block + 1) * refcounts.per_block):
            await _set(image, cluster, references[cluster])
    refcounts.rewind(behind)  # blocks that are made now must not lie on what has no refcount yet
    for cluster in sorted(references):
        if cluster // refcounts.per_block not in counted:
            await _set(image, cluster, references[cluster])
    await snapshots.count(image, image.l1, 0, flags=True)
    await image.flush()
    await refcounts.write()
    await image.set_dirty(False)


async def _set(image: Image, cluster: int, wanted: int) -> None:
    there = await image.refcounts.get(cluster)
    if there != wanted:
        await image.refcounts.add(cluster << image.bits, 1, wanted - there)


async def _references(image: Image) -> Counter[int]:
    """How many references there are to each cluster."""
    found: Counter[int] = Counter()

    def refer(offset: int, length: int) -> None:
        found.update(range(offset >> image.bits, -(-(offset + length) >> image.bits)))

    refer(0, image.cluster)
    refer(image.refcounts.offset, len(image.refcounts.table) * 8)
    for block in image.refcounts.table:
        if block:
            refer(block, image.cluster)
    table = await snapshots.table(image)
    refer(table.offset, table.length)
    l1_tables = {image.l1_offset: image.l1}
    for snapshot in table.snapshots:
        l1_tables[snapshot.l1_offset] = unpack(await host.read(snapshot.l1_offset, snapshot.l1_size * 8))
    for offset, l1 in l1_tables.items():
        refer(offset, len(l1) * 8)
        for l1_entry in l1:
            if l1_entry:
                refer(offset_of(l1_entry), image.cluster)
                for _, entry in await image.entries(offset_of(l1_entry)):
                    refer(*image.extent(entry))
    return found
