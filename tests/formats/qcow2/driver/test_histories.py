"""The model of the driver against a simple model, and against the crash search, on histories that hypothesis draws."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from powercut.disk import ImageDisk
from powercut.explore import run
from powercut.explore.session import Plan
from powercut.formats.qcow2.check import check
from powercut.formats.qcow2.driver import snapshots
from powercut.formats.qcow2.driver.create import create
from powercut.formats.qcow2.driver.host import MemoryFile
from powercut.formats.qcow2.driver.host import run as alone
from powercut.formats.qcow2.driver.image import Image
from powercut.formats.qcow2.driver.opening import open_image
from powercut.formats.qcow2.driver.practice import Era, Practice
from powercut.recording import histories, modelled
from powercut.recording.operations import possible
from powercut.scenario import Scenario
from powercut.verdict import Verdict

SECTOR = 512
Step = tuple[Any, ...]


class Below:
    def __init__(self, content: bytes) -> None:
        self.content = content

    def read(self, offset: int, length: int) -> bytes:
        return self.content[offset : offset + length].ljust(length, b"\0")


class World:
    """An image under the driver, and what its disk should hold."""

    def __init__(self, practice: Practice, bits: int, version: int, lazy: bool, backed: bool, sectors: int) -> None:
        self.practice, self.size = practice, sectors * SECTOR
        base = bytes(range(1, 252)) * (self.size // 251 // 2) if backed else b""
        self.below = Below(base) if backed else None
        backing = "base" if backed else None
        self.file = MemoryFile(
            create(self.size, cluster_bits=bits, version=version, lazy=lazy and version == 3, backing=backing)
        )
        self.now = bytearray(base.ljust(self.size, b"\0"))
        self.vmstate = b""
        self.then: dict[str, tuple[bytes, bytes]] = {}
        self.image = self.open()

    def open(self) -> Image:
        return self.do(open_image(self.practice, self.below))

    def do(self, work: Any) -> Any:
        return alone(work, self.file)

    def step(self, number: int, step: Step) -> None:
        kind, at, sectors, name = step
        offset = at % (self.size // SECTOR) * SECTOR
        length = min(sectors * SECTOR, self.size - offset)
        fill = bytes([number + 1]) * length
        if kind == "write":
            self.do(self.image.write(offset, fill))
            self.now[offset : offset + length] = fill
        elif kind == "zero":
            self.do(self.image.zero(offset, length))
            self.now[offset : offset + length] = bytes(length)
        elif kind == "discard":
            self.do(self.image.discard(offset, length))
            self.discarded(offset, length)
        elif kind == "flush":
            self.do(self.image.flush_all())
        elif kind == "vmstate":
            self.do(self.image.write_vmstate(0, fill))
            self.vmstate = fill
        elif kind == "reopen":
            self.close()
            self.image = self.open()
        elif kind == "create" and name not in self.then:
            self.do(snapshots.create(self.image, name, len(self.vmstate)))
            self.then[name] = (bytes(self.now), self.vmstate)
            self.vmstate = b""
        elif kind == "apply" and name in self.then:
            self.do(snapshots.apply(self.image, name))
            self.now = bytearray(self.then[name][0])
            self.vmstate = self.then[name][1]
        elif kind == "delete" and name in self.then:
            self.do(snapshots.delete(self.image, name))
            del self.then[name]

    def discarded(self, offset: int, length: int) -> None:
        """A discard is a hint: each sector is as it was, or zeros."""
        got = self.do(self.image.read(offset, length))
        for at in range(0, length, SECTOR):
            old = self.now[offset + at : offset + at + SECTOR]
            assert got[at : at + SECTOR] in (old, bytes(SECTOR))
        self.now[offset : offset + length] = got

    def close(self) -> None:
        self.do(self.image.close())
        result = check(self.file, trust_dirty=True)
        assert (result.exit_code, result.problems, result.dirty) == (0, [], False)

    def agrees(self) -> None:
        assert self.do(self.image.read(0, self.size)) == self.now
        assert self.do(self.image.read_vmstate(0, len(self.vmstate))) == self.vmstate


KINDS = ("write", "write", "write", "zero", "discard", "flush", "vmstate", "reopen", "create", "apply", "delete")
steps = st.lists(
    st.tuples(
        st.sampled_from(KINDS),
        st.integers(0, 700),
        st.one_of(st.integers(1, 20), st.integers(1, 400)),
        st.sampled_from(("a", "b")),
    ),
    max_size=25,
)
worlds = st.builds(
    World,
    st.sampled_from([Practice(Era.TODAY), Practice(Era.APRIL_2009)]),
    st.sampled_from((9, 10, 12)),
    st.sampled_from((2, 3)),
    st.booleans(),
    st.booleans(),
    st.integers(20, 700),
)


@settings(max_examples=100)
@given(worlds, steps)
def test_what_is_read_is_what_a_simple_model_says_and_the_image_is_clean(world: World, history: list[Step]) -> None:
    for number, step in enumerate(history):
        world.step(number, step)
        world.agrees()
    world.close()
    world.vmstate = b"" if not world.practice.through else world.vmstate
    world.image = world.open()
    world.agrees()


def known(scenario: Scenario) -> Scenario:
    """The scenario, as far as the model knows it. Snapshots of version 2 are left out: nothing in that version can say
    that copied flags are not right yet."""
    options = {k: v for k, v in scenario.options.items() if k in ("cluster_size", "compat", "lazy_refcounts")}
    lines = scenario.workload.history
    if "compat" in options:
        lines = tuple(line for line in lines if not line.startswith("snapshot"))
    workload = msgspec.structs.replace(scenario.workload, history=lines or ("flush",))
    return possible(msgspec.structs.replace(scenario, options=options, workload=workload))


def verdict(scenario: Scenario, practice: Practice, trace: Path) -> Verdict:
    modelled.record(scenario, practice, trace)
    return run.explore_trace(Plan(str(trace), "qcow2"), jobs=1).verdict


def test_no_crash_breaks_it(tmp_path: Path, figure: Callable[[str, object], None]) -> None:
    tried = 0

    @settings(max_examples=60)
    @given(histories.drawn("qcow2", modelled.KINDS))
    def holds(scenario: Scenario) -> None:
        nonlocal tried
        tried += 1
        assert verdict(known(scenario), Practice(), tmp_path / "trace") is Verdict.HOLDS

    holds()
    figure("histories on the model of the qcow2 driver, each exhausted", tried)


@pytest.mark.parametrize("history", [("write 0 4k",), ("write 0 4k", "flush")])
def test_control_a_missing_barrier_is_found(tmp_path: Path, history: tuple[str, ...]) -> None:
    scenario = histories.scenario("qcow2", histories.Shape(65536, (65536,)), list(history), 1)
    assert verdict(scenario, Practice(), tmp_path / "trace") is Verdict.HOLDS
    planted = Practice(defects=frozenset({"no-flush-before-l2"}))
    assert verdict(scenario, planted, tmp_path / "trace") is Verdict.BROKEN


def test_version_2_has_nothing_to_say_that_copied_flags_are_not_right_yet(tmp_path: Path) -> None:
    """So a crash while a snapshot is made, applied or deleted may leave them wrong; but nothing else."""
    lines = [
        "write 0 64k",
        "snapshot create s1",
        "write 0 6k",
        "snapshot apply s1",
        "write 4k 4k",
        "snapshot delete s1",
    ]
    shape = histories.Shape(4096, (65536,), (("cluster_size", "4k"), ("compat", "0.10")))
    modelled.record(histories.scenario("qcow2", shape, lines, 1), Practice(), tmp_path / "trace")
    outcome = run.explore_trace(Plan(str(tmp_path / "trace"), "qcow2"), jobs=1)
    assert {finding.kind for finding in outcome.findings} == {"copied-flag"}


def test_a_crashed_image_with_lazy_refcounts_is_rebuilt_when_it_is_opened(tmp_path: Path) -> None:
    file = MemoryFile(create(1 << 20, cluster_bits=12, lazy=True))
    image = alone(open_image(), file)
    alone(image.write(0, b"x" * 65536), file)
    alone(image.flush_all(), file)  # and no close
    crashed = check(file, trust_dirty=True)
    assert crashed.dirty
    assert crashed.problems, "a control: the refcounts are wrong"
    image = alone(open_image(), file)
    assert alone(image.read(0, 65536), file) == b"x" * 65536
    result = check(file, trust_dirty=True)
    assert (result.exit_code, result.dirty) == (0, False)


def test_an_ordinary_file_gets_the_same_bytes_as_memory(tmp_path: Path) -> None:
    from powercut.formats.qcow2.driver.host import OpenFile

    path, memory = tmp_path / "image", MemoryFile(create(1 << 20))
    path.write_bytes(memory.content)
    opened = OpenFile(path)
    for file in (memory, opened):
        image = alone(open_image(), file)
        alone(image.write(5 << 10, b"x" * 70000), file)
        alone(image.close(), file)
    opened.close()
    assert path.read_bytes() == memory.content
    assert check(ImageDisk(path)).exit_code == 0
