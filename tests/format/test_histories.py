"""Histories nobody wrote: all short ones over a small alphabet. Long ones are drawn in test_machine.py."""

from __future__ import annotations

import itertools
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from powercut.stores import explore_store
from powercut.verdict import Verdict
from support.quires import MEMORY, RECORDS, after, recorded

# Two writes into one block (the rest is taken along, or torn), a discard of it, and what makes it durable, freezes it,
# or kills the writer. The journal has four slots: four lines reach a checkpoint.
ALPHABET = (
    "write main 0 512",
    "write main 512 512",
    "discard main 0 4k",
    "flush main",
    "snapshot main s{}",
    "kill main",
)


def all_of(longest: int) -> Iterator[list[str]]:
    """All histories of up to so many lines, the shorter ones first."""
    for length in range(1, longest + 1):
        for chosen in itertools.product(ALPHABET, repeat=length):
            names = itertools.count()
            yield [line.format(next(names)) if "{}" in line else line for line in chosen]


@pytest.mark.parametrize(
    ("longest", "records", "depth"),
    [
        (2, "C", 0),
        (2, "P", 0),
        *(pytest.param(5, records, 0, marks=pytest.mark.slow) for records in RECORDS),
        *(pytest.param(2, records, 1, marks=pytest.mark.slow) for records in RECORDS),
    ],
)
def test_every_short_history(tmp_path, figure, longest, records, depth):
    """What a crash in the last line of a history, or while the set is closed after it, may leave: a crash before is one
    in a shorter history. What many histories may leave is judged once."""
    total, count, known = Counter[str](), 0, set[bytes]()
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        for history in all_of(longest):
            trace, judge = recorded(Path(folder), history, RECORDS[records], range(2))
            last = after(trace, len(history) - 1)
            outcome = explore_store(trace, judge, depth=depth, positions=last, known=known)
            assert outcome.verdict is Verdict.HOLDS, (history, [*map(str, outcome.findings)], outcome.reasons)
            total.update(outcome.coverage)
            count += 1
    levels = ", and inside the recovery" if depth else ""
    figure(
        f"quire, all histories of up to {longest} lines{levels}, {records} records",
        f"{count:,} histories, {total['epochs']:,} epochs, {total['alike']:,} sets of states like others, "
        f"2^{total['log2_states']:,.0f} crash states in {total['checks']:,} checks",
    )
