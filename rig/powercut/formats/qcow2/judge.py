"""qcow2 under the crash search: which rules a crash state breaks.

What counts as broken, and who says so:

    opens         QEMU would refuse to open the image (block/qcow2.c, qcow2_do_open), or it is marked corrupt.
    structure     what `qemu-img check` counts as a corruption (block/qcow2-refcount.c): a cluster with more
                  references than its refcount, a copied flag that contradicts the refcount, an entry that points
                  nowhere. Leaks are legal after a crash (docs/interop/qcow2.txt: a refcount that is too high only
                  wastes space). While the dirty bit is set, refcounts and copied flags are rebuilt at the next
                  writable open, and are not judged (docs/interop/qcow2.txt, "incompatible_features", bit 0).
    acknowledged  `powercut.oracles.acknowledged`.

The structure is judged over sets of contents (`powercut.formats.qcow2.check`): one run stands for all contents of
all L2 tables and refcount blocks. Whatever that makes suspicious is proven or dismissed by deciding just what the
suspicion rests on and checking again. The guest's sectors are judged as sets too, and only those anew of which
something changed since they were found legal: the L2 entry, the host sectors behind it, or the promise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import repeat

import numpy as np

from powercut.crash.disk import CrashDisk, Deciding
from powercut.crash.explore import Report, Unjudged
from powercut.disk import Disk
from powercut.formats import Recording
from powercut.formats.qcow2 import layout as q
from powercut.formats.qcow2.check import Check, check
from powercut.formats.qcow2.entries import I64, U64, Bools, Kind, host_offset, kind
from powercut.formats.qcow2.header import Header
from powercut.formats.qcow2.roles import roles
from powercut.formats.reader import prove, suspects
from powercut.oracles.acknowledged import unlawful_zeros
from powercut.stamp import SECTOR
from powercut.verdict import Problem, Severity

_NOWHERE, _BACKING = -1, -2  # where a guest sector is read from, if not from the image
_BASE = 1 << 30  # the backing file's number among the disks that a search decides
_DENSE = 1 << 24  # clusters: a byte for each is less work than to search
_FEW = 1 << 12  # clusters: of more it is not remembered one by one that they are legal
_AT_ONCE = 1 << 17  # guest sectors judged at once: bounds the memory for the arrays


class Qcow2:
    """See the module."""

    def __init__(self, recording: Recording) -> None:
        self._recording = recording
        self._legal: tuple[U64, U64 | None] | None = None  # the entries with which guest clusters were found legal
        self._epoch: tuple[int, Header] | None = None
        self._judged: set[tuple[int, int, int]] = set()  # clusters and entries found legal in other states of the epoch

    @staticmethod
    def host_size(size: int) -> int:
        return size + size // 16 // SECTOR * SECTOR + (16 << 20)

    @staticmethod
    def roles(disk: Disk) -> Callable[[int], str]:
        return roles(disk)

    def judge(self, disk: Deciding, report: Report, enough: Callable[[str], bool]) -> None:
        result = check(disk)
        for problem in result.problems:
            if not problem.rests_on:
                report(problem)
        if result.header is None or result.active is None:
            return
        for problem in result.problems:
            if problem.rests_on and not enough("structure"):
                disk.explore(lambda problem=problem: _prove(disk, problem, report))  # type: ignore[misc]
        if result.omitted and not enough("structure"):
            raise Unjudged(f"{result.omitted} suspicions more than are looked at one by one")
        if self._recording.promise is not None:
            self._acknowledged(disk, result, report, enough)

    def _acknowledged(self, disk: Deciding, result: Check, report: Report, enough: Callable[[str], bool]) -> None:
        """Judge every guest sector of which something changed, and remember the entries that were found legal."""
        header, mapping = result.header, result.mapping
        assert header is not None
        if header.data_file:
            raise Unjudged("the guest's data is in an external data file, which was not recorded")
        if header.backing_file and self._recording.backing is None:
            raise Unjudged("the image has a backing file, which is not in the trace")
        sizes = self._recording.promise.sizes if self._recording.promise else []
        if sizes and header.size not in sizes:
            text = f"the disk has {header.size:,} bytes; legal: {' or '.join(f'{size:,}' for size in sizes)}"
            report(Problem("acknowledged", "size", 0, Severity.SILENT, text))
        guest, bitmap = self._changed(header, mapping.entry, mapping.bitmap), mapping.bitmap
        if self._epoch != (self._recording.image.position, header):
            self._epoch, self._judged = (self._recording.image.position, header), set()
        if self._judged:
            known = [entry in self._judged for entry in _each(guest, mapping.entry, bitmap)]
            guest = guest[~np.array(known, dtype=np.bool_)]
        bad = self._suspects(header, guest, mapping.entry[guest], None if bitmap is None else bitmap[guest])
        if not bad and len(guest) <= _FEW:
            self._judged.update(_each(guest, mapping.entry, bitmap))
        if disk.written:  # what a recovery wrote is not in the sets: those sectors are read one by one
            bad.append(self._behind(header, mapping.entry, disk.written))
        others = mapping.others
        bad += self._suspects(header, others.guest, others.entry, others.bitmap)
        found = np.unique(np.concatenate(bad)) if bad else np.zeros(0, dtype=np.int64)

        def locate(sector: int) -> tuple[Disk, int] | None:
            return self._locate(disk, result, sector)

        prove(self._recording, disk, found, locate, report, enough)
        if not len(found):
            self._legal = (mapping.entry, mapping.bitmap)
            self._recording.image.touched.clear()
            if self._recording.backing is not None:
                self._recording.backing.touched.clear()
            assert self._recording.promise is not None
            self._recording.promise.tightened.clear()

    def _behind(self, header: Header, entry: U64, written: list[tuple[int, int]]) -> I64:
        """The guest sectors that are stored in the ranges `written` of host sectors."""
        assert self._recording.promise is not None
        at, host = self._sectors(header, np.flatnonzero(host_offset(entry)), entry[host_offset(entry) != 0], None)
        inside = np.zeros(len(host), dtype=np.bool_)
        for first, last in written:
            inside |= (first <= host) & (host < last)
        return at[inside & (at < min(header.size, self._recording.promise.size) // SECTOR)]

    def _changed(self, header: Header, entry: U64, bitmap: U64 | None) -> I64:
        """The guest clusters that must be judged, given the first content of the mapping."""
        recording = self._recording
        assert recording.promise is not None
        per_cluster = header.cluster_size // SECTOR
        if self._legal is None:
            changed = entry != 0
        else:
            known = min(len(entry), len(self._legal[0]))  # they differ while the disk is resized
            changed = np.ones(len(entry), dtype=np.bool_)
            changed[:known] = entry[:known] != self._legal[0][:known]
            if bitmap is not None and self._legal[1] is not None:
                changed[:known] |= bitmap[:known] != self._legal[1][:known]
        below = recording.backing.touched if recording.backing is not None else []
        for first, last in recording.promise.tightened + below:
            changed[first // per_cluster : -(-last // per_cluster)] = True
        if recording.image.touched:
            ranges = np.array(sorted(recording.image.touched), dtype=np.int64)
            begin, end = ranges[:, 0] // per_cluster, -(-ranges[:, 1] // per_cluster)
            mapped = np.flatnonzero(entry)
            cluster = host_offset(entry[mapped]) >> header.cluster_bits
            changed[mapped] |= _within(cluster, begin, end)
        return np.flatnonzero(changed)

    def _suspects(self, header: Header, guest: I64, entry: U64, bitmap: U64 | None) -> list[I64]:
        """The sectors of these guest clusters that would read as something illegal with these entries."""
        step = max(1, _AT_ONCE * SECTOR // header.cluster_size)
        found = []
        for begin in range(0, len(guest), step):
            part = slice(begin, begin + step)
            bits = None if bitmap is None else bitmap[part]
            at, host = self._sectors(header, guest[part], entry[part], bits)
            inside = at < header.size // SECTOR  # what a smaller size cut off is read by nobody
            found += self._suspects_of(at[inside], host[inside])
        return found

    def _suspects_of(self, at: I64, host: I64) -> list[I64]:
        recording = self._recording
        promise, backing = recording.promise, recording.backing
        assert promise is not None
        inside = at < promise.size // SECTOR
        at, host = at[inside], host[inside]
        zero = host == _NOWHERE
        behind = host == _BACKING
        zero |= behind if backing is None else behind & (at >= backing.sectors)
        found = [unlawful_zeros(promise, at[zero])]
        if backing is not None and (behind & ~zero).any():
            found.append(suspects(recording, backing, at[behind & ~zero], at[behind & ~zero]))
        stored = host >= 0
        found.append(suspects(recording, recording.image, at[stored], host[stored]))
        return [sectors for sectors in found if len(sectors)]

    def _sectors(self, header: Header, guest: I64, entry: U64, bitmap: U64 | None) -> tuple[I64, I64]:
        """Every sector of guest clusters with these entries, and the host sector it is read from."""
        per_cluster = header.cluster_size // SECTOR
        kinds = kind(entry, header)
        if (kinds == Kind.COMPRESSED).any():
            raise Unjudged("the image has compressed clusters, whose content is not judged")
        inner = np.arange(per_cluster)
        at = guest[:, None] * per_cluster + inner
        stored = (host_offset(entry) // SECTOR)[:, None] + inner
        limit = self._recording.image.sectors  # what lies behind the end of the file reads as zeros
        stored[stored >= limit] = _NOWHERE
        if bitmap is None:
            place = {Kind.NORMAL: 0, Kind.UNALLOCATED: _BACKING}
            where = np.full(len(entry), _NOWHERE)
            for what, value in place.items():
                where[kinds == what] = value
            host = np.where((where == 0)[:, None], stored, where[:, None])
        else:
            sub = (inner * 32 // per_cluster).astype(np.uint64)  # 32 subclusters: "Extended L2 Entries"
            allocated = (bitmap[:, None] >> sub) & np.uint64(1) != 0
            zeros = (bitmap[:, None] >> (sub + np.uint64(32))) & np.uint64(1) != 0
            host = np.where(allocated, stored, np.where(zeros, _NOWHERE, _BACKING))
        return at.reshape(-1), host.reshape(-1)

    def _locate(self, disk: Deciding, result: Check, sector: int) -> tuple[Disk, int] | None:
        """Where `sector` is read from, by deciding its L2 entry."""
        header = result.header
        assert header is not None
        guest = np.array([sector * SECTOR >> header.cluster_bits])
        slot = int(result.mapping.slot(guest)[0])
        words = np.zeros(2, dtype=np.uint64)
        if slot >= 0:
            read = disk.read(slot, header.l2_entry_size).view(q.BE64)
            words[: len(read)] = read
        bitmap = words[1:] if header.extended_l2 else None
        at, host = self._sectors(header, guest, words[:1], bitmap)
        place = int(host[at == sector][0])
        backing = self._recording.backing
        if place == _BACKING and backing is not None and sector < backing.sectors:
            return CrashDisk(backing, disk.search, number=_BASE), sector
        return (disk, place) if place >= 0 else None


def _each(guest: I64, entry: U64, bitmap: U64 | None) -> Iterator[tuple[int, int, int]]:
    """Each of these guest clusters with its entry."""
    bits = repeat(0) if bitmap is None else bitmap[guest].tolist()
    return zip(guest.tolist(), entry[guest].tolist(), bits, strict=False)


def _within(cluster: I64, begin: I64, end: I64) -> Bools:
    """Which clusters lie in one of the ranges `begin[i]` to `end[i] - 1`; `begin` ascends."""
    limit = int(end.max())
    if limit < _DENSE:
        inside = np.zeros(limit + 1, dtype=np.bool_)
        for first, last in zip(begin.tolist(), end.tolist(), strict=True):
            inside[first:last] = True
        return inside[np.minimum(cluster, limit)]
    # A cluster is in one if, of all ranges that begin at or before it, one ends behind it.
    before = np.searchsorted(begin, cluster, side="right") - 1
    return np.asarray((before >= 0) & (cluster < np.maximum.accumulate(end)[before]))


def _prove(disk: Deciding, suspicion: Problem, report: Report) -> None:
    """Decide what `suspicion` rests on, and check again, until it is a fact or gone."""
    now: Problem | None = suspicion
    while now is not None and now.rests_on:
        for offset, length in now.rests_on:
            disk.read(offset, length)
        now = next((problem for problem in check(disk).problems if problem.key == suspicion.key), None)
    if now is not None:
        report(now)
