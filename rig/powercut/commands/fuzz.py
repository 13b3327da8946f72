"""`powercut fuzz`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from powercut.commands import JSON


@click.command()
@click.argument("format")
@click.option("--time", "limit", metavar="TIME", help="Draw no more after this: 90s, 5m, 1h.  [default: 1m]")
@click.option("--examples", type=click.IntRange(1), help="Draw no more after this many recordings.")
@click.option("--seed", type=int, help="What histories are drawn from.  [default: another one each time]")
@click.option(
    "--with",
    "extra",
    metavar="KINDS",
    help="Besides writes, flushes and reopens: zero, discard, snapshot, resize, with a comma between.  [default: all]",
)
@click.option("--systematic", type=click.IntRange(1), metavar="N", help="All histories of up to N operations.")
@click.option(
    "--lie", type=click.Choice(["flush", "order"]), multiple=True, help="Acknowledge this without doing it (a control)."
)
@click.option("--jobs", type=click.IntRange(1), help="Processes to use (systematic only).  [default: all cores]")
@click.option(
    "--save",
    type=click.Path(path_type=Path),
    default=Path("powercut-fuzz"),
    show_default=True,
    metavar="DIR",
    help="Where scenarios of what was found are written.",
)
@JSON
def fuzz(
    format: str,
    limit: str | None,
    examples: int | None,
    seed: int | None,
    extra: str | None,
    systematic: int | None,
    lie: tuple[str, ...],
    jobs: int | None,
    save: Path,
    json_path: str | None,
) -> None:
    """Try short histories on FORMAT, and shrink one that breaks to the shortest.

    Exits 1 if one was found; else 3 (UNKNOWN: a sample is no proof), or 0 if all that --systematic names held.
    """
    from powercut import fuzz as fuzzer
    from powercut.report import document
    from powercut.report import fuzz as report
    from powercut.report.text import progress

    with progress("trying") as show:
        result = fuzzer.search(
            format,
            save,
            extra=extra,
            limit=limit,
            seed=seed,
            examples=examples,
            longest=systematic,
            lie=lie,
            jobs=jobs,
            progress=show,
        )
    if json_path != "-":
        click.echo(report.text(result))
    document.write(report.document(result), json_path)
    sys.exit(result.verdict.exit_code)
