"""`powercut shrink`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from powercut.commands import JSON


@click.command()
@click.argument("finding")
@click.option("--time", "limit", default="2m", show_default=True, metavar="TIME", help="Try no more after this.")
@click.option("--trace", "trace_path", help="Where the trace is, if it was moved.")
@click.option(
    "--save",
    type=click.Path(path_type=Path),
    default=Path("powercut-shrunk"),
    show_default=True,
    metavar="DIR",
    help="Where the scenario, its trace, finding and bundle are written.",
)
@JSON
def shrink(finding: str, limit: str, trace_path: str | None, save: Path, json_path: str | None) -> None:
    """Leave out operations of the recording that FINDING is about, and record the rest again, while it breaks.

    Exits 1 with the shortest history that still does; 3 if what was recorded again did not.
    """
    from powercut import rerecord
    from powercut.fuzz import duration
    from powercut.report import document
    from powercut.report import fuzz as report
    from powercut.report.text import progress

    with progress("recording again") as show:
        shrunk = rerecord.shrink(finding, save, duration(limit), trace_path, show)
    if json_path != "-":
        click.echo(report.shrunk(finding, shrunk))
    document.write(report.shrunk_document(finding, shrunk), json_path)
    sys.exit(1 if shrunk else 3)
