"""Which clusters lie in ranges: by a table, or by searching where that would be too large, against the definition."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from powercut.formats.qcow2 import judge

RANGES = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 9)), min_size=1, max_size=8)


@pytest.mark.parametrize("dense", [0, 1 << 24], ids=["searched", "table"])
@given(ranges=RANGES, clusters=st.lists(st.integers(0, 60), max_size=20))
def test_within(dense, ranges, clusters):
    ranges = sorted((begin, begin + length) for begin, length in ranges)
    before, judge._DENSE = judge._DENSE, dense
    try:
        begin, end = np.array(ranges, dtype=np.int64).T
        found = judge._within(np.array(clusters, dtype=np.int64), begin, end)
    finally:
        judge._DENSE = before
    assert found.tolist() == [any(first <= c < last for first, last in ranges) for c in clusters]
