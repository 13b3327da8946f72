"""Tables and what they hang from: which clusters are tables, and which of these are L1 tables.

An L1 table and an L2 table look alike; what they point to does not: an L1 entry points to tables, an L2 entry to
data. Source: QEMU's docs/interop/qcow2.txt, section "Cluster mapping".
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from powercut.disk import Disk
from powercut.formats.qcow2 import layout as q
from powercut.formats.qcow2.entries import I64, U64, Bools
from powercut.formats.qcow2.forensics.geometry import Geometry
from powercut.formats.qcow2.forensics.scan import SECTOR, Scan, Sectors, reach

_BATCH = 1 << 21  # words that are looked at together
_SHARE = 0.8  # of an L1 table's entries, those that must point to tables
_READ = 1 << 16  # clusters that are read in search of L1 tables
_LONG = 64  # clusters
_DENSE = 16  # extended L2 entries of compressed clusters, that are told by their lying at every other word
_EMPTY = 64  # clusters of zeros that may be tables of nothing


@dataclass(frozen=True, slots=True)
class Tables:
    """Clusters that consist of entries and zeros, and hold some entry; ascending cluster numbers."""

    standard: I64
    extended: I64  # with extended L2 entries


def whole_tables(disk: Disk, scan: Scan, geometry: Geometry) -> Tables:
    sectors = Sectors(disk)
    return Tables(_whole(sectors, scan.tables, geometry, 1), _whole(sectors, scan.extended, geometry, 2))


def _whole(sectors: Sectors, alike: I64, geometry: Geometry, per_entry: int) -> I64:
    """Clusters all of whose used sectors are `alike`, and nine in ten of whose entries are aligned."""
    per = geometry.cluster // SECTOR
    clusters, counts = np.unique(alike // per, return_counts=True)
    good = np.zeros(len(clusters), dtype=np.bool_)
    step = max(1, _BATCH // (per * 64))
    for at in range(0, len(clusters), step):
        part = slice(at, at + step)
        words = sectors.clusters(clusters[part], geometry.cluster_bits)
        used = np.bitwise_or.reduce(words.reshape(-1, 64), axis=1).reshape(len(words), per) != 0
        entry = words[:, ::per_entry]
        skew = (entry & np.uint64((geometry.cluster - 1) & q.OFFSET_MASK) != 0) & (entry & q.COMPRESSED == 0)
        aligned = skew.sum(axis=1) <= 0.1 * (entry != 0).sum(axis=1)
        good[part] = (used.sum(axis=1) == counts[part]) & aligned
    return clusters[good]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A cluster that may be the first of an L1 table."""

    cluster: int
    entries: U64  # as far as they go, without the zeros behind
    good: int  # entries that point to tables

    @property
    def share(self) -> float:
        return self.good / max(1, int(np.count_nonzero(self.entries & q.OFFSET_MASK)))


