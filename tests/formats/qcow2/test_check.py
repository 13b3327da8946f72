"""Faults planted in images made by hand, what the dirty bit changes, and input that is not an image at all."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from formats.qcow2.handmade import COPIED, Handmade
from formats.qcow2.images import Mutator
from formats.qcow2.spans import PlainDisk
from powercut.disk import Bytes
from powercut.errors import InputError
from powercut.formats.qcow2.check import Check, check
from powercut.formats.qcow2.findings import LIMIT
from powercut.verdict import Severity


def run(image: Handmade, *, trust_dirty: bool = False) -> Check:
    return check(PlainDisk(image.image), trust_dirty=trust_dirty)


def kinds(found: Check) -> set[str]:
    return {problem.kind for problem in found.problems}


@pytest.mark.parametrize("order", range(7))
@pytest.mark.parametrize("shape", [{}, {"cluster_bits": 12}, {"cluster_bits": 14, "extended": True}, {"dirty": True}])
def test_clean_images_pass(order: int, shape: dict[str, int]) -> None:
    found = run(Handmade(refcount_order=order, **shape))  # type: ignore[arg-type]
    assert found.problems == []
    assert (found.corruptions, found.leaks, found.check_errors, found.exit_code) == (0, 0, 0, 0)
    assert found.decided
    assert found.is_qcow2


def test_clean_image_with_a_snapshot_passes() -> None:
    found = run(Handmade(snapshot=True))
    assert (found.problems, found.leaks) == ([], 0)


def _swap(image: Handmade, bit: int) -> None:
    image.word(image.slot(0, 1), image.at(image.slot(0, 1)) ^ bit)


def _data(image: Handmade, slot: int = 1) -> int:
    return (image.at(image.slot(0, slot)) & ~COPIED) // image.cluster


FAULTS: dict[str, tuple[set[str], Callable[[Handmade], object]]] = {
    "refcount lowered to 0": ({"refcount", "copied-flag"}, lambda i: i.refcount(_data(i), 0)),
    "refcount of the header lowered": ({"refcount"}, lambda i: i.refcount(0, 0)),
    "refcount of an L2 table lowered": ({"refcount", "copied-flag"}, lambda i: i.refcount(i.l2[0] // i.cluster, 0)),
    "two L2 entries cross-linked": ({"refcount"}, lambda i: i.word(i.slot(0, 1), i.at(i.slot(1, 1)))),
    "copied flag cleared": ({"copied-flag"}, lambda i: _swap(i, COPIED)),
    "copied flag of an L1 entry cleared": ({"copied-flag"}, lambda i: i.word(i.l1, i.at(i.l1) ^ COPIED)),
    "reserved bit of an L2 entry": ({"l2-reserved"}, lambda i: _swap(i, 1 << 60)),
    "reserved bit of an L1 entry": ({"l1-reserved"}, lambda i: i.word(i.l1, i.at(i.l1) | 1)),
    "L2 entry beyond the end": ({"beyond-end"}, lambda i: i.word(i.slot(0, 9), i.clusters * i.cluster)),
    "L1 entry beyond the end": ({"beyond-end"}, lambda i: i.word(i.l1, i.clusters * i.cluster | COPIED)),
    "L2 entry not aligned": ({"l2-unaligned"}, lambda i: _swap(i, 512)),
    "L1 entry not aligned": ({"l1-unaligned"}, lambda i: i.word(i.l1, i.at(i.l1) | 512)),
    "data over the refcount table": ({"refcount"}, lambda i: i.word(i.slot(0, 1), i.reftable | COPIED)),
    "data over a refcount block": (
        {"refblock-shared", "refcount"},
        lambda i: i.word(i.slot(0, 1), i.refblock | COPIED),
    ),
    "refcount block not aligned": ({"refblock-unaligned"}, lambda i: i.word(i.reftable, i.refblock + 512)),
    "refcount block outside": ({"refblock-outside"}, lambda i: i.word(i.reftable, i.clusters * i.cluster)),
    "refcount table entry reserved": ({"refblock-reserved"}, lambda i: i.word(i.reftable, i.refblock + 1)),
    "refcount table zeroed": ({"refcount"}, lambda i: i.word(i.reftable, 0)),
    "compressed with copied flag": ({"compressed-copied"}, lambda i: i.word(i.slot(0, 9), 3 << 62 | 5 * i.cluster)),
    "corrupt bit": ({"corrupt-bit"}, lambda i: i.word(72, 2)),
    "L1 table moved beyond the end": ({"beyond-end"}, lambda i: i.word(40, (i.clusters + 1) * i.cluster)),
    "snapshot table broken": ({"snapshot-table"}, lambda i: i.word(64, 513)),
}
EXTENDED_FAULTS: dict[str, tuple[set[str], Callable[[Handmade], object]]] = {
    "subcluster allocated and zero": ({"subcluster-both"}, lambda i: i.word(i.slot(0, 1) + 8, 1 | 1 << 32)),
    "subcluster allocated nowhere": ({"subcluster-nowhere"}, lambda i: i.word(i.slot(0, 9) + 8, 1)),
    "compressed with a bitmap": (
        {"compressed-bitmap"},
        lambda i: (i.word(i.slot(0, 9), 1 << 62 | 5 * i.cluster), i.word(i.slot(0, 9) + 8, 1)),
    ),
}


@pytest.mark.parametrize("name", sorted(FAULTS.keys() | EXTENDED_FAULTS.keys()))
def test_planted_faults_are_found(name: str, planted: Callable[[str, bool], None]) -> None:
    image = Handmade(cluster_bits=14, extended=True) if name in EXTENDED_FAULTS else Handmade(cluster_bits=12)
    expected, plant = (FAULTS | EXTENDED_FAULTS)[name]
    plant(image)
    found = run(image)
    planted(f"qcow2: {name}", expected <= kinds(found))
    assert expected <= kinds(found)
    assert all(problem.severity >= Severity.CORRUPT and not problem.rests_on for problem in found.problems)
    assert found.exit_code in (1, 2) or name == "corrupt bit"


def test_a_leak_is_counted_and_no_problem() -> None:
    image = Handmade()
    image.refcount(image.clusters - 1, 1)
    image.refcount(_data(image), 2)
    _swap(image, COPIED)
    found = run(image)
    assert (found.problems, found.leaks, found.corruptions, found.exit_code) == ([], 2, 0, 3)


def test_version_2_zero_flag_is_a_problem_that_qemu_does_not_count() -> None:
    image = Handmade()
    image.image[4:8] = (2).to_bytes(4, "big")
    image.image[72:80] = bytes(8)
    _swap(image, 1)
    found = run(image)
    assert kinds(found) == {"v2-zero-flag"}
    assert (found.corruptions, found.exit_code) == (0, 0)


def test_dirty_images_are_counted_but_their_refcounts_are_no_problem() -> None:
    image = Handmade(dirty=True)
    image.refcount(_data(image), 0)
    found, trusting = run(image), run(image, trust_dirty=True)
    assert found.dirty
    assert found.problems == []
    assert kinds(trusting) == {"refcount", "copied-flag"}
    assert found.corruptions == trusting.corruptions == 2
    image.word(image.slot(0, 2), 1 << 60)
    assert kinds(run(image)) == {"l2-reserved"}


def test_problems_are_capped_and_counts_are_not() -> None:
    image = Handmade(cluster_bits=14)
    for slot in range(2 * LIMIT):
        image.word(image.slot(0, slot), 1 << 61)
    found = run(image)
    assert len(found.problems) == LIMIT
    assert found.corruptions == 2 * LIMIT
    assert len(found.problems) + found.omitted >= 2 * LIMIT


def test_not_qcow2() -> None:
    for content in (b"", b"\0" * 4096, b"QFI", random.Random(1).randbytes(70000)):
        found = check(PlainDisk(content))
        assert not found.is_qcow2
        assert kinds(found) == {"magic"}
        assert found.exit_code == 1


def test_many_snapshots_of_one_table_are_read_once() -> None:
    """65536 snapshots may claim one L1 table: that is a number to multiply with, and nothing to loop over."""
    image = Handmade(cluster_bits=12, snapshot=True)
    table = (4 + image.tables) * image.cluster
    entry = bytes(image.image[table : table + 64])
    image.image[60:64] = (3000).to_bytes(4, "big")
    image.image += bytes(64 * 3000)
    start = image.clusters * image.cluster
    image.image[start:] = entry * 3000
    image.word(64, start)
    disk = PlainDisk(image.image)
    found = check(disk)
    assert found.corruptions > 3
    assert disk.total < 3000 * 128 + 40 * image.cluster


def test_overlapping_tables_end_the_check() -> None:
    """L1 entries a sector apart make every table overlap the next; together they would be read for ever."""
    image = Handmade(cluster_bits=20, tables=1)
    for entry in range(1 << 17):
        image.word(image.l1 + 8 * entry, entry * 512)
    image.image[36:40] = (1 << 17).to_bytes(4, "big")
    disk = PlainDisk(image.image)
    found = check(disk)
    assert "overlapping-tables" in kinds(found)
    assert found.aborted
    assert disk.total < 4 * len(image.image)


class Limited(PlainDisk):
    """Fails when more is read at once, or in all, than the size of the file justifies."""

    def read(self, offset: int, length: int) -> Bytes:
        assert length <= self.size + (2 << 20), "a read the file cannot justify"
        out = super().read(offset, length)
        assert self.total <= 8 * self.size + (80 << 20), "more is read than the file can justify"
        return out


def _survives(content: bytes) -> None:
    try:
        found = check(Limited(content), trust_dirty=True)
    except InputError:
        return
    assert isinstance(found, Check)
    if found.header is not None and found.header.guest_clusters < 1 << 20:
        assert len(found.mapping.entry) == found.header.guest_clusters
    assert len(found.problems) <= LIMIT + 4


@given(st.binary(max_size=3000), st.booleans())
def test_random_bytes(content: bytes, magic: bool) -> None:
    _survives(b"QFI\xfb\0\0\0\3" + content if magic else content)


@given(
    st.sampled_from([{}, {"cluster_bits": 12}, {"cluster_bits": 14, "extended": True}, {"snapshot": True}]),
    st.integers(0, 1 << 32),
)
def test_mutated_images(shape: dict[str, int], seed: int) -> None:
    image = Handmade(**shape)  # type: ignore[arg-type]
    _survives(Mutator(bytes(image.image)).mutate(random.Random(seed)))


@given(st.integers(0, 111), st.binary(min_size=1, max_size=8))
def test_mutated_headers(at: int, content: bytes) -> None:
    image = Handmade(snapshot=True).image
    image[at : at + len(content)] = content
    _survives(bytes(image))
