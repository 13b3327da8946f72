"""Media faults on every structure of a set: served from the other copy and mended, or refused; never wrong data."""

from __future__ import annotations

from collections import Counter

import pytest

from support.shelf import Shelf, both_copies, one_copy


@pytest.fixture(scope="module")
def shelf() -> Shelf:
    return Shelf()


def test_one_bad_copy_is_served_from_the_other_and_mended(shelf, figure):
    found = list(one_copy(shelf))
    assert [wrong for wrong in found if wrong] == []
    assert len(found) > 100
    figure("quire, one copy struck", f"{len(found)} faults, each served from the other copy and mended")


def test_two_bad_copies_are_refused_or_harmless(shelf, figure):
    found = list(both_copies(shelf))
    assert [wrong for _, wrong in found if wrong] == []
    counts = Counter(what for what, _ in found)
    assert counts["refused"] > 100
    figure("quire, both copies struck", ", ".join(f"{count} {what}" for what, count in counts.most_common()))
