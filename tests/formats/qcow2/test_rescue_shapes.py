"""Images of any shape and history lose their header, and come back: nothing in them is lost, and nothing made up."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from formats.qcow2.damaged import OVER_HEADER, overwrite, seen, truth
from formats.qcow2.images import Shape, needs_qemu, qemu_check, qemu_img, qemu_io
from powercut.rescue import Known, rescue

pytestmark = needs_qemu

SIZE = 8 << 20

SHAPES = [
    *(Shape(2, cluster) for cluster in (512, 1024, 4096, 65536, 2 << 20)),
    *(Shape(3, cluster) for cluster in (512, 2048, 4096, 16384, 65536, 1 << 20)),
    *(Shape(3, 4096, bits) for bits in (8, 32, 64)),
    Shape(3, 65536, 8),
    Shape(3, 16384, extended_l2=True),
    Shape(3, 65536, extended_l2=True),
    Shape(3, 4096, lazy=True),
    Shape(2, 4096, backing=True),
    Shape(3, 65536, backing=True),
]


@dataclass(frozen=True)
class History:
    shape: Shape
    steps: tuple[str, ...]  # commands of qemu-io, or "snapshot", "apply", "delete"
    over: str  # what overwrites the header
    length: int


def write() -> st.SearchStrategy[str]:
    verbs = st.sampled_from(["write -P 7", "write -P 9", "write", "write -z", "write -z -u", "discard"])
    starts, lengths = st.integers(0, SIZE // 4096 - 1), st.sampled_from([512, 4096, 65536, 1 << 20])
    return st.builds(lambda v, s, n: f"{v} {s * 4096} {min(n, SIZE - s * 4096)}", verbs, starts, lengths)


def compressed() -> st.SearchStrategy[str]:
    return st.builds(lambda s: f"write -c -P 5 {s << 16} 65536", st.integers(0, SIZE // 65536 - 1))


STEPS = st.one_of(write(), write(), compressed(), st.sampled_from(["snapshot", "apply", "delete"]))
HISTORIES = st.builds(
    History,
    st.sampled_from(SHAPES),
    st.lists(STEPS, max_size=12).map(tuple),
    st.sampled_from(sorted(OVER_HEADER)),
    st.sampled_from([8, 512, 4096, 65536]),
)


def build(path: Path, history: History) -> None:
    assert history.shape.create(path, SIZE)
    if history.shape.extended_l2:  # a subcluster bitmap: a few compressed clusters alone look like standard entries
        qemu_io(path, "write -P 3 0 4096")
    taken: list[str] = []
    for number, step in enumerate(history.steps):
        if step == "snapshot":
            taken.append(f"s{number}")
            qemu_img("snapshot", "-c", taken[-1], path)
        elif step in ("apply", "delete"):
            if taken:
                qemu_img("snapshot", "-a" if step == "apply" else "-d", taken[0], path)
                taken = taken[1:] if step == "delete" else taken
        else:
            qemu_io(path, step, options=("-d", "unmap"))


def comes_back(history: History) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path, saved = Path(folder) / "a.qcow2", Path(folder) / "saved.qcow2"
        build(path, history)
        expected = truth(path)
        overwrite(path, OVER_HEADER[history.over][: min(history.length, history.shape.cluster)])
        backing = str(path.with_suffix(".below")) if history.shape.backing else None
        result = rescue(str(path), str(saved), Known(SIZE, backing, "raw" if backing else None))
        assert result.exit_code == 0, result.text
        outcome = qemu_check(saved)
        assert outcome.exit_code == 0, f"{outcome}\n{result.text}"
        assert seen(saved) == expected, result.text


@settings(max_examples=8)
@given(HISTORIES)
def test_histories(history: History) -> None:
    comes_back(history)


@pytest.mark.slow
@settings(max_examples=1000)
@given(HISTORIES)
def test_many_histories(history: History) -> None:
    comes_back(history)
