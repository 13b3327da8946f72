"""Agreement with `qemu-img check`: exit code, corruptions, leaks and internal errors, image by image.

QEMU 7.2 agreed on every image whose judgement depends on the image alone. What is left are images that QEMU
cannot open for want of something outside the image; `EXPLAINED` lists them, by what QEMU says. A disagreement
that is not listed fails the test; what is listed may be no more than a few in a hundred.
"""

from __future__ import annotations

import os
import random
import re
import subprocess
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from formats.qcow2.images import TIMEOUT, Mutator, Outcome, Shape, make, needs_qemu, qemu_check, recipes, shapes
from powercut.disk import ImageDisk
from powercut.formats.qcow2.check import Check, check
from powercut.formats.qcow2.entries import UNCOUNTED

pytestmark = needs_qemu

# Only where QEMU does not open the image: what it says -> why this checker judges it nevertheless.
EXPLAINED = {
    r"': Parameter 'encrypt\.key-secret' is required": (
        "a mutated header announces encryption: QEMU wants the secret before it checks"
    ),
    r"': Could not open backing file: ": (
        "the name or format of the backing file was mutated: the file it names now is not there"
    ),
    r"': Could not open '": ("the name of the external data file was mutated: the file it names now is not there"),
}

SMALL = [
    Shape(2, 4096),
    *(Shape(3, 4096, bits) for bits in (1, 2, 4, 8, 16, 32, 64)),
    Shape(3, 512),
    Shape(3, 16384, extended_l2=True),
    Shape(3, 16384, 64, extended_l2=True),
    Shape(3, 4096, lazy=True),
    Shape(3, 4096, data_file=True),
    Shape(3, 4096, backing=True),
]


def outcome_of(found: Check) -> Outcome:
    if found.aborted:
        return Outcome(1, counted=False)
    return Outcome(found.exit_code, found.corruptions, found.leaks, found.check_errors)


def consistent(found: Check) -> bool:
    """Problems and counts tell the same story."""
    counted = [p for p in found.problems if p.rule == "structure" and p.kind not in UNCOUNTED]
    return found.decided and not any(p.rests_on for p in found.problems) and bool(counted) == bool(found.corruptions)


def explanation(qemu: Outcome) -> str:
    if qemu.counted:
        return ""
    return next((why for said, why in EXPLAINED.items() if re.search(said, qemu.message)), "")


class Tally:
    def __init__(self) -> None:
        self.agreed: Counter[int] = Counter()
        self.explained: Counter[str] = Counter()
        self.unexplained: list[str] = []

    def add(self, name: str, qemu: Outcome, found: Check) -> bool:
        ours = outcome_of(found)
        if not (found.aborted or consistent(found)):
            self.unexplained.append(f"{name}: problems contradict counts: {found.problems[:3]} {ours}")
            return False
        if qemu == ours:
            self.agreed[qemu.exit_code] += 1
            return True
        why = explanation(qemu)
        if not why:
            self.unexplained.append(f"{name}: QEMU {qemu}, here {ours}: {[p.text for p in found.problems[:3]]}")
            return False
        self.explained[why] += 1
        return True

    @property
    def total(self) -> int:
        return sum(self.agreed.values()) + sum(self.explained.values()) + len(self.unexplained)

    def close(self, what: str, figure: Callable[[str, object], None]) -> None:
        codes = ", ".join(f"exit code {code}: {count}" for code, count in sorted(self.agreed.items()))
        figure(f"qcow2 agreement with qemu-img check, {what}", f"{sum(self.agreed.values())}/{self.total} ({codes})")
        for why, count in self.explained.items():
            figure(f"qcow2 disagreement, {what}", f"{count}: {why}")
        assert not self.unexplained, "\n".join(self.unexplained[:20])
        assert sum(self.explained.values()) <= 0.03 * self.total


def generated(folder: Path, chosen: Iterable[tuple[Shape, str]], seed: int) -> Tally:
    tally = Tally()
    for shape, recipe in chosen:
        path = folder / "image.qcow2"
        for old in folder.iterdir():
            old.unlink()
        if make(path, shape, recipe, seed):
            tally.add(f"{shape.name} {recipe} {seed}", qemu_check(path), check(ImageDisk(path), trust_dirty=True))
    return tally


def test_generated_images(tmp_path: Path, figure: Callable[[str, object], None]) -> None:
    everything = [(shape, recipe) for shape in shapes() for recipe in recipes()]
    tally = generated(tmp_path, random.Random(1).sample(everything, 300), 1)
    assert tally.total >= 290
    tally.close("generated images", figure)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [2, 3])
def test_all_generated_images(seed: int, tmp_path: Path, figure: Callable[[str, object], None]) -> None:
    tally = generated(tmp_path, [(shape, recipe) for shape in shapes() for recipe in recipes()], seed)
    tally.close(f"generated images, seed {seed}", figure)


def mutated(folder: Path, count: int, seed: int) -> Tally:
    bases = []
    for shape in SMALL:
        for recipe in recipes()[1:]:
            path = folder / f"{shape.name}-{recipe}.qcow2"
            if make(path, shape, recipe, seed) and path.stat().st_size < 8 << 20:
                bases.append((path.stem, Mutator(path.read_bytes())))
    tally = Tally()

    def judge(number: int) -> tuple[str, Outcome | None, Path]:
        name, mutator = bases[number % len(bases)]
        path = folder / f"mutated-{seed}-{number}.qcow2"
        path.write_bytes(mutator.mutate(random.Random(f"{seed} {number}")))
        try:
            return name, qemu_check(path), path
        except subprocess.TimeoutExpired:
            return name, None, path

    with ThreadPoolExecutor(max(2, (os.cpu_count() or 2) // 2)) as pool:
        for number, (name, qemu, path) in enumerate(pool.map(judge, range(count))):
            found = check(ImageDisk(path), trust_dirty=True)
            if qemu is None:
                tally.unexplained.append(f"{name} {seed} {number}: qemu-img check took more than {TIMEOUT} s")
            elif tally.add(f"{name} {seed} {number}", qemu, found):
                path.unlink()
    return tally


def test_mutated_images(tmp_path: Path, figure: Callable[[str, object], None]) -> None:
    tally = mutated(tmp_path, 1500, 1)
    assert len(tally.agreed) == 4, "some exit code never came up"
    tally.close("mutated images", figure)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 7))
def test_many_mutated_images(seed: int, tmp_path: Path, figure: Callable[[str, object], None]) -> None:
    mutated(tmp_path, 6000, seed).close(f"mutated images, seed {seed}", figure)


def test_a_disagreement_would_be_noticed() -> None:
    """The control of the comparison itself."""
    tally = Tally()
    secret = "qemu-img: Could not open 'image.qcow2': Parameter 'encrypt.key-secret' is required for cipher"
    found = Check(None, True, [], 0, 0, 0, None, 0, "", True)
    assert tally.add("same", Outcome(0), found)
    assert not tally.add("one leak more", Outcome(3, leaks=1), found)
    assert not tally.add("not opened, no reason known", Outcome(1, counted=False, message="Weird"), found)
    assert tally.add("no secret", Outcome(1, counted=False, message=secret), found)
    assert not tally.add("counts never need an explanation", Outcome(2, 1, message=secret), found)
    refused = "qemu-img: Could not open 'image.qcow2': L1 table is too small"
    assert not tally.add("refused for what is in the image", Outcome(1, counted=False, message=refused), found)
    assert len(tally.unexplained) == 4
