"""Loss that `qemu-img check` calls harmless leaks, and tables over the header: told, and mended where that can be."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from formats.qcow2.damaged import OVER_HEADER, content, l2_over_header, overwrite, seen, truth
from formats.qcow2.images import Mutator, Shape, make, needs_qemu, qemu_check, qemu_img, qemu_io, recipes
from powercut.errors import InputError
from powercut.inspection import inspect
from powercut.rescue import Known, rescue

pytestmark = needs_qemu

MIB = 1 << 20


def image(path: Path, shape: Shape, *steps: str, size: str = "8M") -> Path:
    """Steps are commands of qemu-io, or the name of a snapshot to take."""
    assert shape.create(path, 8 * MIB)
    for step in steps:
        if " " in step:
            qemu_io(path, step)
        else:
            assert qemu_img("snapshot", "-c", step, path)
    return path


SHARED = ("write -P 1 0 64k", "write -P 2 4M 64k", "one", "write -P 3 0 4k")


def rescued(path: Path) -> tuple[int, str, Path]:
    saved = path.with_name("saved.qcow2")
    result = rescue(str(path), str(saved), Known())
    assert qemu_check(saved).exit_code == 0, result.text
    return result.exit_code, result.text, saved


def test_a_zeroed_l2_table(tmp_path: Path, planted: Callable[[str, bool], None]) -> None:
    path = image(tmp_path / "a.qcow2", Shape(3, 4096), "write -P 1 0 256k", "write -P 2 4M 256k")
    assert inspect(str(path), None).exit_code == 0
    m = Mutator(path.read_bytes())
    overwrite(path, bytes(4096), m.l2[0])
    assert qemu_check(path).exit_code == 3, "qemu-img check sees leaks and nothing else"
    told = inspect(str(path), None)
    planted("a zeroed L2 table that qemu-img check calls leaks", told.exit_code == 1)
    assert told.exit_code == 1
    assert [loss["kind"] for loss in told.document["suspicions"]] == ["unmapped-data"]
    assert "64 clusters of data belong to nothing" in told.text
    code, text, _ = rescued(path)
    assert code == 1
    assert "lost       lost entry: the L2 table at" in text


def test_the_newest_leaks_are_a_faint_suspicion(tmp_path: Path) -> None:
    """A table that a crash kept from being filled looks so: it is said, and is no damage."""
    path = image(tmp_path / "a.qcow2", Shape(3, 4096), "write -P 1 0 256k", "write -P 2 4M 256k")
    m = Mutator(path.read_bytes())
    overwrite(path, bytes(4096), m.l2[1])
    told = inspect(str(path), None)
    assert told.exit_code == 0
    assert "clean, but for leaks" in told.text
    assert "unless it crashed: the L2 table at" in told.text
    assert [loss["faint"] for loss in told.document["suspicions"]] == [True]


def test_a_zeroed_l2_table_that_a_snapshot_knows(tmp_path: Path) -> None:
    """The clusters that the snapshot shares come back; the one written since does not."""
    path = image(tmp_path / "a.qcow2", Shape(3, 4096), *SHARED)
    expected = content(path)
    m = Mutator(path.read_bytes())
    overwrite(path, bytes(4096), m.l2[0])
    assert inspect(str(path), None).exit_code == 1
    code, text, saved = rescued(path)
    assert code == 1, "the first cluster is lost"
    assert content(saved) == bytes(4096) + expected[4096:], text


@pytest.mark.parametrize("header", ["there", "gone"])
def test_a_lost_l1_table(header: str, tmp_path: Path, planted: Callable[[str, bool], None]) -> None:
    """What is shared comes back by its refcount, what is not by its likeness to the snapshot's table."""
    path = image(tmp_path / "a.qcow2", Shape(3, 4096), *SHARED)
    expected = truth(path)
    m = Mutator(path.read_bytes())
    overwrite(path, bytes(4096), m.l1)
    if header == "gone":
        overwrite(path, bytes(4096))
    told = inspect(str(path), None)
    planted("a zeroed L1 table", told.exit_code == 1)
    assert told.exit_code == 1
    code, text, saved = rescued(path)
    assert code == 0, text
    assert seen(saved) == expected, text


