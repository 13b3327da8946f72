"""How the benchmarks print: a figure a line, with what it is held against, and the command a user would run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from powercut.guest.lifetime import with_parent


def row(what: str, figure: str, wanted: str = "") -> None:
    """Print one figure."""
    click.echo(f"{what:66} {figure:>24}   {wanted}")


@dataclass(frozen=True)
class Explored:
    """What one `powercut explore` took: seconds, seconds of all processors, peak resident bytes (the largest process),
    and its verdict (`powercut.verdict/1`)."""

    seconds: float
    processor: float
    memory: int
    verdict: dict[str, Any]

    @property
    def how(self) -> str:
        """The verdict in words."""
        exhausted = self.verdict["coverage"]["exhausted"]
        return f"{self.verdict['verdict']}{', exhausted' if exhausted else ''}"


def record(path: Path, operations: int, *more: str) -> None:
    """Record QEMU's qcow2 by the command that a user runs."""
    command = [sys.executable, "-m", "powercut.cli", "record", "qcow2", "--ops", str(operations), "--seed", "7", *more]
    subprocess.run(with_parent([*command, "--out", str(path)]), check=True, stdout=subprocess.DEVNULL)


def explored(path: Path, jobs: int, *more: str) -> Explored:
    """Explore by the command that a user runs."""
    result = path.with_suffix(".json")
    command = [sys.executable, "-m", "powercut.cli", "explore", str(path), "--jobs", str(jobs), "--json", str(result)]
    begin = time.perf_counter()
    process = subprocess.Popen(with_parent([*command, *more]), stdout=subprocess.DEVNULL)
    _, _, usage = os.wait4(process.pid, 0)
    taken = time.perf_counter() - begin
    spent = usage.ru_utime + usage.ru_stime
    return Explored(taken, spent, usage.ru_maxrss * 1024, json.loads(result.read_text()))
