"""Loops by the hundred: in several lanes, counted, and what failed kept so that it can be run again.

A hundred loops without a failure were once taken for proof. So what is said in the end is what the number of loops
proves (`powercut.stats`), and no number of them prints HOLDS.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from powercut import endings, stats
from powercut.errors import EnvironmentFault, InputError
from powercut.guest.accelerator import Accelerator, choose
from powercut.guest.hardware import Hardware
from powercut.guest.hosting import hosted
from powercut.guest.kernel import kernel
from powercut.guest.machine import kill_all
from powercut.loops.brought import BroughtLane
from powercut.loops.cut import CutLane
from powercut.loops.cycle import Cycled, Lane, copy
from powercut.loops.mounted import FileLane
from powercut.scenario import Scenario, parse_size
from powercut.scratch import scratch
from powercut.trace import SECTOR
from powercut.verdict import Severity

SCHEMA, KEPT = "powercut.loop/1", "powercut.loops.loop-kept/1"
_IN_A_ROW = 4  # loops on the same images at least, where nothing else was asked for
_KEEP = 5  # failing loops of which everything is kept
_TOO_MANY = 5  # loops that say nothing, after which it is of no use to go on


@dataclass(frozen=True, slots=True)
class Failure:
    """A loop that failed, or said nothing. `folder` holds all of it, or is None if there were many before it."""

    cycled: Cycled
    folder: Path | None

    @property
    def replay(self) -> str:
        return f"powercut loop --replay {self.folder}"


@dataclass(slots=True)
class Outcome:
    """What came of all loops. `word`: CLEAN, BROKEN or UNKNOWN."""

    scenario: Scenario
    qemu: str
    accelerator: Accelerator
    kernel: str
    host: str = ""  # the file system that the images lie on, where one was asked for; or why it is another
    loops: int = 0  # that came to an end and were looked at
    failures: list[Failure] = field(default_factory=list)
    unknown: list[Failure] = field(default_factory=list)
    operations: Counter[str] = field(default_factory=Counter)
    states: list[float] = field(default_factory=list)  # of each recording: its crash states, as a power of two
    checks: int = 0
    seconds: float = 0.0

    @property
    def word(self) -> str:
        return "BROKEN" if self.failures else "UNKNOWN" if self.unknown or not self.loops else "CLEAN"

    @property
    def proves(self) -> str:
        """What the loops prove, in a sentence."""
        return stats.sentence(len(self.failures), self.loops)

    @property
    def bound(self) -> float | None:
        """With 95 % confidence the failure rate is below this."""
        return stats.bound(len(self.failures), self.loops) if self.loops else None

    @property
    def bound_text(self) -> str:
        return "?" if self.bound is None else stats.percent(self.bound)

    @property
    def exit_code(self) -> int:
        return {"CLEAN": 0, "BROKEN": 1, "UNKNOWN": 3}[self.word]

    @property
    def rate(self) -> float:
        """Loops a second."""
        return self.loops / self.seconds if self.seconds else 0.0


Progress = Callable[[Outcome, int], None]  # so far, and how many loops there will be


def qemu_version(qemu: str) -> str:
    """The version of a QEMU system emulator, for example "7.2.22". Raises EnvironmentFault."""
    program = shutil.which(qemu)
    if program is None:
        raise EnvironmentFault(f"{qemu} was not found: install QEMU (qemu-system-x86), or run `make setup`")
    try:
        said = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EnvironmentFault(f"{program}: does not state its version: {error}") from None
    version = re.match(r"QEMU emulator version (\S+)", said)
    if version is None:
        raise EnvironmentFault(f"{program}: is no QEMU: it says {said[:60]!r}")
    return version[1]


class Loops:
    """The loops of `scenario`. `loops`: how many; `proof`: go on until a failure rate of that much is refuted, or a
    loop failed. `jobs`: guests at once."""

    def __init__(self, scenario: Scenario, *, qemu: str = "qemu-system-x86_64", accelerator: str | None = None) -> None:
        assert scenario.loop is not None
        self._ending = endings.find(scenario.loop.ending)
        version, guest = qemu_version(qemu), kernel()
        size = parse_size(scenario.size)
        if size == 0 or size % SECTOR:
            raise InputError(f"size {scenario.size!r} is not a positive multiple of {SECTOR} bytes")
        chosen = Accelerator("tcg") if accelerator == "tcg" else choose(qemu, guest)
        if accelerator == "kvm" and chosen.name != "kvm":
            raise EnvironmentFault(f"no guest runs under kvm here: {chosen.why}")
        self._scenario, plan = scenario, scenario.loop
        own = guest if plan.disk is None else None
        self._hardware = Hardware(chosen.name, own, qemu, plan.cpu, plan.memory)
        self.outcome = Outcome(scenario, version, chosen, guest.name)
        self._next = 0
        self._lock = threading.Lock()
        self._stop = self._given_up = False

    def run(
        self,
        *,
        loops: int | None = None,
        proof: float | None = None,
        jobs: int | None = None,
        save: Path,
        progress: Progress = lambda outcome, of: None,
    ) -> Outcome:
        """Raises EnvironmentFault if a loop cannot be run."""
        test = stats.Sequential(0, proof) if proof is not None else None
        total = stats.loops_needed(proof) if proof is not None else loops or 1
        # One guest more than there are cores; where loops are few, less, so that images are used again.
        jobs = min(jobs or min((os.cpu_count() or 1) + 1, -(-total // _IN_A_ROW)), total)
        begin = time.monotonic()

        def count(cycled: Cycled, lane: Lane) -> None:
            with self._lock:
                if self._given_up:  # it was killed, so it says nothing
                    return
                self._count(cycled, lane, save)
                self.outcome.seconds = time.monotonic() - begin
                decided = test is not None and test.decide(len(self.outcome.failures), self.outcome.loops) is not None
                self._stop = self._stop or decided or len(self.outcome.unknown) >= _TOO_MANY
                progress(self.outcome, total)

        def run_lane(folder: Path) -> None:
            folder.mkdir()
            lane = self._lane(folder)
            while (number := self._take(total)) is not None:
                count(lane.run(number), lane)

        host = self._scenario.loop.host if self._scenario.loop else None
        with scratch() as home, hosted(host, home) as (folder, self.outcome.host), ThreadPoolExecutor(jobs) as pool:
            lanes = [pool.submit(run_lane, folder / f"lane{number}") for number in range(jobs)]
            try:
                wait(lanes, return_when=FIRST_EXCEPTION)
                self._stop = True
                for lane in lanes:
                    lane.result()
            except BaseException:
                self._stop = self._given_up = True
                kill_all()
                raise
        return self.outcome

    def _lane(self, folder: Path) -> Lane:
        assert self._scenario.loop is not None
        plan = self._scenario.loop
        kind: type[Lane] = Lane
        if plan.disk is not None:
            kind = BroughtLane
        elif plan.filesystem is not None:
            kind = FileLane
        elif self._ending.recorded:
            kind = CutLane
        return kind(self._scenario, self._hardware, folder)

    def replay(self, folder: Path, images: list[Path], number: int, operation: int, save: Path) -> Outcome:
        """Run loop `number` once more, from `images` if it did not begin with new ones."""
        begin = time.monotonic()
        with scratch() as home:
            lane = self._lane(home)
            for base in folder.glob("*.base"):
                copy(base, home / base.name)
            if images:
                lane.go_on_from(images, operation)
            self._count(lane.run(number), lane, save)
        self.outcome.seconds = time.monotonic() - begin
        return self.outcome

    def _take(self, total: int) -> int | None:
        with self._lock:
            if self._stop or self._next >= total:
                return None
            self._next += 1
            return self._next

    def _count(self, cycled: Cycled, lane: Lane, save: Path) -> None:
        outcome = self.outcome
        outcome.states.append(cycled.states)
        outcome.checks += cycled.checks
        outcome.operations.update(dict(zip(("issued", "completed", "flushed"), cycled.operations, strict=True)))
        bad = [problem for problem in cycled.problems if problem.severity > Severity.CLEAN]
        outcome.loops += not cycled.unknown or bool(bad)
        if not bad and not cycled.unknown:
            return
        kept = len(outcome.failures) + len(outcome.unknown) < _KEEP
        failure = Failure(cycled, keep(cycled, lane, outcome, save) if kept else None)
        (outcome.failures if bad else outcome.unknown).append(failure)


def keep(cycled: Cycled, lane: Lane, outcome: Outcome, save: Path) -> Path:
    """Keep everything that a person needs to look into a loop, and to run it again. Returns the folder."""
    folder = save / f"loop-{cycled.number}"
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        lane.keep(folder)
        (folder / "command").write_text(f"{cycled.command}\n")
        (folder / "qmp.log").write_text("\n".join([*cycled.transcript, ""]))
        (folder / "serial.log").write_text(cycled.serial)
        (folder / "stderr.log").write_text(cycled.said)
        (folder / "loop.json").write_bytes(msgspec.json.format(msgspec.json.encode(_kept(cycled, outcome))))
    except OSError as error:
        raise EnvironmentFault(f"{folder}: cannot be kept: {error.strerror}") from None
    return folder


def _kept(cycled: Cycled, outcome: Outcome) -> dict[str, Any]:
    return {
        "schema": KEPT,
        "number": cycled.number,
        "operation": cycled.first,
        "qemu": outcome.qemu,
        "accelerator": outcome.accelerator.name,
        "kernel": outcome.kernel,
        "problems": [problem.text for problem in cycled.problems],
        "unknown": cycled.unknown,
        "scenario": msgspec.to_builtins(outcome.scenario),
    }


def load(folder: Path) -> tuple[Scenario, int, int, list[Path]]:
    """What `keep` kept: the scenario, the number of the loop, that of its first operation, and the images it began
    with. Raises InputError."""
    path = folder / "loop.json"
    try:
        kept = msgspec.json.decode(path.read_bytes())
        scenario = msgspec.convert(kept["scenario"], Scenario)
        if kept["schema"] != KEPT or scenario.loop is None:
            raise ValueError(f"schema {kept['schema']!r}")
        number, operation = int(kept["number"]), int(kept["operation"])
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except (msgspec.MsgspecError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: is no kept loop: {error}") from None
    images = [folder / f"disk{disk}.{scenario.format}.before" for disk in range(scenario.loop.disks)]
    return scenario, number, operation, images if all(image.exists() for image in images) else []
