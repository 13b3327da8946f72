"""Measures the search, the recorder and their rivals: `make bench`, or some of it by name.

Each row is a figure with what it is held against. Nothing here passes or fails: what a figure should be is written
beside it. docs/benchmarks.md keeps what was measured.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import click
from faults import planted
from million import million
from recording import recording
from rows import row
from searching import hundred_thousand, searching

PARTS = {
    "searching": searching,
    "faults": planted,
    "recording": recording,
    "hundred-thousand": hundred_thousand,
    "million": million,
}


@click.command()
@click.argument("parts", nargs=-1, type=click.Choice(list(PARTS)))
def main(parts: tuple[str, ...]) -> None:
    """Run PARTS, or all benchmarks."""
    for part in parts or PARTS:
        load = os.getloadavg()[0]
        row(f"-- {part}", f"load {load:.1f}", f"{os.cpu_count()} processors")
        with tempfile.TemporaryDirectory(prefix="powercut-bench-") as directory:
            PARTS[part](Path(directory))


if __name__ == "__main__":
    main()
