"""Which leaf holds what, and where two disks differ, against the bytes themselves."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from powercut.crash.store import in_memory
from quire.extents import differences, extents
from quire.layout import BLOCK
from quire.sets import Set

BLOCKS = 12
SIZES = (6 * BLOCK, 9 * BLOCK + 512, BLOCKS * BLOCK)
block = st.integers(0, BLOCKS - 1)
step = st.one_of(
    st.tuples(st.just("write"), block, st.integers(1, 4)),
    st.tuples(st.just("zero"), block, st.integers(1, 4)),
    st.tuples(st.just("snapshot"), st.just(0), st.just(0)),
    st.tuples(st.just("resize"), st.sampled_from(SIZES), st.just(0)),
)


def whole(image) -> bytes:
    return bytes(image.read(0, image.size))


@given(plan=st.lists(step, max_size=12))
def test_extents_and_differences_are_what_the_bytes_say(plan):
    with Set.create(in_memory(), BLOCKS * BLOCK, slots=4) as quire:
        image = quire.image("main")
        quire.snapshot("main", "first")
        for number, (what, place, count) in enumerate(plan):
            offset = place * BLOCK
            length = min(count * BLOCK, image.size - offset)
            if what == "snapshot":
                quire.snapshot("main", f"s{number}")
            elif what == "resize":
                quire.resize("main", place)
            elif length > 0 and what == "write":
                image.write(offset, bytes([number % 3 + 1]) * length)
            elif length > 0:
                image.zero(offset, length)
        content = whole(image)
        found = list(extents(image.leaf))
        assert [one.offset for one in found] == [0, *(one.end for one in found[:-1])]
        assert found[-1].end == image.size
        assert all(one.owner is not other.owner for one, other in itertools.pairwise(found))
        for one in found:
            held = bytes(one.length) if one.owner is None else bytes(one.owner.read(one.offset, one.length))
            assert held == content[one.offset : one.end]
        for name in (name for name, value in quire.manifest.names.items() if not value.writable):
            other = quire.image(name)
            size = max(image.size, other.size)
            left, right = content.ljust(size, b"\0"), whole(other).ljust(size, b"\0")
            expected = {
                place for place in range(0, size, BLOCK) if left[place : place + BLOCK] != right[place : place + BLOCK]
            }
            ranges = list(differences(other.leaf, image.leaf))
            assert {place for offset, length in ranges for place in range(offset, offset + length, BLOCK)} == expected
            assert all(sum(one) < other_one[0] for one, other_one in itertools.pairwise(ranges))
            assert ranges == list(differences(image.leaf, other.leaf))
