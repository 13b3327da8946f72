"""What the driver does rarely: room for more refcounts, refcounts rebuilt; at every crash inside, and to the end."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from powercut.explore import run
from powercut.explore.session import Plan
from powercut.formats.qcow2.check import check
from powercut.formats.qcow2.driver.create import create
from powercut.formats.qcow2.driver.host import Failing, MemoryFile, Recorded, Until
from powercut.formats.qcow2.driver.host import run as alone
from powercut.formats.qcow2.driver.opening import open_image
from powercut.formats.qcow2.driver.schedule import Together
from powercut.trace import TraceWriter
from powercut.verdict import Verdict

PER_BLOCK, PER_TABLE = 256, 64 * 256  # clusters of 512 bytes that a refcount block counts, and a table of one cluster
ROOM = 10 << 20


def explored(image: bytes, work: Callable[[], Coroutine[Any, Any, None]], trace: Path) -> tuple[Verdict, MemoryFile]:
    """What the crash search says of the structure while `work` runs on `image`, and the file afterwards."""
    file = MemoryFile(image, ROOM)
    with TraceWriter(trace, {}) as writer:
        number = writer.file("image", ROOM, "image")
        writer.base(number, 0, image)
        alone(work(), Recorded(file, writer, number))
    return run.explore_trace(Plan(str(trace), "qcow2", rules=("opens", "structure")), jobs=1).verdict, file


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("edge", [PER_BLOCK, PER_TABLE])
@pytest.mark.parametrize("before", [1, 2, 7, 20])
def test_room_for_more_refcounts_is_made_where_no_crash_can_harm(
    edge: int, before: int, lazy: bool, tmp_path: Path
) -> None:
    async def work() -> None:
        image = await open_image()
        image.refcounts.rewind(edge - before)
        await image.write(0, b"x" * 512 * 16)
        await image.flush_all()
        await image.write(70 * 512, b"y" * 512 * 3)
        await image.close()

    verdict, file = explored(create(1 << 20, cluster_bits=9, lazy=lazy), work, tmp_path / "trace")
    assert verdict is Verdict.HOLDS
    result = check(file, trust_dirty=True)
    assert (result.exit_code, result.problems) == (0, [])
    image = alone(open_image(), file)
    assert alone(image.read(0, 512 * 16), file) == b"x" * 512 * 16
    assert len(image.refcounts.table) > (64 if edge == PER_TABLE else 0)


def test_a_crash_inside_the_rebuilding_of_refcounts_is_rebuilt_again(tmp_path: Path) -> None:
    crashed = MemoryFile(create(1 << 20, cluster_bits=9, lazy=True))
    image = alone(open_image(), crashed)
    alone(image.write(0, b"x" * 100_352), crashed)  # across the edge of a refcount block
    alone(image.flush_all(), crashed)
    assert check(crashed, trust_dirty=True).problems, "a control: the refcounts are wrong"

    async def work() -> None:
        await (await open_image()).close()

    verdict, file = explored(bytes(crashed.content), work, tmp_path / "trace")
    assert verdict is Verdict.HOLDS
    result = check(file, trust_dirty=True)
    assert (result.exit_code, result.dirty) == (0, False)


def test_a_request_that_fails_is_told_and_the_next_succeeds() -> None:
    file = MemoryFile(create(1 << 20, cluster_bits=9))
    for at in range(60):
        failing = Failing(file, at, False, 5)
        errors = 0
        image = alone(open_image(), file)
        for number in range(4):
            try:
                alone(image.write(number * 40_000 // 512 * 512, bytes([at + 1]) * 5120), failing)
                alone(image.flush_all(), failing)
            except OSError:
                errors += 1
        alone(image.close(), file)
        assert errors <= 1
        assert check(file, trust_dirty=True).problems == []


def test_two_requests_that_wait_for_each_other_are_an_error_of_the_driver() -> None:
    async def waits() -> None:
        await Until(lambda: False)

    together = Together(MemoryFile(), 1)
    together.start(waits(), lambda result, error: None)
    with pytest.raises(AssertionError, match="waits for another"):
        together.drain()
