"""What a sector may hold while requests overlap, against every order in which the requests may have taken place."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from powercut import stamp
from powercut.oracles.overlapping import Judge
from powercut.stamp import SECTOR, ZERO


@dataclass
class Asked:
    kind: str
    offset: int = 0
    length: int = SECTOR


@dataclass
class Entry:
    number: int
    operation: Asked
    issued: int
    completed: int | None


@st.composite
def logs(draw):
    """Up to four changes of one sector and a read of it, begun and ended in any order."""
    kinds = draw(st.lists(st.sampled_from(["write", "zero", "unmap", "discard"]), max_size=4))
    times = draw(st.permutations(range(2 * len(kinds) + 2)))
    spans = [tuple(sorted(times[i : i + 2])) for i in range(0, len(times), 2)]
    log = [Entry(n, Asked(kind), *spans[n]) for n, kind in enumerate(kinds, 1)]
    order = sorted(log, key=lambda entry: entry.issued)
    for number, entry in enumerate(order, 1):
        entry.number = number
    return order, spans[0]


def outcomes(log, read) -> set[int]:
    """The values of the sector at the read, over all orders that agree with what ended before what began."""
    found = set()
    everything = [*log, Entry(0, Asked("read"), *read)]
    for order in itertools.permutations(everything):
        if any(b.completed < a.issued for a, b in itertools.combinations(order, 2)):
            continue
        values = {0}
        for entry in order:
            if entry.operation.kind == "read":
                break
            what = entry.number if entry.operation.kind == "write" else ZERO
            values = values | {what} if entry.operation.kind == "discard" else {what}
        found |= values
    return found


@given(logs())
def test_the_rule_is_every_order_of_the_operations(drawn):
    log, read = drawn
    assert Judge(SECTOR, lambda offset: 0, (), log).legal(0, *read) == outcomes(log, read)


def test_each_kind_of_fault_is_told(planted):
    log = [Entry(1, Asked("write", 0, 4 * SECTOR), 1, 2)]
    judge = Judge(8 * SECTOR, lambda offset: ZERO, (), log)
    right = bytes(stamp.make(1, 0, 0, 4))
    assert judge.fault("disk", 0, right + bytes(4 * SECTOR), 3, 3) is None
    wrong = {
        "zeros": bytes(SECTOR) + right[SECTOR:],
        "garbage": b"x" * SECTOR + right[SECTOR:],
        "stale": bytes(stamp.make(0, 0, 0, 4)),
        "foreign": right[SECTOR:] + bytes(stamp.make(1, 0, 4, 1)),
    }
    for kind, data in wrong.items():
        fault = judge.fault("disk", 0, data + bytes(4 * SECTOR), 3, 3)
        told = fault and fault.kind
        planted(f"a guest's sector that holds {kind}", told == f"disk-{kind}")
        assert told == f"disk-{kind}", fault
