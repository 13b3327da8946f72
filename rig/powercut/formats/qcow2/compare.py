"""References against refcounts, and copied flags against refcounts.

Source: block/qcow2-refcount.c (check_refblocks, compare_refcounts, check_oflag_copied). QEMU counts
references in an array of the image's own refcount width: it saturates, and each reference too many is a
corruption of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from powercut.disk import Disk
from powercut.formats.qcow2 import layout as q
from powercut.formats.qcow2 import references
from powercut.formats.qcow2.entries import I64, U64, Bools, Examined
from powercut.formats.qcow2.findings import LIMIT, Findings, Ranges
from powercut.formats.qcow2.header import Header
from powercut.formats.qcow2.refcounts import Refcounts, read_refcounts, readable
from powercut.formats.qcow2.references import Part
from powercut.formats.qcow2.spine import Spine
from powercut.formats.qcow2.tables import Group

MOST_CLUSTERS = 1 << 28  # 16 TiB of 64 KiB clusters; some arrays have eight bytes for each


@dataclass(slots=True)
class Comparison:
    header: Header
    spine: Spine
    parts: list[Part]
    refcounts: Refcounts
    first: I64  # references to each cluster, in one content
    upper: I64  # at most, in any; the same object when nothing adds to it
    clusters: int  # of the file, and the one behind it when an unaligned entry may reach there
    longer: bool  # whether that is so
    found: Findings
    quiet: bool  # refcounts and copied flags are counted, and are no problems

    def rests_on(self, cluster: int) -> Ranges:
        """Undecided slots that may refer to `cluster`."""
        return tuple(
            references.slot_range(part, int(slot), self.header)
            for part in self.parts
            for slot in part.slot[part.cluster == cluster]
        )


def compare(
    disk: Disk, spine: Spine, places: I64, weight: I64, groups: list[Group], found: Findings, quiet: bool
) -> bool:
    """Judge everything below the spine. Returns whether all of it was decided."""
    ledger = spine.ledger
    header = ledger.header
    parts = [references.examine_group(group, header, ledger.length) for group in groups]
    for part in parts:
        if part.examined is not None or part.other is not None:
            references.report_defects(part, header, found)
    table_first = places >> header.cluster_bits
    table_last = (places + (header.cluster_size - 1)) >> header.cluster_bits
    top = max([ledger.top, *(part.top for part in parts)])
    if len(places):
        top = max(top, int(table_last.max()))

    # What lies beyond both the last reference and the last refcount block is zero on either side.
    in_file = -(-ledger.length // header.cluster_size)
    blocks = np.flatnonzero(spine.refcount_table)
    covered = (int(blocks[-1]) + 1) * header.refcounts_per_block if len(blocks) else 0
    size = min(in_file, max(covered, top + 1)) + 1
    if in_file > q.MAX_CLUSTERS or size > MOST_CLUSTERS:
        found.check_errors += 1
        found.aborted = f"{in_file} clusters are too many to count"
        return True
    refcounts = read_refcounts(disk, header, spine.refcount_table, size)

    first = np.zeros(size, dtype=np.int64)
    for part in parts:
        counted = references.count(part, size)
        first = counted if part is parts[0] else first + counted
    for start, stop, times in ledger.ranges:
        first[start : stop + 1] += times
    np.add.at(first, table_first, weight)
    unaligned = table_last > table_first
    if unaligned.any():
        np.add.at(first, table_last[unaligned], weight[unaligned])
    upper = first
    for part in parts:
        if part.extra.any():
            upper = upper + references.count_extra(part, size)

    longer = size > in_file and bool(upper[in_file] > 0)
    comparison = Comparison(header, spine, parts, refcounts, first, upper, in_file + longer, longer, found, quiet)
    _refcount_blocks(comparison, blocks)
    _compare(comparison)
    _copied_l1(comparison)
    for part in parts:
        _copied(comparison, part)
    return refcounts.decided and all(part.other is None for part in parts)


def _refcount_blocks(c: Comparison, index: I64) -> None:
    """Refer to the refcount blocks; each should be referred to once, and by nothing else."""
    header, found = c.header, c.found
    entry = c.spine.refcount_table[index]
    offset: U64 = entry & np.uint64(q.REFCOUNT_TABLE_OFFSET_MASK)
    where = header.refcount_table_offset + index * 8
    reserved = entry & q.REFCOUNT_TABLE_RESERVED != 0
    unaligned = ~reserved & (offset & (header.cluster_size - 1) != 0)
    outside = ~reserved & ~unaligned & (offset >> header.cluster_bits >= c.clusters)
    for kind, bad, text in (
        ("refblock-reserved", reserved, "reserved bits are set"),
        ("refblock-unaligned", unaligned, "not cluster aligned"),
        ("refblock-outside", outside, "the refcount block is outside the image"),
    ):
        if bad.any():
            found.corruptions += int(np.count_nonzero(bad))
            values = entry[bad].tolist()
            found.corrupt_many(
                kind,
                where[bad].tolist(),
                lambda i, v=values, t=text: f"refcount table entry {v[i]:#x}: {t}",  # type: ignore[misc]
            )
    good = ~(reserved | unaligned | outside)
    _maybe_outside(c, where[good], offset[good] >> header.cluster_bits)
    if not good.all():
        _unreadable(c, index, offset)
    cluster, where = (offset[good] >> header.cluster_bits).view(np.int64), where[good]
    # The n-th reference to one block: they are counted one after the other.
    order = np.argsort(cluster, kind="stable")
    ordered = cluster[order]
    nth = np.empty(len(cluster), dtype=np.int64)
    nth[order] = np.arange(1, len(cluster) + 1) - np.searchsorted(ordered, ordered)
    so_far = c.upper[cluster] + nth
    shared = np.minimum(so_far, min(header.refcount_max, q.MAX_OFFSET)) != 1
    if shared.any():
        found.corruptions += int(np.count_nonzero(shared))
        which, times = cluster[shared].tolist(), so_far[shared].tolist()
        found.corrupt_many(
            "refblock-shared",
            where[shared].tolist(),
            lambda i: f"refcount block at cluster {which[i]} has {times[i]} references",
            lambda i: c.rests_on(which[i]),
        )
    np.add.at(c.first, cluster, 1)
    if c.upper is not c.first:
        np.add.at(c.upper, cluster, 1)


def _maybe_outside(c: Comparison, where: I64, cluster: U64) -> None:
    """A block right behind the file is inside only while an unaligned entry, maybe an undecided one, reaches there."""
    behind = np.flatnonzero(cluster == c.clusters - 1) if c.longer else ()
    if not len(behind):
        return
    ranges = c.rests_on(c.clusters - 1)
    if ranges:
        c.found.corruptions += len(behind)
        text = "refcount table entry: the refcount block is outside the image"
        c.found.corrupt_many("refblock-outside", where[behind].tolist(), lambda _: text, lambda _: ranges)


def _unreadable(c: Comparison, index: I64, offset: U64) -> None:
    """Each cluster whose refcount cannot be read is an internal error of QEMU's checker."""
    per_block = c.header.refcounts_per_block
    for block, at in zip(index.tolist(), offset.tolist(), strict=True):
        if at and not readable(at, c.header):
            c.found.check_errors += max(0, min(c.clusters, (block + 1) * per_block) - block * per_block)


