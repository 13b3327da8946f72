"""Histories nobody wrote: all short ones over a small alphabet, and long ones that hypothesis draws and shrinks."""

from __future__ import annotations

import itertools
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from powercut.crash.model import epochs
from powercut.stores import explore_store
from powercut.trace import Trace
from powercut.verdict import Verdict
from support.quires import RECORDS, SIZE, after, recorded

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
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
_LAST = 2  # epochs explored of a long history, from its end
_CHECKS = 400  # for each of them


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


@st.composite
def a_history(draw: st.DrawFn) -> list[str]:
    """Lines that make sense one after the other."""
    heads, snapshots = {"main": SIZE}, dict[str, int]()
    lines = []
    for number in range(draw(st.integers(3, 14))):
        head = draw(st.sampled_from(sorted(heads)))
        sector = draw(st.integers(0, heads[head] // 512 - 1))
        count = draw(st.integers(1, min(3, heads[head] // 512 - sector)))
        kinds = ["write", "write", "write fua", "zero", "discard", "flush", "reopen", "kill", "race"]
        kinds += ["snapshot", "resize"]
        if snapshots:
            kinds += ["clone", "revert", "rename", "delete"]
        what = draw(st.sampled_from(kinds))
        place = f"{head} {sector * 512} {count * 512}"
        if what in ("write", "zero", "race"):
            lines.append(f"{what} {place}")
        elif what == "write fua":
            lines.append(f"write {place} fua")
        elif what == "discard":
            lines.append(f"discard {head} {sector // 8 * 4096} {min(4096, heads[head] - sector // 8 * 4096)}")
        elif what in ("flush", "kill"):
            lines.append(f"{what} {head}")
        elif what == "reopen":
            lines.append(what)
        elif what == "resize":
            heads[head] = 512 * draw(st.integers(1, 48))
            lines.append(f"resize {head} {heads[head]}")
        elif what == "snapshot":
            snapshots[f"n{number}"] = heads[head]
            lines.append(f"snapshot {head} n{number}")
        else:
            snapshot = draw(st.sampled_from(sorted(snapshots)))
            if what == "clone":
                heads[f"n{number}"] = snapshots[snapshot]
                lines.append(f"clone {snapshot} n{number}")
            elif what == "revert":
                heads[head] = snapshots[snapshot]
                lines.append(f"revert {head} {snapshot}")
            elif what == "rename":
                snapshots[f"n{number}"] = snapshots.pop(snapshot)
                lines.append(f"rename {snapshot} n{number}")
            else:
                gone = head if len(heads) > 1 and draw(st.booleans()) else snapshot
                heads.pop(gone, None)
                snapshots.pop(gone, None)
                lines.append(f"delete {gone}")
    return lines


def drawn(history: list[str], records: str) -> None:
    """A sample where an epoch is too wide: no verdict then, but nothing may be broken."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        trace, judge = recorded(Path(folder), history, RECORDS[records], range(2))
        last = epochs(Trace(trace))[-_LAST:]
        outcome = explore_store(trace, judge, depth=0, positions=last, budget=_CHECKS * len(last))
        assert outcome.verdict is not Verdict.BROKEN, "\n".join(map(str, outcome.findings))


@pytest.mark.parametrize("records", RECORDS)
def test_drawn_histories(records):
    settings(max_examples=8)(given(a_history())(lambda history: drawn(history, records)))()


@pytest.mark.slow
@pytest.mark.parametrize("records", RECORDS)
def test_many_drawn_histories(records):
    settings(max_examples=400)(given(a_history())(lambda history: drawn(history, records)))()
