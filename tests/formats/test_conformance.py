"""The conformance suite on every format; and controls that break one rule each, which it must notice."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from formats.conformance import SIZE, Step, conforms, histories
from formats.subjects import SLOW, SUBJECTS, WITHOUT_SNAPSHOTS, Model
from powercut import formats
from powercut.formats.qcow2.driver.opening import open_image
from support.qemu import needs_qemu

# Every kind of step, with writes that overlap, that share clusters with what a snapshot keeps, and that end the disk.
TOUR: list[Step] = [
    ("write", 0, 200, "a"), ("flush", 0, 1, "a"), ("take", 0, 1, "a"), ("write", 100, 3, "a"), ("zero", 50, 100, "a"),
    ("reopen", 0, 1, "a"), ("write", 1000, 100, "a"), ("discard", 0, 400, "a"), ("take", 0, 1, "b"),
    ("write", 7, 300, "a"), ("apply", 0, 1, "a"), ("write", 3, 5, "a"), ("reopen", 0, 1, "a"), ("drop", 0, 1, "a"),
    ("apply", 0, 1, "b"), ("discard", 1090, 10, "a"), ("zero", 1099, 1, "a"), ("write", 128, 64, "a"),
]  # fmt: skip


def _mark(name: str) -> Any:
    return pytest.param(name, marks=needs_qemu) if name in SLOW else name


def test_every_format_is_a_subject() -> None:
    assert set(formats.NAMES) <= SUBJECTS.keys()


@pytest.mark.parametrize("name", [_mark(name) for name in SUBJECTS])
def test_a_tour(name: str, tmp_path: Path) -> None:
    without = name in WITHOUT_SNAPSHOTS
    steps = [step for step in TOUR if not (without and step[0] in ("take", "apply", "drop"))]
    conforms(SUBJECTS[name](tmp_path, SIZE), steps)


@settings(max_examples=15)
@given(st.data())
@pytest.mark.parametrize("name", [name for name in SUBJECTS if name not in SLOW])
def test_histories(name: str, data: st.DataObject) -> None:
    conforms(SUBJECTS[name](Path(), SIZE), data.draw(histories(True)))


@needs_qemu
@settings(max_examples=3)
@given(st.data())
@pytest.mark.parametrize("name", [name for name in SUBJECTS if name in SLOW])
def test_histories_of_qemu(name: str, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        steps = data.draw(histories(name not in WITHOUT_SNAPSHOTS, 12))
        conforms(SUBJECTS[name](Path(folder), SIZE), steps)


class LosesAWrite(Model):
    def write(self, offset: int, data: bytes) -> None:
        if offset != 100 * 512:
            super().write(offset, data)


class ZeroesTooLittle(Model):
    def zero(self, offset: int, length: int) -> None:
        if length > 512:
            super().zero(offset, length - 512)


class DiscardsIntoGarbage(Model):
    def discard(self, offset: int, length: int) -> None:
        self.write(offset, b"?" * length)


class ForgetsWhenClosed(Model):
    """What was not flushed before closing is gone."""

    def flush(self) -> None:
        super().flush()
        self._kept = bytes(self._file.content)

    def reopen(self) -> None:
        super().reopen()
        self._file.content[:] = self._kept
        self._image = self._do(open_image())


class SnapshotsOfNothing(Model):
    def apply(self, name: str) -> None:
        pass


class LeavesLeaks(Model):
    def close(self) -> str:
        return super().close() or "1 leak"


CONTROLS = [LosesAWrite, ZeroesTooLittle, DiscardsIntoGarbage, ForgetsWhenClosed, SnapshotsOfNothing, LeavesLeaks]


@pytest.mark.parametrize("control", CONTROLS)
def test_controls(control: type[Model], planted: Callable[[str, bool], None]) -> None:
    found = True
    try:
        conforms(control(SIZE, 12, 3, False), TOUR)
        found = False
    except AssertionError:
        pass
    planted(f"conformance: {control.__name__}", found)
    assert found
