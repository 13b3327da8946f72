"""The scoreboard with times, the rivals beside it, and false alarms: `python benchmarks/defects.py [--histories N]`.

The rivals get the same histories of the same model with the same defect: replaying prefixes of the writes, and random
subsets of those that no flush covers; each state is written out and given to `qemu-img check`. They know nothing of
the guest's data, so what they can find is damaged structure.
"""

from __future__ import annotations

import multiprocessing
import random
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import click
import numpy as np

from powercut.defects import probes, scoreboard
from powercut.formats.qcow2.defects import CATALOGUE, Sort
from powercut.formats.qcow2.driver.practice import Practice
from powercut.guest.daemon import tool
from powercut.recording import modelled
from powercut.report import defects as report
from powercut.scenario import parse_size
from powercut.trace import SECTOR, Kind, Trace

LIMIT = 30.0  # seconds for a rival
SUBSETS = 20  # random states at each point
SHARE = 250  # histories between two reports
DIRTY = 79  # the byte of the header with the dirty bit
LARGEST = 64 << 20  # disks that are recorded


def base_of(trace: Trace) -> bytearray:
    image = trace.file("image")
    assert image is not None
    content = bytearray(image.size)
    for file, offset, length, row in trace.bases.tolist():
        if file == image.id:
            content[offset : offset + length] = trace.rows[row : row + length // SECTOR].tobytes()
    return content


def apply(trace: Trace, content: bytearray, event: np.void) -> None:
    offset = int(event["offset"])
    content[offset : offset + int(event["length"])] = trace.payload(event)


def prefixes(trace: Trace, rnd: random.Random) -> Iterator[bytearray]:
    """The image after each of its writes."""
    content = base_of(trace)
    for event in trace.events:
        if event["file"] == 0 and event["kind"] == Kind.WRITE:
            apply(trace, content, event)
            yield content


def subsets(trace: Trace, rnd: random.Random) -> Iterator[bytearray]:
    """Before each flush, and at the end: some of the writes since the last one."""
    durable, waiting = base_of(trace), []
    for event in [*trace.events, None]:
        if event is not None and event["file"] == 0 and event["kind"] == Kind.WRITE:
            waiting.append(event)
        if event is None or (event["file"] == 0 and event["kind"] == Kind.FLUSH):
            for _ in range(SUBSETS if waiting else 0):
                content = bytearray(durable)
                for each in waiting:
                    if rnd.random() < 0.5:
                        apply(trace, content, each)
                yield content
            for each in waiting:
                apply(trace, durable, each)
            waiting = []


def damaged(image: Path, *, dirty: bool) -> bool:
    """Whether `qemu-img check` says so. A dirty image is repaired first, as every open for writing does."""
    command = [tool("qemu-img"), "check", "-q", "-f", "qcow2", str(image)]
    if dirty:
        subprocess.run([*command, "-r", "all"], capture_output=True, timeout=60)
    return subprocess.run(command, capture_output=True, timeout=60).returncode in (1, 2)


def rival(states: Callable[[Trace, random.Random], Iterator[bytearray]], practice: Practice, scratch: Path) -> str:
    """How long it takes to find the defect, and how many states were looked at."""
    rnd, begin, looked = random.Random(1), time.monotonic(), 0
    for scenario in probes.scenarios(1):
        if not scenario.workload.history or parse_size(scenario.size) > LARGEST:
            continue
        path = scratch / "rival.trace"
        modelled.record(scenario, practice, path)
        if scenario.backing is not None:  # without it the image would not open
            (scratch / "base").write_bytes(modelled.Stamped(parse_size(scenario.backing)).content)
        for content in states(Trace(path), rnd):
            if time.monotonic() - begin > LIMIT:
                return f"not in {LIMIT:.0f} s, {looked:,} states"
            image = scratch / "state"
            image.write_bytes(content)
            looked += 1
            if damaged(image, dirty=bool(content[DIRTY] & 1)):
                return f"{time.monotonic() - begin:.1f} s, {looked:,} states"
    raise AssertionError("there is no end to scenarios")


def alarms(seed: int, histories: int) -> list[str]:
    """What is found in so many histories without a defect, by the crash search and by loops."""
    found: list[str] = []
    with tempfile.TemporaryDirectory(prefix="powercut-") as scratch:
        for scenario in probes.scenarios(seed):
            if not histories:
                return found
            if not scenario.workload.history:
                continue
            histories -= 1
            for method in ("crash", "loops"):
                trouble = probes.judge_of(method)(scenario, Practice(), Path(scratch))
                if trouble is not None:
                    found.append(f"{method}: {scenario.options} {list(scenario.workload.history)}: {trouble.text}")
    return found


@click.command()
@click.option("--histories", default=0, help="Only this: so many histories without a defect.")
@click.option("--jobs", default=2, show_default=True)
def main(histories: int, jobs: int) -> None:
    begin = time.monotonic()
    if histories:
        count = -(-histories // SHARE)
        with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
            done, found = 0, 0
            for share in pool.map(alarms, range(100, 100 + count), [SHARE] * count):
                done, found = done + SHARE, found + len(share)
                print(*share, f"{found} false alarms in {done:,} histories, {time.monotonic() - begin:.0f} s", sep="\n")
        return
    print(report.text(scoreboard.board(jobs=jobs)))
    print(f"\n{'crash order, by rivals with qemu-img check':44} {'prefixes':>28} {'random subsets':>28}")
    planted = {defect.name: defect.planted for defect in CATALOGUE if defect.sort is Sort.CRASH}
    with tempfile.TemporaryDirectory(prefix="powercut-") as scratch:
        for name, practice in {**planted, "none of them (a control)": Practice()}.items():
            each = [rival(states, practice, Path(scratch)) for states in (prefixes, subsets)]
            print(f"{name:44} {each[0]:>28} {each[1]:>28}")


if __name__ == "__main__":
    main()
