"""A new image out of the parts of a damaged one.

The file is copied as it is, holes included. Then everything that hangs from the header is written anew behind its
end: L1 tables, the snapshot table, the refcount table and its blocks, counted afresh from what the L1 and L2 tables
refer to. L2 tables stay where they are, with their copied flags set right, unless they lie on something else; then
they move. The header comes last. What the parts do not tell is not made up: a damaged entry is emptied, and told.

Source: QEMU's docs/interop/qcow2.txt, section "Host cluster management" and "Cluster mapping".
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from powercut.disk import ImageDisk
from powercut.formats.qcow2 import layout as q
from powercut.formats.qcow2.forensics import headers
from powercut.formats.qcow2.forensics.anatomy import Anatomy
from powercut.formats.qcow2.forensics.first import First
from powercut.formats.qcow2.forensics.layers import (
    Layer,
    Layers,
    all_references,
    clean,
    count_references,
    of,
    set_copied,
)
from powercut.formats.qcow2.forensics.losses import losses
from powercut.formats.qcow2.forensics.notes import Note, guessed, guest_range, lost, recovered
from powercut.formats.qcow2.forensics.scan import pieces


@dataclass
class _Growing:
    """The new file: clusters are added behind its end."""

    fd: int
    bits: int
    clusters: int

    def add(self, data: bytes) -> int:
        """Byte offset of new clusters that hold `data`."""
        offset = self.clusters << self.bits
        self.clusters += max(1, -(-len(data) >> self.bits))
        self.write(offset, data)
        return offset

    def write(self, offset: int, data: bytes) -> None:
        view = memoryview(data)
        while view:
            done = os.pwrite(self.fd, view, offset)
            view, offset = view[done:], offset + done

    def fill_up(self) -> None:
        os.ftruncate(self.fd, self.clusters << self.bits)


def rebuild(
    anatomy: Anatomy, first: First, source: str, out: str, progress: Callable[[int, int], None] = lambda done, of: None
) -> list[Note]:
    """Write the new image to the empty file `out`. What was done and what is lost."""
    header, disk = anatomy.header, anatomy.disk
    fd = os.open(out, os.O_RDWR | os.O_CLOEXEC)
    try:
        new = _Growing(fd, header.cluster_bits, -(-disk.size >> header.cluster_bits))
        _copy(source, disk.size, new, progress)
        layers = of(anatomy)
        notes = clean(layers, anatomy, first.homes)
        notes += _settle_first(anatomy, first, layers, new)
        notes += _write_anew(anatomy, layers, new, out)
        os.fsync(fd)
    finally:
        os.close(fd)
    return notes


def _copy(source: str, size: int, new: _Growing, progress: Callable[[int, int], None]) -> None:
    for offset, piece in pieces(source, size):
        progress(offset, size)
        if piece.strip(b"\0"):
            new.write(offset, piece)
    new.fill_up()


def _settle_first(anatomy: Anatomy, first: First, layers: list[Layer], new: _Growing) -> list[Note]:
    """Move a table that lies where the header belongs, and point to its new place."""
    if first.table is None:
        return first.notes
    offset = new.add(first.table.astype(q.BE64).tobytes())
    for number, index in first.homes:
        layers[number].l1[index] = offset
    where = f"moved from offset 0 to {offset:#x}"
    if not first.homes:
        return [lost("L2 table", f"{where}: {first.entries} clusters whose place on the disk nothing tells")]
    _, index = first.homes[0]
    start = index * anatomy.coverage
    names = ", ".join(layers[number].name for number, _ in first.homes)
    told = recovered if first.sure else guessed
    text = f"{where}; {guest_range(start, start + anatomy.coverage)} of {names}"
    return [told("L2 table", text), *first.notes]


def _write_anew(anatomy: Anatomy, layers: list[Layer], new: _Growing, out: str) -> list[Note]:
    header, bits = anatomy.header, anatomy.header.cluster_bits
    new.fill_up()
    working = Layers(ImageDisk(out), header, layers, anatomy.disk.size)
    notes = _mend_losses(anatomy, working, new)
    refs = count_references(working, new.clusters, tell=True)
    notes += _unclaimed(anatomy, working, refs)
    notes += _part_tables_from_data(working, refs, new)
    new.fill_up()
    working.disk = ImageDisk(out)
    refs = np.concatenate([refs, np.zeros(new.clusters - len(refs), dtype=np.uint32)])
    places, weight, _ = working.places()
    refs[places >> bits] += weight.astype(np.uint32)
    for batch in working.batches():
        set_copied(batch, header, refs)
        for row in np.flatnonzero(batch.changed).tolist():
            new.write(int(batch.offsets[row]), batch.words[row].astype(q.BE64).tobytes())
    for layer in layers:
        host = (layer.l1 >> bits).view(np.int64)
        layer.l1[(host != 0) & (refs[host] == 1)] |= np.uint64(q.COPIED)
    used = new.clusters
    offsets = [new.add(layer.l1.astype(q.BE64).tobytes()) for layer in layers]
    table = b"".join(
        one.packed(offset, len(layer.l1), header.size)
        for one, offset, layer in zip(anatomy.saved, offsets[1:], layers[1:], strict=True)
    )
    snapshots_offset = new.add(table) if table else 0
    refs = np.concatenate([refs, np.ones(new.clusters - used, dtype=np.uint32)])
    refs[0] = 1
    if header.crypto_header is not None:
        offset, length = header.crypto_header
        refs[offset >> bits : -(-(offset + length) >> bits)] += np.uint32(1)
    order, table_offset, table_clusters = _write_refcounts(refs, header.refcount_order, new)
    rescued = replace(
        header,
        version=3 if order != 4 else header.version,
        l1_size=len(layers[0].l1),
        l1_table_offset=offsets[0],
        refcount_table_offset=table_offset,
        refcount_table_clusters=table_clusters,
        nb_snapshots=len(anatomy.saved),
        snapshots_offset=snapshots_offset,
        refcount_order=order,
        incompatible=header.incompatible & ~(q.INCOMPATIBLE_DIRTY | q.INCOMPATIBLE_CORRUPT),
        autoclear=0,
        bitmaps=None,
    )
    new.write(0, headers.pack(rescued).ljust(header.cluster_size, b"\0"))
    new.fill_up()
    return working.notes + notes


def _mend_losses(anatomy: Anatomy, working: Layers, new: _Growing) -> list[Note]:
    """Put back what the refcounts tell of entries that are gone."""
    found = losses(anatomy, working, all_references(working, new.clusters))
    for loss in found:
        if loss.entry is not None:
            number, index, offset = loss.entry
            working.layers[number].l1[index] = offset
        if loss.table is not None:
            new.write(loss.table[0], loss.table[1].astype(q.BE64).tobytes())
    return [guessed("lost entry", f"{o.text}: put back") if o.mended else lost("lost entry", o.text) for o in found]


def _unclaimed(anatomy: Anatomy, working: Layers, refs: NDArray[np.uint32]) -> list[Note]:
    """Clusters that the old refcounts call used, and that nothing claims."""
    counts = anatomy.geometry.counts
    if counts is None:
        return []
    claimed = refs[: len(counts)] > 0
    places = working.places()[0] >> anatomy.header.cluster_bits
    known = [0, *anatomy.metadata(), *places.tolist()]
    claimed[[cluster for cluster in known if 0 <= cluster < len(claimed)]] = True
    free = np.flatnonzero((counts > 0) & ~claimed)
    size = len(free) << anatomy.header.cluster_bits
    text = f"{len(free):,} clusters ({size:,} bytes) have a refcount, and no table maps them: free in the new image"
    return [guessed("unclaimed clusters", text)] if len(free) else []


def _part_tables_from_data(working: Layers, refs: NDArray[np.uint32], new: _Growing) -> list[Note]:
    """An L2 table in a cluster that holds a guest's data as well, or holds compressed data, moves."""
    notes = []
    places, _, _ = working.places()
    for offset in places[refs[places >> new.bits] > 0].tolist():
        copy = new.add(working.disk.read(offset, 1 << new.bits).tobytes())
        for layer in working.layers:
            layer.l1[layer.l1 & q.OFFSET_MASK == offset] = copy
        notes.append(guessed("L2 table", f"moved from {offset:#x}, which is mapped as data too, to {copy:#x}"))
    return notes


