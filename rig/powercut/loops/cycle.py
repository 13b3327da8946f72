"""One loop: images made or used again, a guest started and put to work, ended, and what is left looked at.

A lane is a row of loops on the same images; several lanes run side by side.
"""

from __future__ import annotations

import errno
import random
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from powercut import endings
from powercut.disk import Bytes
from powercut.endings import Running
from powercut.errors import Crashed, EnvironmentFault, Unanswered
from powercut.guest import start
from powercut.guest.agent import Gone
from powercut.guest.hardware import Disk, Hardware
from powercut.guest.images import CACHES, Image
from powercut.guest.ledger import Ledger
from powercut.guest.machine import Machine
from powercut.guest.workload import Operation, draw
from powercut.guest.writing import Step, Writing
from powercut.loops import aftermath
from powercut.scenario import Scenario, parse_size
from powercut.trace import SECTOR
from powercut.verdict import Problem, Severity

_FULL = 16 << 20  # bytes free: below, what fails is taken for the want of them
LONGEST = 64 << 10  # bytes of a guest's request in a loop: emulated guests are slow, and a loop is to be short


@dataclass(slots=True)
class Cycled:
    """What came of one loop. `unknown`: why it says nothing. `transcript`: what was said over QMP."""

    number: int
    problems: list[Problem] = field(default_factory=list)
    unknown: str = ""
    operations: tuple[int, int, int] = (0, 0, 0)  # issued, completed, flushed
    first: int = 0  # number of the first operation
    states: float = 0.0  # crash states explored, as a power of two
    checks: int = 0
    seconds: float = 0.0
    command: str = ""
    transcript: list[str] = field(default_factory=list)
    serial: str = ""
    said: str = ""


