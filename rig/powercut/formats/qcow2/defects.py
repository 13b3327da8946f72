"""A catalogue of real defects of qcow2 drivers, each one switch on the model (`powercut.formats.qcow2.driver`).

They are what the rig is measured by: each must be found, and the same run without it must hold. `upstream` names the
commit that mended it in QEMU where that was looked up; where it is empty, only the history below is known.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from powercut.errors import InputError
from powercut.formats.qcow2.driver.practice import Era, Practice


class Sort(enum.StrEnum):
    """What it takes for a defect to do harm."""

    CRASH = "crash order"
    LOGIC = "logic"
    ERROR = "error path"
    SHUTDOWN = "shutdown"


@dataclass(frozen=True, slots=True)
class Defect:
    """`when`: year and month. `happened`: the mechanism. `shows`: what a user sees of it."""

    name: str
    when: str
    sort: Sort
    happened: str
    shows: str
    upstream: str = ""
    era: Era = Era.TODAY

    @property
    def planted(self) -> Practice:
        return Practice(self.era, frozenset({self.name}))

    @property
    def absent(self) -> Practice:
        return Practice(self.era)


CATALOGUE = (
    Defect(
        "l2-free-unswapped",
        "2009-04",
        Sort.LOGIC,
        "After a cluster was copied for a write, the old one was freed by its L2 entry as it is on disk, big-endian, "
        "without a swap of bytes. Most such frees failed unseen, and leaked; an index truncated to 32 bits made some, "
        "at 4 KiB clusters that of offset 0x8000, lower the refcount of cluster 0.",
        "Leaks; the header has refcount 0; in the next run an L2 table is allocated at offset 0, over the header.",
        era=Era.APRIL_2009,
    ),
    Defect(
        "alloc-zero-unchecked",
        "2009-04",
        Sort.ERROR,
        "A failed allocation returns 0, and nobody looks before metadata is written there.",
        "After an I/O error, or with a damaged refcount block, a table lies over the header.",
    ),
    Defect(
        "l2-scan-past-end",
        "2009-04",
        Sort.LOGIC,
        "The scan for clusters that go together ran off the end of the L2 table, into whatever came next in memory.",
        "Allocated data is reported unallocated: reads give zeros, and an image conversion leaves it out.",
        era=Era.APRIL_2009,
    ),
    Defect(
        "contiguous-chunks",
        "2009-01",
        Sort.LOGIC,
        "That clusters lie one after the other was checked within each chunk, and not over the whole allocation.",
        "One request is written in one piece to clusters that are apart: over other data, or over tables.",
        era=Era.APRIL_2009,
    ),
    Defect(
        "l2-before-refcount",
        "2008-12",
        Sort.CRASH,
        "The old cluster was given up first, and the L2 table written before the guest's data and before the refcount "
        "of the new cluster.",
        "After an unexpected exit neither old nor new data is there, or a cluster in use has refcount 0.",
        "e976c6a1e40ad74d616a186d3b48b0ad8f5eb970",
    ),
    Defect(
        "l2-cow-order",
        "2011-02",
        Sort.CRASH,
        "When an L2 table that a snapshot shares was copied, the old table's refcount was lowered before the L1 entry "
        "pointed to the copy.",
        "After a crash a shared table has refcount 1 and two users; a later write changes both.",
    ),
    Defect(
        "refblock-self-overlap",
        "2010-05",
        Sort.LOGIC,
        "A new refcount block that is counted by another block loaded that one into the cache, and the caller went on "
        "with it: the refcounts of the clusters that it was handing out went to the wrong block.",
        "Clusters in use have refcount 0 and are handed out a second time.",
    ),
    Defect(
        "refcount-rollback",
        "2010-05",
        Sort.ERROR,
        "When no refcount block could be allocated nothing was changed yet, and the rollback took the index -1 for a "
        "sector: 512 bytes of uninitialised memory were written into a refcount block.",
        "After an I/O error or on a full disk, refcounts of 256 clusters are random.",
    ),
    Defect(
        "no-flush-before-l2",
        "",
        Sort.CRASH,
        "Refcounts, data and L2 tables are written in the right order, with no barrier between them.",
        "After a power cut a cluster in use has refcount 0, or an L2 entry points to what was never written.",
    ),
    Defect(
        "lazy-refcounts-no-dirty-bit",
        "",
        Sort.CRASH,
        "Lazy refcounts, without the dirty bit being set first.",
        "After a crash refcounts are wrong and nothing says so: clusters in use are handed out.",
    ),
    Defect(
        "close-drops-cache",
        "",
        Sort.SHUTDOWN,
        "Tables that wait in the cache are dropped when the image is closed.",
        "What was written since the last flush is gone after an orderly shutdown.",
    ),
    Defect(
        "discard-keeps-mapping",
        "",
        Sort.CRASH,
        "A discarded cluster is freed on disk while its L2 entry still points to it.",
        "After a crash a cluster in use has refcount 0.",
    ),
    Defect(
        "snapshot-delete-frees-shared",
        "",
        Sort.LOGIC,
        "Deleting a snapshot frees its clusters, whoever else uses them.",
        "The guest's clusters have refcount 0 and are handed out again.",
    ),
)


def find(name: str) -> Defect:
    """The defect of that name. Raises InputError."""
    for defect in CATALOGUE:
        if defect.name == name:
            return defect
    raise InputError(f"{name!r} is not one of the defects {', '.join(each.name for each in CATALOGUE)}")
