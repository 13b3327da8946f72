"""An image taken apart: by its header where that can be believed, else by the structures that explain most of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from powercut.disk import Disk
from powercut.errors import InputError
from powercut.formats.qcow2 import layout as q
from powercut.formats.qcow2.check import check
from powercut.formats.qcow2.entries import compressed_extent
from powercut.formats.qcow2.forensics import geometry, headers
from powercut.formats.qcow2.forensics.anatomy import Anatomy, begun_earlier, by_header, by_structure
from powercut.formats.qcow2.forensics.layers import Layers, Refs, all_references, clean, of
from powercut.formats.qcow2.forensics.notes import recovered
from powercut.formats.qcow2.forensics.roots import Candidate, Tables, may_belong
from powercut.formats.qcow2.forensics.scan import scan
from powercut.formats.qcow2.header import read_header

# Problems of what hangs from the header: with these, the header itself is in doubt.
_SPINE = {"l1-reserved", "l1-unaligned", "overlapping-tables", "refcount-table", "snapshot-l1", "snapshot-table"}


_ZSTD = b"\x28\xb5\x2f\xfd"
_UNCOUNTED = 2  # without refcounts, references weigh so many halves less


def dissect(path: str, disk: Disk, progress: Callable[[int, int], None] = lambda done, of: None) -> Anatomy | None:
    """Take the image apart. None if nothing of a qcow2 image is left that could be recognised. Raises InputError if the
    file has more clusters than can be counted."""
    header = read_header(disk).header
    if header is not None and disk.size >> header.cluster_bits >= geometry.MOST_CLUSTERS:
        raise InputError(f"{path}: {disk.size >> header.cluster_bits:,} clusters are more than can be counted")
    if header is not None:
        result = check(disk, trust_dirty=True)
        if not result.aborted and not any(problem.kind in _SPINE for problem in result.problems):
            return by_header(disk, header, True, [])
    tried = [] if header is None else [by_header(disk, header, True, [])]
    if header is None:
        note = recovered("header", "all of it but its first 8 bytes is there")
        tried = [
            by_header(disk, left, False, [note])
            for left in headers.without_magic(disk)
            if disk.size >> left.cluster_bits < geometry.MOST_CLUSTERS
        ]
    found = scan(path, disk.size, progress)
    tried += [anatomy for g in geometry.find(disk, found) for anatomy in by_structure(disk, found, g)]
    best = max(tried, key=_explained) if len(tried) > 1 else next(iter(tried), None)
    if best is not None and best.found is not None and (earlier := _in_front(best, *best.found)):
        best = begun_earlier(best, earlier)
    if best is not None and not best.intact and _first_compressed(best).startswith(_ZSTD):
        zstd = best.header.incompatible | q.INCOMPATIBLE_COMPRESSION
        best.header = replace(best.header, version=3, incompatible=zstd, compression_type=q.COMPRESSION_ZSTD)
        best.notes.append(recovered("compression", "zstd: the first compressed cluster begins with its magic number"))
    return best


def _first_compressed(anatomy: Anatomy) -> bytes:
    """The first bytes of some compressed cluster."""
    layers = of(anatomy)
    clean(layers, anatomy, [])
    for batch in Layers(anatomy.disk, anatomy.header, layers, anatomy.disk.size).batches():
        entry = batch.words[:, :: anatomy.header.l2_entry_size // 8]
        compressed = entry[entry & q.COMPRESSED != 0]
        if len(compressed):
            offset, _ = compressed_extent(compressed[:1], anatomy.header)
            return anatomy.disk.read(int(offset[0]), len(_ZSTD)).tobytes()
    return b""


def _references(anatomy: Anatomy) -> Refs:
    """References by cluster, those to the tables that hang from the header among them."""
    total = -(-anatomy.disk.size >> anatomy.header.cluster_bits)
    layers = of(anatomy)
    clean(layers, anatomy, [])
    refs = all_references(Layers(anatomy.disk, anatomy.header, layers, anatomy.disk.size), total)
    refs[[cluster for cluster in (0, *anatomy.metadata()) if 0 <= cluster < total]] += 1
    return refs


def _in_front(anatomy: Anatomy, tables: Tables, active: Candidate) -> int:
    """How many clusters in front of the L1 table are in use and belong to nothing else, and may be its beginning: an L1
    table of several clusters has zeros there, where the start of the disk was never written."""
    if anatomy.geometry.counts is None:
        return 0

    def may_be(cluster: int) -> bool:
        used = cluster > 0 and anatomy.geometry.count(np.array([cluster]))[0] == 1
        return bool(used) and may_belong(anatomy.disk, anatomy.geometry, tables, cluster)

    if not may_be(active.cluster - 1):
        return 0
    refs, found = _references(anatomy), 0
    most = q.MAX_L1_BYTES >> anatomy.header.cluster_bits
    while found < most and not refs[active.cluster - 1 - found] and may_be(active.cluster - 1 - found):
        found += 1
    return found


def _explained(anatomy: Anatomy) -> int:
    """How many bytes of the file fit together: in use by the refcounts, and referred to that often. What contradicts
    the refcounts counts against it."""
    refs = _references(anatomy)
    counts = anatomy.geometry.counts
    if counts is None:
        return int(np.count_nonzero(refs)) << anatomy.header.cluster_bits >> _UNCOUNTED
    beyond = int(np.count_nonzero(refs[len(counts) :]))
    refs = refs[: len(counts)]
    fitting = np.count_nonzero((refs > 0) & (refs <= counts)) - np.count_nonzero(refs > counts)
    return (int(fitting) - beyond) << anatomy.header.cluster_bits
