"""The checker over sets of contents against brute force: every disk that the sets may turn out to be.

Three things must hold of what `check` says about an undecided disk:

    complete    a problem of any decided state is among the problems of the sets
    factual     a problem that rests on nothing is a problem of every decided state
    determined  whether a problem is real is decided by the contents of the ranges it rests on
"""

from __future__ import annotations

import itertools
import random
from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from formats.qcow2.handmade import COPIED, SLOTS, Handmade, set_refcount
from formats.qcow2.spans import SpanDisk
from powercut.disk import Span, Variants
from powercut.formats.qcow2.check import check
from powercut.formats.qcow2.tables import aligned
from powercut.verdict import Problem


def some_entry(image: Handmade, rng: random.Random) -> int:
    cluster = rng.randrange(image.clusters + 2) * image.cluster
    return rng.choice(
        (
            0,
            cluster | COPIED,
            cluster | COPIED,
            cluster,
            cluster | 1,
            COPIED,
            (cluster + 512) | COPIED,  # not aligned where clusters are larger
            cluster | COPIED | 1 << 60,
            1 << 62 | cluster + 100 | rng.randrange(2) << (62 - (image.cluster_bits - 8)),
            1 << 62 | COPIED | cluster,
            rng.getrandbits(64),
        )
    )


def other_table(image: Handmade, at: int, length: int, rng: random.Random) -> bytes:
    """Other content of a stretch of an L2 table: some slots changed."""
    out = bytearray(image.image[at : at + length])
    for _ in range(rng.choice((1, 1, 2, 4))):
        slot = rng.randrange(min(length // image.entry_size, SLOTS + 1)) * image.entry_size
        out[slot : slot + 8] = some_entry(image, rng).to_bytes(8, "big")
        if image.extended and rng.random() < 0.3:
            out[slot + 8 : slot + 16] = rng.choice((0, 1, 1 << 32, 1 | 1 << 32)).to_bytes(8, "big")
    return bytes(out)


def other_refcounts(image: Handmade, length: int, rng: random.Random) -> bytes:
    out = bytearray(image.image[image.refblock : image.refblock + length])
    for _ in range(rng.choice((1, 1, 2, 4))):
        set_refcount(out, 0, image.refcount_order, rng.randrange(image.clusters), rng.choice((0, 0, 1, 1, 2, 3)))
    return bytes(out)


def undecided(image: Handmade, rng: random.Random, ragged: bool) -> SpanDisk:
    """The image with some sectors undecided; with `ragged`, stretches that end inside entries."""
    sectors = [at + n * 512 for at in image.l2 for n in range(min(image.cluster // 512, 2))] + [image.refblock]
    choices = []
    for at in rng.sample(sectors, rng.randrange(1, min(4, len(sectors)) + 1)):
        count = rng.choice((1, 1, 2))
        if at == image.refblock:
            others = [other_refcounts(image, 512, rng) for _ in range(count)]
        else:
            others = [other_table(image, at, 512, rng) for _ in range(count)]
        if not ragged:
            choices.append((at, others))
            continue
        cuts = sorted({0, 512, *(rng.randrange(1, 60) for _ in range(rng.randrange(3)))})
        for start, stop in list(itertools.pairwise(cuts))[:2]:
            choices.append((at + start, [other[start:stop] for other in others]))
    return SpanDisk(image.image, choices[:5])


def ranges_content(disk_bytes: np.ndarray, problem: Problem) -> tuple[bytes, ...]:  # type: ignore[type-arg]
    return tuple(disk_bytes[offset : offset + length].tobytes() for offset, length in problem.rests_on)


def compare(disk: SpanDisk) -> tuple[int, int]:
    """Assert the three properties; return how many problems were suspected, and how many of them are ever real."""
    found = check(disk, trust_dirty=True)
    assert not found.omitted
    suspected = {problem.key: problem for problem in found.problems}
    assert len(suspected) == len(found.problems)
    real_somewhere = set()
    verdicts: dict[tuple[str, str, int], dict[tuple[bytes, ...], set[bool]]] = defaultdict(lambda: defaultdict(set))
    for state in disk.states():
        exact = check(state, trust_dirty=True)
        assert exact.decided
        real = {problem.key for problem in exact.problems}
        assert all(not problem.rests_on for problem in exact.problems)
        assert real <= suspected.keys(), f"missed: {real - suspected.keys()}"
        real_somewhere |= real
        for key, problem in suspected.items():
            if not problem.rests_on:
                assert key in real, f"not a fact: {problem}"
            verdicts[key][ranges_content(state.bytes, problem)].add(key in real)
    for key, by_content in verdicts.items():
        for content, answers in by_content.items():
            assert len(answers) == 1, f"{suspected[key]} is not determined by {content!r}"
    for problem in found.problems:
        for offset, length in problem.rests_on:
            assert any(at < offset + length and offset < at + len(others[0]) for at, others in disk.choices)
    return len(suspected), len(real_somewhere)


images = st.builds(
    Handmade,
    cluster_bits=st.sampled_from((9, 10, 12)),
    refcount_order=st.integers(0, 6),
    dirty=st.booleans(),
    snapshot=st.booleans(),
    tables=st.integers(1, 3),
) | st.builds(
    Handmade, cluster_bits=st.just(14), refcount_order=st.integers(0, 6), extended=st.just(True), snapshot=st.booleans()
)


@given(image=images, seed=st.integers(0, 1 << 32), breaks=st.integers(0, 3), ragged=st.booleans())
def test_against_every_decided_state(image: Handmade, seed: int, breaks: int, ragged: bool) -> None:
    rng = random.Random(seed)
    for _ in range(breaks):  # what is decided may be broken too
        where = rng.choice((image.slot(rng.randrange(image.tables), rng.randrange(SLOTS)), image.l1, image.reftable))
        image.word(where, some_entry(image, rng))
    compare(undecided(image, rng, ragged))


def test_suspicions_are_mostly_real(figure: object) -> None:
    """An upper bound that suspected everything would pass the properties, and make the search prove it all."""
    suspected = real = 0
    for seed in range(300):
        rng = random.Random(seed)
        image = Handmade(cluster_bits=rng.choice((9, 10)), refcount_order=4, snapshot=rng.random() < 0.3)
        a, b = compare(undecided(image, rng, ragged=False))
        suspected, real = suspected + a, real + b
    assert callable(figure)
    figure("qcow2 suspicions over undecided disks that are real in some state", f"{real}/{suspected}")
    assert real > 0.9 * suspected


def test_unchanged_contents_raise_no_suspicion() -> None:
    """Rewriting a table with the same entries, and filling a free slot whose refcount is there, is nothing."""
    image = Handmade()
    image.refcount(image.clusters - 1, 1)
    table = bytearray(image.image[image.l2[0] : image.l2[0] + 512])
    table[SLOTS * 8 : SLOTS * 8 + 8] = ((image.clusters - 1) * image.cluster | COPIED).to_bytes(8, "big")
    found = check(SpanDisk(image.image, [(image.l2[0], [bytes(table)])]))
    assert found.problems == []
    assert found.leaks == 1


def test_a_lost_refcount_update_is_seen_and_rests_on_both_sectors() -> None:
    """The classic: the L2 entry may be there while the refcount may not."""
    image = Handmade()
    new = image.clusters - 1
    table = bytearray(image.image[image.l2[0] : image.l2[0] + 512])
    table[SLOTS * 8 : SLOTS * 8 + 8] = (new * image.cluster | COPIED).to_bytes(8, "big")
    block = bytearray(image.image[image.refblock : image.refblock + 512])
    set_refcount(block, 0, 4, new, 1)
    disk = SpanDisk(image.image, [(image.l2[0], [bytes(table)]), (image.refblock, [bytes(block)])])
    found = check(disk)
    slot, count = (image.slot(0, SLOTS), 8), (image.refblock + new * 2, 2)
    assert {p.key: p.rests_on for p in found.problems} == {
        ("structure", "refcount", new): (slot, count),
        ("structure", "copied-flag", slot[0]): (slot, count),
    }
    assert compare(disk) == (2, 2)


@pytest.mark.parametrize("flag", [0, COPIED])
@pytest.mark.parametrize("level", ["L1", "L2"])
def test_every_pair_of_refcounts_against_the_copied_flag(flag: int, level: str) -> None:
    for first in range(4):
        for second in range(4):
            image = Handmade(cluster_bits=10)
            where = image.slot(0, 0) if level == "L2" else image.l1
            image.word(where, image.at(where) & ~COPIED | flag)
            cluster = (image.at(where) & ~COPIED) // image.cluster
            image.refcount(cluster, first)
            block = bytearray(image.image[image.refblock : image.refblock + 512])
            set_refcount(block, 0, 4, cluster, second)
            compare(SpanDisk(image.image, [(image.refblock, [bytes(block)])]))


def test_a_refcount_block_that_is_inside_only_while_an_undecided_entry_reaches_there() -> None:
    """QEMU takes the file for a cluster longer when an unaligned entry ends there."""
    image = Handmade(cluster_bits=10)
    image.word(image.reftable + 8, image.clusters * image.cluster)
    table = bytearray(image.image[image.l2[0] : image.l2[0] + 512])
    table[0:8] = ((image.clusters - 1) * image.cluster + 512 | COPIED).to_bytes(8, "big")
    disk = SpanDisk(image.image, [(image.l2[0], [bytes(table)])])
    kinds = {problem.kind for problem in check(disk).problems}
    assert {"refblock-outside", "refblock-shared"} <= kinds
    compare(disk)


def test_alternates_are_offered_to_the_crash_oracle() -> None:
    image = Handmade()
    second, third = (bytearray(image.image[image.l2[1] : image.l2[1] + 512]) for _ in "ab")
    second[8:16] = bytes(8)
    third[8:16] = (5 * image.cluster | COPIED).to_bytes(8, "big")
    third[16:24] = (1).to_bytes(8, "big")
    mapping = check(SpanDisk(image.image, [(image.l2[1], [bytes(second), bytes(third)])])).mapping
    per_table = image.cluster // 8
    assert mapping.entry[per_table + 1] == image.at(image.slot(1, 1))
    others = sorted(zip(mapping.others.guest.tolist(), mapping.others.entry.tolist(), strict=True))
    assert others == [(per_table + 1, 0), (per_table + 1, 5 * image.cluster | COPIED), (per_table + 2, 1)]
    assert mapping.others.slot.tolist() == [image.slot(1, 1), image.slot(1, 1), image.slot(1, 2)]
    assert mapping.others.bitmap is None


@pytest.mark.parametrize("unit", [1, 2, 8, 16])
@given(st.data())
def test_spans_cut_between_units_lose_nothing(unit: int, data: st.DataObject) -> None:
    """Whatever a unit may hold, one of the cut spans offers, unless it is the first content."""
    length = 48
    first = np.frombuffer(data.draw(st.binary(min_size=length, max_size=length)), dtype=np.uint8)
    cuts = sorted(data.draw(st.sets(st.integers(0, length), min_size=2, max_size=5)))
    spans = []
    for start, stop in zip(cuts[::2], cuts[1::2], strict=False):
        others = data.draw(st.lists(st.binary(min_size=stop - start, max_size=stop - start), min_size=1, max_size=2))
        spans.append(Span(start, stop, np.array([np.frombuffer(o, dtype=np.uint8) for o in others])))
    offered: dict[int, set[bytes]] = defaultdict(set)
    for start, rows in aligned(Variants(first, tuple(spans)), unit):
        assert start % unit == 0
        assert rows.shape[1] % unit == 0
        for row in rows:
            for at in range(0, len(row), unit):
                offered[start + at].add(row[at : at + unit].tobytes())
    choices = [(s.start, [first[s.start : s.stop].tobytes(), *(o.tobytes() for o in s.others)]) for s in spans]
    for unit_at in range(0, length, unit):
        base = first[unit_at : unit_at + unit].tobytes()
        for state in SpanDisk(first.tobytes(), [(at, contents[1:]) for at, contents in choices]).states():
            content = state.bytes[unit_at : unit_at + unit].tobytes()
            assert content == base or content in offered[unit_at]
