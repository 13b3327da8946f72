"""What a guest may expect, held against every disk that could have come of it, computed straight from the rules."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from powercut.guest.expectation import Expectation
from powercut.oracles.readback import first_wrong
from powercut.stamp import SECTOR, ZERO, make

SECTORS = 4

# A request: write, zero or discard of some sectors, which fails so often and then succeeds or not; or a flush (None).
Request = tuple[str, int, int, int, bool] | None


def requests() -> st.SearchStrategy[list[Request]]:
    place = st.integers(0, SECTORS - 1).flatmap(lambda a: st.tuples(st.just(a), st.integers(a + 1, SECTORS)))
    one = st.builds(
        lambda kind, where, fails, ends: (kind, *where, fails, ends),
        st.sampled_from(["write", "write", "zero", "discard"]), place, st.integers(0, 2), st.booleans(),
    )  # fmt: skip
    return st.lists(st.one_of(one, one, st.none()), max_size=8)


def possible(work: list[Request], sector: int) -> tuple[set[int], set[int]]:
    """What a sector may hold while the disk is there, and after it went away: each attempt took effect or not, and
    nothing that was flushed is undone."""
    live, kept = {ZERO}, {ZERO}
    for number, request in enumerate(work, 1):
        if request is None:
            kept = set(live)
            continue
        kind, low, high, fails, ends = request
        if not low <= sector < high:
            continue
        value = number if kind == "write" else ZERO
        for attempt in range(fails + ends):
            certain = attempt == fails and kind != "discard"
            live = {value} if certain else live | {value}
            kept |= {value}
    return live, kept


@given(requests())
def test_legal_is_what_the_rules_make_possible(work: list[Request]) -> None:
    borders = [end * SECTOR for request in work if request for end in request[1:3]]
    expectation = Expectation(SECTORS * SECTOR, borders)
    for number, request in enumerate(work, 1):
        if request is None:
            expectation.flushed()
            continue
        kind, low, high, fails, ends = request
        where, value = (low * SECTOR, (high - low) * SECTOR), number if kind == "write" else ZERO
        for _ in range(fails + ends):
            expectation.tried(*where, value)
        if ends and kind != "discard":
            expectation.done(*where, value)
    for ranges, which in ((expectation.now, 0), (expectation.kept, 1)):
        for sector in range(SECTORS):
            legal = next(set(ops) for low, high, ops in ranges if low <= sector * SECTOR < high)
            assert legal == possible(work, sector)[which]


def test_what_is_read_back_is_judged_sector_by_sector(planted) -> None:
    size = SECTORS * SECTOR
    ranges = [(0, 2 * SECTOR, {1}), (2 * SECTOR, size, {ZERO, 2})]
    good = bytearray(make(1, 0, 0, 2) + bytes(SECTOR) + make(2, 0, 3, 1))
    assert first_wrong(good, 0, ranges) is None
    spoilt = {"zeros": (1, bytes(SECTOR)), "stale": (1, make(2, 0, 1, 1)), "foreign": (3, make(2, 0, 2, 1))}
    for kind, (sector, data) in {**spoilt, "garbage": (2, b"x" * SECTOR)}.items():
        bad = bytearray(good)
        bad[sector * SECTOR : (sector + 1) * SECTOR] = data
        wrong = first_wrong(bad, 0, ranges)
        planted(f"read back: {kind}", wrong is not None and wrong.kind == kind)
        assert wrong is not None
        assert (wrong.kind, wrong.sector) == (kind, sector)


def test_what_a_backing_file_covers_held_something_before() -> None:
    expectation = Expectation(SECTORS * SECTOR, [], covered=2 * SECTOR)
    assert [set(ops) for _, _, ops in expectation.now] == [{0}, {ZERO}]