def _write_refcounts(refs: NDArray[np.uint32], order: int, new: _Growing) -> tuple[int, int, int]:
    """The refcount table and its blocks behind everything else: width (as a power of two), place, and clusters."""
    while order < q.MAX_REFCOUNT_ORDER and int(refs.max(initial=1)) >= 1 << (1 << order):
        order += 1
    per_block = (8 << new.bits) >> order
    blocks = tables = 0
    while True:
        wanted = -(-(new.clusters + tables + blocks) // per_block)
        if (wanted, -(-wanted * 8 >> new.bits)) == (blocks, tables):
            break
        blocks, tables = wanted, -(-wanted * 8 >> new.bits)
    own = new.clusters
    offsets = (own + tables + np.arange(blocks, dtype=np.uint64)) << np.uint64(new.bits)
    place = new.add(offsets.astype(q.BE64).tobytes().ljust(tables << new.bits, b"\0"))
    refs = np.concatenate([refs, np.ones(tables + blocks, dtype=np.uint32)])
    for number in range(blocks):
        part = refs[number * per_block : (number + 1) * per_block]
        new.add(_encoded(part, order).ljust(1 << new.bits, b"\0"))
    return order, place, tables


def _encoded(counts: NDArray[np.uint32], order: int) -> bytes:
    if order >= 3:
        return counts.astype(np.dtype(f">u{1 << order >> 3}")).tobytes()
    bits, per = 1 << order, 8 >> order
    padded = np.zeros(-(-len(counts) // per) * per, dtype=np.uint32)
    padded[: len(counts)] = counts
    shifts = np.arange(0, 8, bits, dtype=np.uint32)  # the least significant bits come first
    joined: NDArray[np.uint8] = (padded.reshape(-1, per) << shifts).sum(axis=1).astype(np.uint8)
    return joined.tobytes()
