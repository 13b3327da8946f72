"""Loops whose guest writes files into an ext4 on its disk: each is written under another name, fsynced, and renamed.

Afterwards the file system must be as any is after a crash of its machine: `e2fsck -p` may replay the journal, and
`e2fsck -fn` then finds nothing. Every file that the guest was told to be safe must be there, and whatever bears its
final name must be whole.
"""

from __future__ import annotations

import random
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

from powercut import stamp
from powercut.disk import Bytes
from powercut.endings import Running
from powercut.errors import EnvironmentFault, InputError
from powercut.guest.agent import Gone
from powercut.guest.daemon import tool
from powercut.guest.images import convert
from powercut.guest.machine import Machine
from powercut.loops import aftermath
from powercut.loops.cycle import Cycled, Lane
from powercut.trace import SECTOR
from powercut.verdict import Problem, Severity

_PATIENCE = 120.0  # seconds for a tool
_MOST = 64  # sectors of a file at most
_PROBLEMS = 20  # listed at most


class File(NamedTuple):
    """A file of the guest's, full of stamps of operation `number`."""

    number: int
    length: int

    @property
    def name(self) -> str:
        return f"f{self.number}"


class FileLane(Lane):
    """A row of loops, each with a new image that holds an empty ext4."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        if self.ending.recorded or len(self.images) > 1 or self.images[0].backing:
            raise InputError("--filesystem goes with one disk without a backing file, and any ending but power-cut")
        self._issued: list[File] = []
        self._safe: set[File] = set()

    def _prepare(self) -> None:
        (image,) = self.images
        raw = self.folder / "ext4"
        with open(raw, "wb") as out:
            out.truncate(image.size)
        _run(["mke2fs", "-q", "-F", "-t", "ext4", "-E", "lazy_itable_init=1,nodiscard", str(raw)])
        image.create(self.scenario.options)
        command = [tool("qemu-img"), "convert", "-n", "-f", "raw", "-O", image.format, str(raw), str(image.path)]
        _run(command)
        raw.unlink()
        self._issued, self._safe = [], set()

    def _work(self, machine: Machine, chance: random.Random, cycled: Cycled) -> Running:
        workload = self.scenario.workload
        moment = self.plan.moment or chance.randint(workload.operations // 4, workload.operations * 3 // 4)
        running = Running(machine, list(self.images), None, chance, cycled.number)
        agent = machine.agent
        try:
            agent.mount(0)
            for number in range(1, moment + 2):
                file = File(number, chance.randint(1, _MOST) * SECTOR)
                self._issued.append(file)
                agent.file(number, file.name, file.length, number)
                if number > moment:  # in flight when the end begins
                    break
                answer = agent.wait()
                if answer.error:
                    text = f"file {file.name} of the guest failed with errno {answer.error}"
                    cycled.problems.append(Problem("requests", "failed", number, Severity.CORRUPT, text))
                else:
                    self._safe.add(file)
            self.ending.end(running)
        except Gone:
            text = f"QEMU ended by itself, with exit code {machine.wait_end()}: {machine.said}"
            cycled.problems.append(Problem("ends", "early", 0, Severity.UNOPENABLE, text))
        cycled.operations = (len(self._issued), len(self._safe), len(self._safe))
        return running

    def _look(self, cycled: Cycled, running: Running, firsts: list[Bytes]) -> None:
        before = firsts[0] if running.images == self.images else None
        cycled.problems += aftermath.examine(running.images[0], before, self.ending, None)
        for image in running.others:
            cycled.problems += aftermath.examine(image, None, self.ending, None)
        raw, found = self.folder / "ext4", self.folder / "found"
        convert(running.images[0].path, running.images[0].format, raw, "raw")
        cycled.problems += _check(raw)
        _run(["rm", "-rf", str(found)])
        found.mkdir()
        _run(["debugfs", "-R", f"rdump / {found}", str(raw)])
        cycled.problems += judge(found, self._issued, self._safe)


def judge(found: Path, issued: list[File], safe: set[File]) -> list[Problem]:
    """What is wrong with the files in the folder `found`: of those `issued`, those that are `safe` must be there."""
    problems = []
    for file in issued:
        path = found / file.name
        if not path.exists():
            if file in safe:
                text = f"file {file.name} is not there, and was fsynced and renamed"
                problems.append(Problem("acknowledged", "file-lost", file.number, Severity.SILENT, text))
        elif path.read_bytes() != stamp.make(file.number, 0, 0, file.length // SECTOR):
            text = f"file {file.name} does not hold what was written to it before it got that name"
            problems.append(Problem("acknowledged", "file-content", file.number, Severity.SILENT, text))
    return problems[:_PROBLEMS]


def _check(raw: Path) -> list[Problem]:
    """What e2fsck finds beyond a journal that wants to be replayed."""
    for options in ("-p", "-fn"):
        done = subprocess.run(["e2fsck", options, raw], capture_output=True, text=True, timeout=_PATIENCE)
        if done.returncode & ~1 or (options == "-fn" and done.returncode):
            said = [line for line in done.stdout.splitlines() if line.strip() and not line.startswith("Pass ")]
            text = f"e2fsck {options}: exit code {done.returncode}: {'; '.join(said[:3])}"
            return [Problem("filesystem", "e2fsck", 0, Severity.CORRUPT, text)]
    return []


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE)
    except FileNotFoundError:
        raise EnvironmentFault(f"{command[0]} was not found: install e2fsprogs") from None
    if done.returncode:
        raise EnvironmentFault(f"{command[0]}: {done.stderr.strip()}")