def l1_candidates(disk: Disk, scan: Scan, geometry: Geometry, tables: Tables, not_these: set[int]) -> list[Candidate]:
    """Clusters in use that point to tables, the best first. `not_these` are clusters known to be something else."""
    sectors, bits, per = Sectors(disk), geometry.cluster_bits, geometry.cluster // SECTOR
    starts = np.unique(scan.tables // per)
    starts = starts[geometry.in_use(starts)]
    starts = starts[~np.isin(starts, np.array(sorted(not_these), dtype=np.int64))]
    out: list[Candidate] = []
    until = read = 0
    for at in range(0, len(starts), 1 << 15):
        part = starts[at : at + (1 << 15)]
        words = sectors.words(part * per)
        first = words[np.arange(len(part)), (words & q.OFFSET_MASK != 0).argmax(axis=1)] & q.OFFSET_MASK
        aligned = (first != 0) & (first & np.uint64(geometry.cluster - 1) == 0)
        target = (first >> bits).view(np.int64)
        near = aligned & (_among(tables.standard, target) | _among(tables.extended, target))
        empty = np.flatnonzero(aligned & ~near & geometry.in_use(target))[:_EMPTY]
        near[empty] = np.array([_zeros(disk, int(first[i]), geometry.cluster) for i in empty], dtype=np.bool_)
        for cluster in part[near].tolist():
            if cluster < until or read > _READ:
                continue
            candidate = _candidate(disk, geometry, tables, cluster, not_these)
            read += 1
            if candidate is not None:
                out.append(candidate)
                length = len(candidate.entries) * 8 >> bits
                read += length
                until = cluster + length if length > _LONG else until  # hardly another begins within a long one
    return sorted(out, key=lambda c: (c.share, c.good), reverse=True)


def _candidate(disk: Disk, geometry: Geometry, tables: Tables, cluster: int, not_these: set[int]) -> Candidate | None:
    """None if the entries of the first cluster alone show that it is none."""
    words = disk.read(cluster << geometry.cluster_bits, geometry.cluster).view(q.BE64).astype(np.uint64)
    if _judged(disk, geometry, tables, cluster, words[: _plausible_to(disk, geometry, words)]).share < _SHARE:
        return None
    entries = read_l1(disk, geometry, tables, cluster, not_these)
    candidate = _judged(disk, geometry, tables, cluster, entries)
    return candidate if candidate.share >= _SHARE and candidate.good else None


def _judged(disk: Disk, geometry: Geometry, tables: Tables, cluster: int, entries: U64) -> Candidate:
    target = ((entries & q.OFFSET_MASK) >> geometry.cluster_bits).view(np.int64)
    target = target[target != 0]
    known = tables.extended if any_extended(disk, [entries], tables, geometry)[0] else tables.standard
    there = _among(known, target)
    good = int(there.sum())
    empty = sum(_zeros(disk, int(t) << geometry.cluster_bits, geometry.cluster) for t in target[~there][:_EMPTY])
    return Candidate(cluster, entries, good + empty if good else 0)


def _among(ascending: I64, values: I64) -> Bools:
    """Which of `values` are in `ascending`."""
    if not len(ascending):
        return np.zeros(values.shape, dtype=np.bool_)
    at = np.minimum(np.searchsorted(ascending, values), len(ascending) - 1)
    return np.asarray(ascending[at] == values, dtype=np.bool_)


def _plausible_to(disk: Disk, geometry: Geometry, words: U64) -> int:
    """How many of the words, from the first on, may be L1 entries."""
    good = (words & q.L1_RESERVED == 0) & (words & q.OFFSET_MASK < reach(disk.size))
    good &= words & np.uint64((geometry.cluster - 1) & q.OFFSET_MASK) == 0
    return len(words) if good.all() else int(good.argmin())


def any_extended(disk: Disk, l1_tables: list[U64], tables: Tables, geometry: Geometry) -> tuple[bool, bool]:
    """Whether the tables that these L1 tables point to have extended L2 entries, and whether that is sure. Where they
    may have either kind, they are extended if every other word is zero, in many entries without a gap."""
    if geometry.cluster // q.SUBCLUSTERS < SECTOR:
        return False, True
    every = np.concatenate([np.zeros(0, dtype=np.uint64), *l1_tables])
    target = ((every & q.OFFSET_MASK) >> geometry.cluster_bits).view(np.int64)
    standard, extended = (_among(kind, target) for kind in (tables.standard, tables.extended))
    if np.count_nonzero(standard) != np.count_nonzero(extended):
        return bool(np.count_nonzero(extended) > np.count_nonzero(standard)), True
    words = Sectors(disk).clusters(np.unique(target[extended])[:_EMPTY], geometry.cluster_bits)
    if (words[:, 1::2] & q.OFFSET_MASK).any():
        return False, True
    used = np.flatnonzero(words[:, ::2].any(axis=0))
    dense = len(used) >= _DENSE and int(used[-1] - used[0]) < 1.1 * len(used)
    return not words[:, 1::2].any() and dense, not words.any()


def read_l1(disk: Disk, geometry: Geometry, tables: Tables, cluster: int, not_these: set[int]) -> U64:
    """The entries of the L1 table that begins at `cluster`, as far as it seems to go, without the zeros behind."""
    parts: list[U64] = []
    number = cluster
    while len(parts) * geometry.cluster < q.MAX_L1_BYTES:
        words = disk.read(number << geometry.cluster_bits, geometry.cluster).view(q.BE64).astype(np.uint64)
        good = _plausible_to(disk, geometry, words)
        parts.append(words[:good])
        number += 1
        more = geometry.in_use(np.array([number]))[0] and number not in not_these and good == len(words)
        if not more or number << geometry.cluster_bits >= disk.size or not may_belong(disk, geometry, tables, number):
            break
    entries = np.concatenate(parts)
    used = np.flatnonzero(entries)
    return entries[: int(used[-1]) + 1 if len(used) else 0]


def may_belong(disk: Disk, geometry: Geometry, tables: Tables, cluster: int) -> bool:
    """Whether the cluster may be one more of an L1 table: nothing but zeros, or pointers to tables, empty ones too."""
    words = disk.read(cluster << geometry.cluster_bits, geometry.cluster).view(q.BE64).astype(np.uint64)
    if _plausible_to(disk, geometry, words) < len(words):
        return False
    target = ((words[words != 0] & q.OFFSET_MASK) >> geometry.cluster_bits).view(np.int64)
    there = _among(tables.standard, target) | _among(tables.extended, target)
    others = target[~there & (target != 0)]
    others = others[geometry.in_use(others)][:_EMPTY]
    empty = sum(_zeros(disk, int(t) << geometry.cluster_bits, geometry.cluster) for t in others)
    return int(there.sum()) + empty >= _SHARE * len(target)


def _zeros(disk: Disk, offset: int, length: int) -> bool:
    return not disk.read(offset, length).any()
