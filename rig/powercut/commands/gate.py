"""`powercut gate`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from powercut.commands import BISECT, JOBS, JSON, QEMU, compared


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
@QEMU
@BISECT
@JSON
def gate(
    scenarios: tuple[Path, ...],
    jobs: int | None,
    save: Path,
    full: bool,
    qemus: tuple[str, ...],
    bisect: bool,
    json_path: str | None,
) -> None:
    """Run SCENARIOS (files or folders; default: scenarios/) and compare with what they expect.

    Exits 1 if any result was unexpected, else 3 if any was UNKNOWN or skipped, else 0; 2 if nothing ran. With --bisect
    what is expected does not count: bad is what is BROKEN.
    """
    from powercut import compare
    from powercut import gate as gatekeeper
    from powercut.report import document

    def side(qemu: str) -> compare.Worked:
        within = save / f"qemu-{qemus.index(qemu) + 1}"
        results = gatekeeper.run_all(scenarios, jobs, within, full=full, quiet=True)
        return compare.Worked(gatekeeper.exit_code(results), gatekeeper.cells(results), gatekeeper.document(results))

    if len(qemus) > 1:
        compared(qemus, side, json_path)
    with compare.using(qemus[0] if qemus else None):
        results = gatekeeper.run_all(scenarios, jobs, save, full=full, quiet=json_path == "-")
    document.write(gatekeeper.document(results), json_path)
    sys.exit((gatekeeper.verdict_code if bisect else gatekeeper.exit_code)(results))
