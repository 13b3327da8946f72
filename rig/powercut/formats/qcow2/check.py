"""The qcow2 checker: what `qemu-img check` reports, and the guest's mapping, in-process and over sets.

Sources: QEMU's docs/interop/qcow2.txt; block/qcow2-refcount.c (qcow2_check_refcounts and below) for what is
counted as a corruption, a leak, an internal error.

The spine (header, L1 tables, refcount table, snapshot table, bitmap directory and tables) is read and so
decided. L2 tables and refcount blocks are read as sets, which decides nothing:

    upper bound of references to a cluster = references from the spine + distinct pairs (L2 slot, cluster)
    a cluster may be corrupt               <=> upper bound > least refcount it may have

So on a decided disk the result is exact; on a crash disk no problem of any decided state is missing, and
each problem lists in `rests_on` what it was judged from and could still be something else. With nothing
there it is a fact; otherwise the search decides those ranges and checks again.

Leaks are legal after a crash, and never problems.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from powercut.disk import Disk
from powercut.formats.qcow2 import compare
from powercut.formats.qcow2.entries import Bools
from powercut.formats.qcow2.findings import Findings
from powercut.formats.qcow2.header import Header, read_header
from powercut.formats.qcow2.mapping import Mapping
from powercut.formats.qcow2.spine import L1, Overlapping, l2_places, read_spine
from powercut.formats.qcow2.tables import Group, read_groups
from powercut.verdict import Problem, Severity


@dataclass
class Check:
    """What a check found.

    On a decided disk `corruptions`, `leaks` and `check_errors` are the numbers of `qemu-img check`, and
    `exit_code` its exit code. With undecided spans `corruptions` is an upper bound, and `leaks` speaks of
    one content (`Variants.first`).
    """

    header: Header | None
    is_qcow2: bool
    problems: list[Problem]
    omitted: int  # problems beyond those listed
    corruptions: int
    leaks: int
    leaked: Bools | None  # by cluster, where it was compared
    check_errors: int
    aborted: str  # why QEMU's checker would give up; the counts then mean nothing
    decided: bool
    active: L1 | None = None
    groups: list[Group] = field(default_factory=list)

    @property
    def dirty(self) -> bool:
        return self.header is not None and self.header.dirty

    @property
    def exit_code(self) -> int:
        if self.aborted or self.check_errors:
            return 1
        return 2 if self.corruptions else 3 if self.leaks else 0

    @cached_property
    def mapping(self) -> Mapping:
        """The guest's view of the active layer."""
        assert self.header is not None, "an image that cannot be opened has no mapping"
        return Mapping(self.header, self.active, self.groups)


def check(disk: Disk, *, trust_dirty: bool = False) -> Check:
    """Check the image on `disk`.

    When the dirty bit is set, QEMU recomputes refcounts and copied flags at the next writable open, so what
    is wrong with them is no problem: it is counted, as `qemu-img check` does, and left out of `problems`.
    `trust_dirty` puts it in.
    """
    parsed = read_header(disk)
    found = Findings()
    for problem in parsed.problems:
        found.add(problem)
    header = parsed.header
    if header is None:
        found.aborted = parsed.problems[0].text
        return _result(found, None, parsed.magic, True)
    quiet = header.dirty and not trust_dirty
    try:
        spine = read_spine(disk, header, found)
        places, weight, active = l2_places(spine)
        inside = places < spine.ledger.length
        if not inside.all():
            places, weight, active = places[inside], weight[inside], active[inside]
        spine.ledger.budget -= len(places) * header.cluster_size
        if spine.ledger.budget < 0:
            raise Overlapping
        groups = read_groups(disk, header, places, weight, active)
        decided = compare.compare(disk, spine, places, weight, groups, found, quiet)
    except Overlapping:
        found.aborted = "the tables overlap"
        found.corruptions += 1
        text = "the tables overlap: together they are larger than the file"
        found.add(Problem("structure", "overlapping-tables", 0, Severity.CORRUPT, text), always=True)
        return _result(found, header, True, True)
    return _result(found, header, True, decided, spine.tables[0], groups)


def _result(
    found: Findings,
    header: Header | None,
    magic: bool,
    decided: bool,
    active: L1 | None = None,
    groups: list[Group] | None = None,
) -> Check:
    return Check(
        header,
        magic,
        list(found.problems.values()),
        found.omitted,
        found.corruptions,
        found.leaks,
        found.leaked,
        found.check_errors,
        found.aborted,
        decided,
        active,
        groups or [],
    )
