"""A guest that repeats what failed, on a disk in memory that fails as it likes: an honest one is never accused, one
that drops a write is found."""

from __future__ import annotations

import random

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from powercut.guest.expectation import Expectation
from powercut.guest.stubborn import Seen, Stubborn
from powercut.guest.workload import Operation, draw
from powercut.oracles.readback import first_wrong
from powercut.stamp import SECTOR
from powercut.trace import Kind

SIZE = 16 * SECTOR


class Flaky:
    """Answers in any order. A request that fails lands, or not, sector by sector. What was not flushed is lost in the
    end, or not, sector by sector. `drops`: the number of an operation that is acknowledged and not done; `honest` is
    what the disk would hold with it."""

    def __init__(self, seed: int, failing: float, drops: int = 0) -> None:
        self.chance, self.failing, self.drops = random.Random(seed), failing, drops
        self.now, self.flushed, self.honest = bytearray(SIZE), bytearray(SIZE), bytearray(SIZE)
        self.queue: list[tuple[int, Operation, bytes]] = []
        self.most = 0

    def submit(self, tag: int, operation: Operation, data: bytes) -> None:
        self.queue.append((tag, operation, data))
        self.most = max(self.most, len(self.queue))

    def wait(self) -> tuple[int, int]:
        tag, operation, data = self.queue.pop(self.chance.randrange(len(self.queue)))
        failed = self.chance.random() < self.failing
        if operation.kind is Kind.FLUSH:
            if not failed:
                self.flushed[:] = self.now
        else:
            data = data or bytes(operation.length)
            for at in range(0, operation.length, SECTOR):
                hint = operation.kind is Kind.DISCARD
                if not (failed or hint) or self.chance.random() < 0.5:
                    place = operation.offset + at
                    self.honest[place : place + SECTOR] = data[at : at + SECTOR]
                    if tag != self.drops:
                        self.now[place : place + SECTOR] = data[at : at + SECTOR]
        return tag, 5 if failed else 0

    def after(self) -> bytes:
        """What is there once power was lost."""
        sectors = np.frombuffer(bytes(self.now + self.flushed), dtype=np.uint8).reshape(2, -1, SECTOR)
        return b"".join(sectors[self.chance.randrange(2), n].tobytes() for n in range(SIZE // SECTOR))


def run(seed: int, failing: float, depth: int, drops: int = 0) -> tuple[Flaky, Expectation, Seen]:
    work = list(draw(seed, 12, SIZE, ("zero", "discard")))
    borders = [end for op in work for end in (op.offset, op.offset + op.length)]
    disk, expectation, seen = Flaky(seed, failing, drops), Expectation(SIZE, borders), Seen()
    Stubborn(disk, expectation, seen, depth=depth).run(work, 1)
    assert not disk.queue
    return disk, expectation, seen


@given(st.integers(0, 1 << 32), st.sampled_from([0.0, 0.2, 0.6, 1.0]), st.sampled_from([1, 4]))
def test_an_honest_disk_is_never_accused(seed: int, failing: float, depth: int) -> None:
    disk, expectation, seen = run(seed, failing, depth)
    assert first_wrong(disk.now, 0, expectation.now) is None
    assert first_wrong(disk.after(), 0, expectation.kept) is None
    assert disk.most <= depth
    if not failing:
        assert (seen.errors, seen.given_up) == (0, [])
    if failing == 1:
        assert not any(word.endswith(("done", "flushed")) for word in seen.story)


def test_a_disk_that_drops_a_write_is_found_wherever_it_shows(planted) -> None:
    shown = 0
    for seed in range(60):
        for drops in range(1, 13):
            disk, expectation, _ = run(seed, 0.2, 4, drops)
            bad = any(
                len(legal) == 1 and disk.now[low:high] != disk.honest[low:high] for low, high, legal in expectation.now
            )
            shown += bad
            found = first_wrong(disk.now, 0, expectation.now) is not None
            assert found or not bad
            assert disk.now != disk.honest or not found
    planted("a disk that drops a write", shown > 50)
    assert shown > 50
