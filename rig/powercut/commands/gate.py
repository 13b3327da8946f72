"""`powercut gate`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from powercut.commands import JOBS, JSON


@click.command()
@click.argument("scenarios", nargs=-1, type=click.Path(path_type=Path))
@JOBS
@click.option(
    "--save",
    type=click.Path(path_type=Path),
    default=Path("powercut-gate"),
    show_default=True,
    metavar="DIR",
    help="Where traces and findings of unexpected results are kept.",
)
@click.option("--full", is_flag=True, help="All the loops that scenarios ask for (hours).  [default: a few of each]")
@JSON
def gate(scenarios: tuple[Path, ...], jobs: int | None, save: Path, full: bool, json_path: str | None) -> None:
    """Run SCENARIOS (files or folders; default: scenarios/) and compare with what they expect.

    Exits 1 if any result was unexpected, else 3 if any was UNKNOWN or skipped, else 0; 2 if nothing ran.
    """
    from powercut import gate as gatekeeper
    from powercut.report import document

    results = gatekeeper.run_all(scenarios, jobs, save, full=full, quiet=json_path == "-")
    document.write(gatekeeper.document(results), json_path)
    sys.exit(gatekeeper.exit_code(results))
