"""`powercut races`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from powercut.commands import JSON, SAVE, named_values


@click.command()
@click.argument("format", required=False)
@click.option("--length", default=2, show_default=True, type=click.IntRange(0, 6), help="Operations in a history.")
@click.option("--holds", default=1, show_default=True, type=click.IntRange(0, 3), help="Requests held at once.")
@click.option(
    "--random",
    "samples",
    default=60,
    show_default=True,
    type=click.IntRange(0),
    help="So many long random cases besides.",
)
@click.option("--seed", default=7, show_default=True, help="What random cases are drawn from.")
@click.option(
    "--with",
    "extra",
    metavar="KINDS",
    help="Besides writes, reads and flushes: zero, discard, snapshot, with a comma between.  [default: all]",
)
@click.option("--overlap", is_flag=True, help="The guest may change sectors that it is changing already.")
@click.option("--start", "starts", default="", metavar="STARTS", help="Only from these starts.  [default: all]")
@click.option("--option", "options", multiple=True, metavar="NAME=VALUE", help="An option of qemu-img create -o.")
@click.option("--lie", type=click.Choice(["drop", "misplace", "stale"]), help="Spoil what was held (a control).")
@click.option("--time", "limit", type=click.FloatRange(0), help="Seconds after which nothing new is begun.")
@click.option("--jobs", default=2, show_default=True, type=click.IntRange(1), help="Processes to use.")
@click.option("--replay", "bundle", type=click.Path(path_type=Path), metavar="FILE", help="Run a finding again.")
@click.option("--out", type=click.Path(path_type=Path), metavar="IMAGE", help="With --replay: the image it leaves.")
@click.option("--tries", default=5, show_default=True, type=click.IntRange(1), help="How often, with --replay.")
@SAVE
@JSON
def races(
    format: str | None,
    length: int,
    holds: int,
    samples: int,
    seed: int,
    extra: str | None,
    overlap: bool,
    starts: str,
    options: tuple[str, ...],
    lie: str | None,
    limit: float | None,
    jobs: int,
    bundle: Path | None,
    out: Path | None,
    tries: int,
    save: Path | None,
    json_path: str | None,
) -> None:
    """Hold requests of a real QEMU writing FORMAT while its guest goes on, and judge what comes of it.

    With --replay: exits 1 if the fault happens again, else 3.
    """
    from powercut.faults import races as racing
    from powercut.faults.inflight import KINDS, Plan
    from powercut.report import document
    from powercut.report import races as report
    from powercut.report.text import progress

    if bundle is not None:
        found, seen, tools = racing.replay(bundle, tries, out)
        if json_path != "-":
            click.echo(report.replayed(found, bundle, seen, tries, tools))
        again = {"schema": "powercut.faults.races-replay/1", "file": str(bundle), "kind": found.kind}
        document.write(again | {"seen": seen, "of": tries, "tools": tools}, json_path)
        sys.exit(1 if seen else 3)
    if format is None or out is not None:
        raise click.UsageError("give a FORMAT, or --replay FILE and then perhaps --out IMAGE")

    def words(text: str) -> tuple[str, ...]:
        return tuple(word for word in text.split(",") if word)

    pairs = tuple(named_values(options).items())
    kinds = KINDS.get(format, ()) if extra is None else words(extra)
    plan = Plan(format, pairs, kinds, words(starts), length, holds, seed, lie, overlap)
    with progress("racing") as show_progress:
        result = racing.run(plan, samples=samples, jobs=jobs, limit=limit, progress=show_progress)
    saved = report.save(result, save or Path("powercut-races"))
    if json_path != "-":
        click.echo(report.text(result, saved))
    document.write(report.document(result, saved), json_path)
    sys.exit(result.verdict.exit_code)