def test_leaks_of_a_crash_are_no_suspicion(tmp_path: Path) -> None:
    """Data that was never flushed leaks when QEMU is killed: nothing was promised."""
    path = image(tmp_path / "a.qcow2", Shape(3, 4096), "write -P 1 0 64k")
    whole = bytearray(path.read_bytes())
    m = Mutator(bytes(whole))
    whole += b"\5" * 8192
    end = len(whole) // 4096
    for cluster in (end - 2, end - 1):
        struct.pack_into(">H", whole, m.blocks[0] + 2 * cluster, 1)
    path.write_bytes(whole)
    assert qemu_check(path).exit_code == 3
    assert inspect(str(path), None).exit_code == 0


@pytest.mark.parametrize("after", [False, True], ids=["copied", "snapshot-after"])
@pytest.mark.parametrize("patched", [False, True], ids=["plain", "patched"])
def test_l2_over_the_header(patched: bool, after: bool, tmp_path: Path, planted: Callable[[str, bool], None]) -> None:
    """As in 2009, with the snapshot count and offset patched into the table or not."""
    path = image(tmp_path / "a.qcow2", Shape(2, 4096), *SHARED)
    expected = truth(path)
    l2_over_header(path, patched=patched, snapshot_after=after)
    told = inspect(str(path), None)
    assert told.document["offset_zero"]["kind"] == "l2-table"
    assert ("bytes 60 to 71 hold the snapshot count" in told.text) == patched
    planted(f"an L2 table over the header, {patched=}, {after=}", True)
    code, text, saved = rescued(path)
    assert code == 0, text
    assert seen(saved) == expected, text


def test_entries_overwritten_by_the_header_are_lost_if_nothing_tells(tmp_path: Path) -> None:
    """Written far from their neighbours and shared with nobody, they cannot be told."""
    writes = [f"write -P {7 + slot} {slot * 4}k 4k" for slot in (3, 7, 0, 8, 5, 1, 6, 9, 2, 4)]
    path = image(tmp_path / "a.qcow2", Shape(2, 4096), "write -P 2 4M 4k", "one", *writes)
    expected = content(path)
    l2_over_header(path, patched=True)
    code, text, saved = rescued(path)
    assert code == 1
    assert text.count("nothing tells what it was") == 2, text
    assert content(saved) == expected[: 7 * 4096] + bytes(8192) + expected[9 * 4096 :]


def test_mutated_images(tmp_path: Path, figure: Callable[[str, object], None]) -> None:
    """Whatever is in the file: no traceback, and what comes out is accepted by `qemu-img check`."""
    bases = []
    for shape in (Shape(2, 4096), Shape(3, 512), Shape(3, 16384, extended_l2=True), Shape(3, 4096, lazy=True)):
        for recipe in ("compressed", "snapshots"):
            path = tmp_path / f"{shape.name}-{recipe}.qcow2"
            assert make(path, shape, recipe, 1)
            bases.append(path.read_bytes())
    assert {"compressed", "snapshots"} <= set(recipes())
    codes = {0: 0, 1: 0, 2: 0}
    for number in range(100):
        rng = random.Random(number)
        image = Mutator(rng.choice(bases)).mutate(rng)
        if rng.random() < 0.6:
            over = OVER_HEADER[rng.choice(sorted(OVER_HEADER))][: rng.choice((4, 8, 72, 512, 4096))]
            image = over + image[len(over) :]
        path, saved = tmp_path / "mutated.qcow2", tmp_path / "saved.qcow2"
        path.write_bytes(image)
        saved.unlink(missing_ok=True)
        assert inspect(str(path), "qcow2").exit_code in (0, 1)
        try:
            code = rescue(str(path), str(saved), Known()).exit_code
        except InputError:
            code = 2
        codes[code] += 1
        if code != 2:
            outcome = qemu_check(saved)
            needs_more = "backing file" in outcome.message or "encrypt" in outcome.message
            assert outcome.exit_code == 0 or needs_more, f"{number}: {outcome}"
    figure("mutated images rescued", f"{codes[0]} whole, {codes[1]} with losses, {codes[2]} refused")
    assert codes[0]
    assert codes[1]
