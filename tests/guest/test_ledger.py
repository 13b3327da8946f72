"""What a guest's disk may hold, against the definition, sector by sector; and sectors read from a raw image."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from powercut import stamp
from powercut.guest.ledger import MISDIRECTED, Keeps, Ledger, read
from powercut.guest.workload import Operation
from powercut.stamp import GARBAGE, ZERO
from powercut.trace import SECTOR, Kind

SECTORS = 4
KINDS = [Kind.WRITE, Kind.WRITE, Kind.ZERO, Kind.DISCARD, Kind.FLUSH]


@dataclass
class Known:
    """An operation as the definition sees it; times are positions in the history."""

    operation: Operation
    issued: int
    done: int | None = None
    error: int = 0


@st.composite
def histories(draw: st.DrawFn) -> list[Known]:
    """Operations that were issued and answered in some order, none while another on its sectors is in flight."""
    known: list[Known] = []
    flying: list[Known] = []
    for time in range(draw(st.integers(1, 16))):
        if flying and draw(st.booleans()):
            answered = flying.pop(draw(st.integers(0, len(flying) - 1)))
            answered.done, answered.error = time, draw(st.sampled_from([0, 0, 0, 5]))
            continue
        kind = draw(st.sampled_from(KINDS))
        first = draw(st.integers(0, SECTORS - 1))
        last = draw(st.integers(first + 1, SECTORS))
        operation = (
            Operation(kind, first * SECTOR, (last - first) * SECTOR) if kind is not Kind.FLUSH else Operation(kind)
        )
        end = operation.offset + operation.length
        busy = any(
            o.operation.offset < end and operation.offset < o.operation.offset + o.operation.length for o in flying
        )
        if not busy:
            known.append(Known(operation, time))
            flying.append(known[-1])
    return known


def legal(known: list[Known], sector: int, keeps: Keeps) -> set[int]:
    """Every content of `sector` that the guest was promised, by definition."""
    flushes = [k for k in known if k.operation.kind is Kind.FLUSH and k.done is not None and not k.error]

    def sure(k: Known) -> bool:
        if k.done is None or k.error:
            return False
        return keeps is Keeps.COMPLETED or any(k.done < flush.issued for flush in flushes)

    contents = {ZERO}
    for number, k in enumerate(known, 1):
        where = range(k.operation.offset // SECTOR, (k.operation.offset + k.operation.length) // SECTOR)
        if sector not in where:
            continue
        new = number if k.operation.kind is Kind.WRITE else ZERO
        contents = {new} if sure(k) and k.operation.kind is not Kind.DISCARD else contents | {new}
    return contents


@given(histories(), st.sampled_from(Keeps))
def test_exactly_what_was_promised_is_legal(known: list[Known], keeps: Keeps) -> None:
    ledger = Ledger(SECTORS)
    times = [(k.issued, number, k) for number, k in enumerate(known, 1)]
    times += [(k.done, number, k) for number, k in enumerate(known, 1) if k.done is not None]
    for time, number, k in sorted(times, key=lambda item: item[:2]):
        if time == k.issued:
            ledger.issue(number, k.operation)
        else:
            ledger.complete(number, k.error)
    writes = [number for number, k in enumerate(known, 1) if k.operation.kind is Kind.WRITE]  # only these leave stamps
    for content in [ZERO, GARBAGE, MISDIRECTED, *writes]:
        problems = ledger.judge(np.full(SECTORS, content, dtype=np.int64), keeps)
        bad = {problem.where for problem in problems}
        assert bad == {sector for sector in range(SECTORS) if content not in legal(known, sector, keeps)}, content


def test_what_was_looked_at_is_certain_from_then_on() -> None:
    ledger = Ledger(SECTORS, initial=0)
    ledger.issue(1, Operation(Kind.WRITE, 0, SECTOR))
    before, after = np.zeros(SECTORS, dtype=np.int64), np.array([1, 0, 0, 0])
    assert not ledger.judge(before, Keeps.COMPLETED)
    assert not ledger.judge(after, Keeps.COMPLETED)
    ledger.settle(after)
    (problem,) = ledger.judge(before, Keeps.FLUSHED)
    assert (problem.kind, problem.where) == ("stale", 0)
    (problem,) = ledger.judge(np.array([1, ZERO, 0, 0]), Keeps.FLUSHED)
    assert (problem.kind, problem.where) == ("zeros", 1)


def test_sectors_of_a_raw_image(tmp_path: Path) -> None:
    path = tmp_path / "raw"
    with open(path, "wb") as out:
        out.truncate(1 << 20)
        out.seek(512 * SECTOR)
        out.write(stamp.make(9, 0, 512, 2) + stamp.make(9, 0, 7, 1) + b"x" * SECTOR)
    held = read(path, 2048)
    assert held[510:517].tolist() == [ZERO, ZERO, 9, 9, MISDIRECTED, GARBAGE, ZERO]
    assert (read(path, 2050)[-2:] == GARBAGE).all(), "the file is too short for the disk"
