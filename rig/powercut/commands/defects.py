"""`powercut defects`."""

from __future__ import annotations

import sys

import click

from powercut.commands import JOBS, JSON


@click.command()
@click.argument("names", metavar="[DEFECT]...", nargs=-1)
@click.option("--quick", is_flag=True, help="Stop at the first way that finds a defect.")
@click.option("--seed", default=1, show_default=True, help="What histories are drawn from.")
@JOBS
@JSON
def defects(names: tuple[str, ...], quick: bool, seed: int, jobs: int | None, json_path: str | None) -> None:
    """Plant real defects in a model of the qcow2 driver, and see which are found, and how.

    Exits 1 if one was missed, or if something was found where there is no defect.
    """
    from powercut.defects import scoreboard
    from powercut.formats.qcow2.defects import CATALOGUE, find
    from powercut.report import defects as report
    from powercut.report import document
    from powercut.report.text import progress

    wanted = [find(name) for name in names] or CATALOGUE
    with progress("looking for defects") as show:
        effort = scoreboard.QUICK if quick else scoreboard.FULL
        board = scoreboard.board(wanted, effort, seed=seed, jobs=jobs, progress=show)
    if json_path != "-":
        click.echo(report.text(board))
    document.write(report.document(board), json_path)
    sys.exit(board.exit_code)