class Lane:
    """A row of loops on the same images, in `folder`. Loops are numbered over all lanes."""

    def __init__(self, scenario: Scenario, hardware: Hardware, folder: Path) -> None:
        assert scenario.loop is not None
        self.scenario, self.plan = scenario, scenario.loop
        self.ending = endings.find(self.plan.ending)
        self._hardware = hardware
        self.folder = folder
        size, backing = parse_size(scenario.size), parse_size(scenario.backing or "0")
        format, below = scenario.format, scenario.format if scenario.format == "qcow2" else "raw"
        paths = [folder / f"disk{number}.{format}" for number in range(self.plan.disks)]
        self.images = [Image(path, format, size, backing, below) for path in paths]
        self._ledgers: list[Ledger] = []
        self.operation = 1  # number of the next one

    @property
    def before(self) -> list[Path]:
        """Copies of the images as they were before the last loop; none where that began with new ones."""
        return [path for image in self.images if (path := before_of(image)).exists()]

    def go_on_from(self, images: Sequence[Path], operation: int) -> None:
        """Begin the next loop with copies of `images`, whatever they hold, and with that number of an operation."""
        self._ledgers = []
        for image, source in zip(self.images, images, strict=True):
            copy(source, image.path)
            ledger = Ledger(image.size // SECTOR)
            ledger.settle(image.held())
            self._ledgers.append(ledger)
        self.operation = operation

    def run(self, number: int) -> Cycled:
        """Run loop `number`, whose workload and moment are drawn from the scenario's seed and that number.

        Raises EnvironmentFault if it cannot be run.
        """
        cycled = Cycled(number, first=self.operation)
        begin = time.monotonic()
        try:
            self._prepare()
            firsts = [aftermath.first_cluster(image) for image in self.images]
            running = self._live(cycled)
            self._look(cycled, running, firsts)
        except Crashed as crash:
            cycled.problems.append(Problem("ends", "signal", 0, Severity.UNOPENABLE, str(crash)))
        except Unanswered as error:
            cycled.unknown = str(error)
        cycled.seconds = time.monotonic() - begin
        if cycled.problems and shutil.disk_usage(self.folder).free < _FULL:
            raise EnvironmentFault(f"{self.folder}: the disk is full: {cycled.problems[0].text}")
        if cycled.problems or cycled.unknown:
            self._ledgers = []  # the next loop begins with new images
        return cycled

    def _prepare(self) -> None:
        """Make the images, or keep a copy of those that are used again."""
        for path in self.before:
            path.unlink()
        if self._ledgers and not self.plan.fresh:
            for image in self.images:
                copy(image.path, before_of(image))
            return
        self._ledgers = []
        for image in self.images:
            image.create(self.scenario.options)
            ledger = Ledger(image.size // SECTOR)
            if image.backing:
                ledger.start_from(0, np.zeros(min(image.backing, image.size) // SECTOR, dtype=np.int64))
            self._ledgers.append(ledger)

    def _live(self, cycled: Cycled) -> Running:
        chance = random.Random(f"{self.scenario.workload.seed} {cycled.number}")
        plan = self.plan
        cached = CACHES[plan.cache].write_cache
        disks = [
            Disk(node, image.size, plan.device, cached) for node, image in zip(self._nodes(), self.images, strict=True)
        ]  # fmt: skip
        home = self.folder / "machine"
        home.mkdir(exist_ok=True)
        way = "plug" if self.ending.direct and plan.start == "restore" else plan.start
        if plan.disk is not None:
            way = "boot"
        with start.STARTS[way](self._hardware, disks, home) as machine:
            try:
                cycled.command = machine.reproduce()
                return self._work(machine, chance, cycled)
            finally:
                cycled.transcript, cycled.said = machine.transcript, machine.said
                cycled.serial = (home / self._hardware.serial).read_text(errors="replace")

    def _nodes(self) -> list[dict[str, Any]]:
        plan = self.plan
        return [image.node(CACHES[plan.cache], plan.aio, discard=plan.discard) for image in self.images]

    def _work(self, machine: Machine, chance: random.Random, cycled: Cycled) -> Running:
        workload, plan = self.scenario.workload, self.plan
        writing = Writing(machine.agent, self._ledgers, self._steps(chance), workload.depth, self.operation)
        moment = plan.moment or chance.randint(workload.operations // 4, workload.operations * 3 // 4)
        running = Running(machine, list(self.images), writing, chance, cycled.number)
        try:
            writing.run(moment)
            for number, error in writing.errors[:1]:
                if error == errno.ENOSPC or machine.happened("BLOCK_IO_ERROR", nospace=True):
                    raise EnvironmentFault(f"{self.folder}: the disk is full")
                text = f"operation {number} of the guest failed with errno {error}"
                cycled.problems.append(Problem("requests", "failed", number, Severity.CORRUPT, text))
            self.ending.end(running)
        except Gone:
            status = machine.wait_end()
            text = f"QEMU ended by itself, with exit code {status}: {machine.said}"
            cycled.problems.append(Problem("ends", "early", 0, Severity.UNOPENABLE, text))
        writing.hear_the_rest()
        counts = [ledger.counts() for ledger in self._ledgers]
        cycled.operations = tuple(map(sum, zip(*counts, strict=True)))  # type: ignore[assignment]
        self.operation = writing.number
        return running

    def _steps(self, chance: random.Random) -> Iterator[Step]:
        """Operations on all disks, as many as are asked for on each."""
        workload = self.scenario.workload
        drawn = [
            draw(chance.randrange(1 << 62), workload.operations, image.size, workload.extra) for image in self.images
        ]
        for row in zip(*drawn, strict=True):
            for disk, operation in enumerate(row):
                yield disk, _short(operation)

    def _look(self, cycled: Cycled, running: Running, firsts: list[Bytes]) -> None:
        for was, image, first, ledger in zip(self.images, running.images, firsts, self._ledgers, strict=True):
            before = first if image == was else None
            cycled.problems += aftermath.examine(image, before, self.ending, ledger)
        for image in running.others:
            cycled.problems += aftermath.examine(image, None, self.ending, None)
        for name, ledgers in running.snapshots.items() if not cycled.problems else ():
            for image, ledger in zip(running.images, ledgers, strict=True):
                cycled.problems += aftermath.content(image, ledger, self.ending, name)
        if running.images != self.images:
            self._ledgers = []  # the next loop begins with new images

    def keep(self, folder: Path) -> None:
        """Copy the images, and what they were before the last loop, into `folder`."""
        for path in sorted(self.folder.glob("disk*")):
            copy(path, folder / path.name)


def before_of(image: Image) -> Path:
    """Where the copy of an image is kept that was made before the last loop."""
    return image.path.with_name(f"{image.path.name}.before")


def copy(source: Path, target: Path) -> None:
    """Copy a file, its holes included. Raises EnvironmentFault."""
    done = subprocess.run(["cp", "--reflink=auto", source, target], capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise EnvironmentFault(done.stderr.strip())


def _short(operation: Operation) -> Operation:
    return replace(operation, length=min(operation.length, LONGEST))