def _compare(c: Comparison) -> None:
    refcounts, header, found = c.refcounts, c.header, c.found
    bad = c.upper > refcounts.low
    leaked = c.first < refcounts.first
    if c.clusters < len(leaked):
        leaked[c.clusters :] = False
    if refcounts.unknown is not None:
        bad &= ~refcounts.unknown
        leaked &= ~refcounts.unknown
    found.leaks += int(np.count_nonzero(leaked))
    found.leaked = leaked
    if header.refcount_bits < 32:
        # Only now is it worth a look: no count that saturates goes unnoticed by the comparison.
        _saturate(c, bad)
    else:
        found.corruptions += int(np.count_nonzero(bad))
    if c.quiet or not bad.any():
        return
    which = np.flatnonzero(bad)
    found.omitted += max(0, len(which) - LIMIT)
    clusters = which[:LIMIT].tolist()
    low, most = refcounts.low, c.upper
    found.corrupt_many(
        "refcount",
        clusters,
        lambda i: f"cluster {clusters[i]}: refcount {int(low[clusters[i]])}, references {int(most[clusters[i]])}",
        lambda i: c.rests_on(clusters[i]) + refcounts.rests_on(clusters[i]),
    )


def _saturate(c: Comparison, bad: Bools) -> None:
    most = c.header.refcount_max
    which = np.flatnonzero(c.upper > most) if int(c.upper.max()) > most else ()
    c.found.corruptions += int(np.count_nonzero(bad))
    if not len(which):
        return
    c.found.corruptions += int((c.upper[which] - most).sum())
    # Saturated references that equal the refcount are no mismatch, only an overflow.
    c.found.corruptions -= int(np.count_nonzero(bad[which] & (c.refcounts.low[which] == most)))
    if c.refcounts.unknown is not None:
        bad[which] = True


