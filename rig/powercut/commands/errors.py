"""`powercut errors`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from powercut.commands import BISECT, JSON, QEMU, SAVE, compared, named_values


@click.command()
@click.argument("formats", nargs=-1, metavar="FORMAT...")
@click.option("--option", "options", multiple=True, metavar="NAME=VALUE", help="An option of qemu-img create -o.")
@click.option("--size", help="The guest's disk.  [default: six clusters]")
@click.option("--backing", metavar="SIZE", help="Over a raw backing file of so many bytes.")
@click.option("--operations", type=click.IntRange(1), help="So many random operations instead of the built-in history.")
@click.option("--depth", default=1, show_default=True, type=click.IntRange(1, 64), help="Requests in flight at once.")
@click.option("--seed", default=7, show_default=True, help="What random operations are drawn from.")
@click.option("--with", "extra", default="", metavar="KINDS", help="Random zero, discard too (with a comma between).")
@click.option(
    "--below",
    type=click.Choice(["blkdebug", "server", "full"]),
    default="blkdebug",
    show_default=True,
    help="What fails: QEMU's own injection, a storage server, a full file system.",
)
@click.option("--error", help="Only this: EIO, ENOSPC; of a server also stall, hangup, unanswered, gone.")
@click.option("--lasting", type=click.Choice(["once", "good"]), help="Only errors that strike once, or for good.")
@click.option("--event", help="Only at this blkdebug event, such as l2_update or pwritev.")
@click.option(
    "--werror",
    type=click.Choice(["report", "stop", "enospc", "ignore"]),
    help="With a virtual machine, which does this about errors.  [default: none, and its guest is played]",
)
@click.option("--jobs", default=2, show_default=True, type=click.IntRange(1), help="Processes to use.")
@QEMU
@BISECT
@SAVE
@JSON
def errors(
    formats: tuple[str, ...],
    options: tuple[str, ...],
    size: str | None,
    backing: str | None,
    operations: int | None,
    depth: int,
    seed: int,
    extra: str,
    below: str,
    error: str | None,
    lasting: str | None,
    event: str | None,
    werror: str | None,
    jobs: int,
    qemus: tuple[str, ...],
    bisect: bool,
    save: Path | None,
    json_path: str | None,
) -> None:
    """Fail the requests that QEMU makes while its guest writes FORMAT (default: every format), one in each run.

    The guest goes on, repeats what failed, flushes. What was flushed must be there when the image is opened again.
    """
    from powercut import compare
    from powercut.faults import sweep
    from powercut.report import document
    from powercut.report import errors as report
    from powercut.report.text import progress
    from powercut.verdict import worst

    def chosen(**values: object) -> dict[str, object]:
        return {name: value for name, value in values.items() if value}

    only = chosen(below=below, event=event, werror=werror, error=error and [error], lasting=lasting and [lasting])
    more = chosen(size=size, backing=backing) | {"errors": only}
    if operations:
        kinds = [word for word in extra.split(",") if word]
        more["workload"] = {"operations": operations, "seed": seed, "with": kinds, "depth": depth}
    scenarios = [sweep.scenario_of(format, named_values(options), depth, **more) for format in formats or sweep.FORMATS]
    folder = save or Path("powercut-errors")

    def swept(said: bool = True, within: str = "") -> list[tuple[sweep.Result, list[Path]]]:
        results = []
        for scenario in scenarios:
            with progress(f"failing {scenario.format}") as show_progress:
                result = sweep.run(scenario, jobs=jobs, progress=show_progress)
            saved = sweep.save(result, folder / within)
            results.append((result, saved))
            if said:
                click.echo(report.text(result, saved))
        return results

    def side(qemu: str) -> compare.Worked:
        results = swept(said=False, within=f"qemu-{qemus.index(qemu) + 1}")
        code = worst(result.verdict for result, _ in results).exit_code
        return compare.Worked(code, report.cells([result for result, _ in results]), report.document(results))

    if len(qemus) > 1:
        compared(qemus, side, json_path)
    with compare.using(qemus[0] if qemus else None):
        results = swept(said=json_path != "-")
    document.write(report.document(results), json_path)
    sys.exit(worst(result.verdict for result, _ in results).exit_code)
