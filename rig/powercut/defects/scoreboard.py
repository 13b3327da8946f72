"""The scoreboard: for each defect of the catalogue, which of the rig's ways to look find it, how soon and how small.

Every finding's history is run again without the defect, and so is a row of other histories: whatever is found there is
a false alarm.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

from powercut.defects import probes
from powercut.defects.probes import METHODS, Hit
from powercut.formats.qcow2.defects import CATALOGUE, Defect, Sort
from powercut.formats.qcow2.driver.practice import Era, Practice

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Effort:
    """How hard to look: scenarios and seconds for each way; whether to stop at the first that finds a defect; scenarios
    without a defect for each way."""

    scenarios: int = 300
    seconds: float = 20.0
    first_only: bool = False
    controls: int = 40


QUICK = Effort(seconds=10.0, first_only=True, controls=10)
FULL = Effort()


@dataclass(slots=True)
class Row:
    """One defect, or none (`defect` is None: the controls). `hits`: what each way found (None: nothing); a way that was
    not tried is missing. `alarms`: what was found where no defect was."""

    defect: Defect | None
    hits: dict[str, Hit | None] = field(default_factory=dict)
    alarms: list[str] = field(default_factory=list)
    controls: int = 0  # runs without a defect

    @property
    def found(self) -> bool:
        return any(self.hits.values())

    @property
    def soonest(self) -> Hit | None:
        return min((hit for hit in self.hits.values() if hit), key=lambda hit: hit.seconds, default=None)


@dataclass(frozen=True, slots=True)
class Board:
    rows: list[Row]
    controls: Row
    seconds: float

    @property
    def found(self) -> int:
        return sum(row.found for row in self.rows)

    @property
    def alarms(self) -> list[str]:
        return [alarm for row in [*self.rows, self.controls] for alarm in row.alarms]

    @property
    def runs_without(self) -> int:
        return sum(row.controls for row in [*self.rows, self.controls])

    @property
    def exit_code(self) -> int:
        return int(self.found < len(self.rows) or bool(self.alarms))


def methods_for(era: Era) -> tuple[str, ...]:
    """The ways to look that apply: nobody claimed that the driver of 2009 survives power cuts, I/O errors or damage."""
    return METHODS if era is Era.TODAY else ("loops", "races")


def order(defect: Defect) -> list[str]:
    """The ways to look for a defect, the one made for its kind first."""
    first = {Sort.CRASH: "crash", Sort.ERROR: "errors"}.get(defect.sort, "loops")
    return sorted(methods_for(defect.era), key=lambda method: method != first)


def look(defect: Defect, effort: Effort, seed: int) -> Row:
    """Look for one defect in every way that applies."""
    row = Row(defect)
    with tempfile.TemporaryDirectory(prefix="powercut-") as scratch:
        for method in order(defect):
            hit, _ = probes.search(method, defect.planted, seed, effort.scenarios, effort.seconds, Path(scratch))
            row.hits[method] = hit
            if hit is not None:
                row.controls += 1
                trouble = probes.judge_of(method)(hit.scenario, defect.absent, Path(scratch))
                if trouble is not None:
                    row.alarms.append(f"{method}, {'; '.join(hit.scenario.workload.history)}: {trouble.text}")
                if effort.first_only:
                    break
    return row


def look_at_nothing(effort: Effort, seed: int) -> Row:
    """Look in every way where there is no defect."""
    row = Row(None)
    with tempfile.TemporaryDirectory(prefix="powercut-") as scratch:
        for era in Era:
            for method in methods_for(era):
                hit, tried = probes.search(method, Practice(era), seed, effort.controls, effort.seconds, Path(scratch))
                row.controls += tried
                if hit is not None:
                    row.alarms.append(f"{method}, {'; '.join(hit.scenario.workload.history)}: {hit.trouble.text}")
    return row


def board(
    defects: Sequence[Defect] = CATALOGUE,
    effort: Effort = FULL,
    *,
    seed: int = 1,
    jobs: int | None = None,
    progress: Progress = lambda done, of: None,
) -> Board:
    """Look for each of `defects`, in several processes."""
    begin, done = time.monotonic(), 0
    jobs = min(jobs or os.cpu_count() or 1, len(defects) + 1)
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        nothing = pool.submit(look_at_nothing, effort, seed)
        rows = {pool.submit(look, defect, effort, seed): defect for defect in defects}
        for _ in as_completed([nothing, *rows]):
            done += 1
            progress(done, len(defects) + 1)
        found = {rows[future].name: future.result() for future in rows}
    return Board([found[defect.name] for defect in defects], nothing.result(), time.monotonic() - begin)