def _copied_l1(c: Comparison) -> None:
    """The copied flags of the active L1 table."""
    table = c.spine.tables[0]
    index = np.flatnonzero(table.entry & q.OFFSET_MASK)
    if not len(index):
        return
    entry = table.entry[index]
    cluster = ((entry & q.OFFSET_MASK) >> c.header.cluster_bits).view(np.int64)
    wrong = _wrong(c, entry, cluster)
    if not wrong.any():
        return
    c.found.corruptions += int(np.count_nonzero(wrong))
    if c.quiet:
        return
    at, entry, cluster = index[wrong], entry[wrong], cluster[wrong]
    c.found.corrupt_many(
        "copied-flag",
        (table.offset + at * 8).tolist(),
        lambda i: _copied_text("L1", int(entry[i]), int(cluster[i]), c.refcounts),
        lambda i: c.refcounts.rests_on(int(cluster[i])),
    )


def _copied_text(what: str, entry: int, cluster: int, refcounts: Refcounts) -> str:
    low, high, _ = refcounts.at(np.array([cluster]))
    count = str(int(low[0])) if low[0] == high[0] else f"{int(low[0])}..{int(high[0])}"
    return f"{what} entry {entry:#x}: the copied flag contradicts refcount {count} of cluster {cluster}"


def _wrong(c: Comparison, entry: U64, cluster: I64) -> Bools:
    """Where the flag and the refcount may disagree."""
    low, high, known = c.refcounts.at(cluster)
    flag = entry & q.COPIED != 0
    surely, maybe = (low == 1) & (high == 1), (low <= 1) & (high >= 1)
    return known & np.where(flag, ~surely, maybe)


def _copied(c: Comparison, part: Part) -> None:
    """The copied flags of L2 entries in tables of the active layer."""
    group = part.group
    rows, slots_per_table = group.active > 0, group.entry.shape[1]
    if c.refcounts.unknown is not None:
        # QEMU passes over a table whose own refcount it cannot read.
        rows &= ~c.refcounts.unknown[group.offsets >> c.header.cluster_bits]
    if not rows.any():
        return
    if part.plain is not None:
        wrong = np.flatnonzero(_wrong_plain(c, group.entry, part.plain))
        wrong = wrong[rows[wrong // slots_per_table]] if len(wrong) else wrong
        _report_copied(c, part, wrong, group.entry.reshape(-1)[wrong], part.plain.reshape(-1)[wrong])
    elif part.examined is not None:
        _copied_examined(c, part, part.examined, rows, np.arange(group.entry.size), group.entry.reshape(-1))
    if part.other is not None and group.alternates is not None:
        _copied_examined(c, part, part.other, rows, group.alternates.slot, group.alternates.entry)


def _wrong_plain(c: Comparison, entry: U64, cluster: I64) -> Bools:
    low, high = c.refcounts.low, c.refcounts.high
    flag = entry.view(np.int64) < 0
    surely = low == 1
    surely[0] = False  # cluster 0 stands for unallocated entries: they have no flag
    if low is high:
        wrong: Bools = flag != surely[cluster]
    else:
        maybe = (low <= 1) & (high >= 1)
        maybe[0] = False
        wrong = np.where(flag, ~(surely & (high == 1))[cluster], maybe[cluster])
    if not wrong.any():
        return wrong
    wrong &= cluster != 0
    if c.refcounts.unknown is not None:
        wrong &= ~c.refcounts.unknown[cluster]
    return wrong


def _copied_examined(c: Comparison, part: Part, examined: Examined, rows: Bools, slots: I64, entry: U64) -> None:
    which = np.flatnonzero(examined.allocated)
    which = which[rows[slots[which] // part.group.entry.shape[1]]]
    entry, cluster = entry[which], examined.first[which]
    # Clusters of an external data file have an implied refcount of 1.
    wrong = entry & q.COPIED == 0 if c.header.data_file else _wrong(c, entry, cluster)
    _report_copied(c, part, slots[which[wrong]], entry[wrong], cluster[wrong])


def _report_copied(c: Comparison, part: Part, slot: I64, entry: U64, cluster: I64) -> None:
    if not len(slot):
        return
    c.found.corruptions += int(part.group.active[slot // part.group.entry.shape[1]].sum())
    if c.quiet:
        return

    def rests_on(i: int) -> Ranges:
        count = () if c.header.data_file else c.refcounts.rests_on(int(cluster[i]))
        return references.undecided_ranges(part, int(slot[i]), c.header) + count

    def text(i: int) -> str:
        if c.header.data_file:
            return f"L2 entry {int(entry[i]):#x}: no copied flag, in an image with an external data file"
        return _copied_text("L2", int(entry[i]), int(cluster[i]), c.refcounts)

    c.found.corrupt_many("copied-flag", part.group.where(slot, c.header).tolist(), text, rests_on)
