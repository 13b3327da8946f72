"""`powercut explore`."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click

from powercut.commands import JOBS, JSON, SAVE

if TYPE_CHECKING:
    from powercut.explore.sets import SetPlan

PROGRAM_BUDGET = 50_000  # checks by a program, each of which may be a run of it: some minutes


@click.command()
@click.argument("trace")
@click.option("--format", "format_name", help="The image's format.  [default: what the trace says]")
@click.option(
    "--atom",
    type=click.Choice(["512", "4096", "write"]),
    default="512",
    show_default=True,
    help="Bytes the disk writes in one piece; or whole writes.",
)
@click.option(
    "--order",
    type=click.Choice(["any", "issue"]),
    default="any",
    show_default=True,
    help="Any writes in flight survive; or a prefix of them, as they were issued.",
)
@click.option(
    "--torn",
    type=click.Choice(["old-or-new", "zeros", "garbage"]),
    default="old-or-new",
    show_default=True,
    help="What an atom in flight may hold besides: zeros, or garbage.",
)
@click.option(
    "--directory",
    type=click.Choice(["posix", "ordered"]),
    default="posix",
    show_default=True,
    help="Of several files: each change of a name survives by itself; or a prefix of them.",
)
@click.option("--sizes/--no-sizes", default=True, show_default=True, help="Of several files: sizes may be lost.")
@click.option(
    "--checker", metavar="CMD", help="Let this command judge: {} is the image, {dir} a directory of all files."
)
@click.option("--image", metavar="NAME", help="Of several files, the one that {} stands for.")
@click.option(
    "--recovery-depth",
    type=click.IntRange(0),
    default=1,
    show_default=True,
    help="Explore crashes inside what the checker writes.",
)
@click.option(
    "--lying-flushes",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="So many of the last flushes before each crash did nothing.",
)
@click.option(
    "--budget",
    type=click.IntRange(1),
    help=f"At most this many checks.  [default: until exhausted; with --checker {PROGRAM_BUDGET:,}]",
)
@click.option(
    "--rule",
    "rules",
    type=click.Choice(["opens", "structure", "acknowledged"]),
    multiple=True,
    help="Judge only this rule (opens is always judged).  [default: all]",
)
@click.option(
    "--media",
    type=click.Choice(["flip", "zero", "read-error", "lost-write", "misdirected-write", "all"]),
    multiple=True,
    help="Lay media faults of this kind on crash states, one at a time.",
)
@click.option("--faults", type=click.IntRange(1), default=20, show_default=True, help="So many of each kind.")
@click.option("--seed", type=int, default=1, show_default=True, help="What is drawn, is drawn with this.")
@JOBS
@click.option("--cluster", metavar="ADDRESS", help="Use the workers of the Dask scheduler there instead.")
@click.option("--resume", is_flag=True, help="Go on where an exploration of TRACE was cut off (TRACE.progress).")
@SAVE
@JSON
def explore(
    trace: str,
    format_name: str | None,
    atom: str,
    order: str,
    torn: str,
    directory: str,
    sizes: bool,
    checker: str | None,
    image: str | None,
    recovery_depth: int,
    lying_flushes: int,
    budget: int | None,
    rules: tuple[str, ...],
    media: tuple[str, ...],
    faults: int,
    seed: int,
    jobs: int | None,
    cluster: str | None,
    resume: bool,
    save: Path | None,
    json_path: str | None,
) -> None:
    """Visit every crash state of TRACE and say HOLDS, BROKEN or UNKNOWN."""
    from powercut.crash.media import KINDS
    from powercut.crash.options import Options, atom_of
    from powercut.explore import run
    from powercut.explore.session import RULES, Plan
    from powercut.explore.sets import SetPlan
    from powercut.report import document, outcome
    from powercut.report.text import progress
    from powercut.trace import Trace

    if checker and budget is None:
        budget = PROGRAM_BUDGET
    recording = Trace(trace)
    grain, whole = atom_of(atom)
    if recording.file("image") is None:
        options = Options(grain, lying_flushes, directory, sizes, whole, order, torn)
        _several(SetPlan(trace, options, checker, image, recovery_depth, seed), budget, jobs, save, json_path)
    format_name = format_name or str(recording.meta.get("format", ""))
    if not format_name:
        raise click.UsageError(f"{trace} does not say which format it is of: give --format")
    plan = Plan(
        trace,
        format_name,
        grain,
        rules or RULES,
        checker=checker,
        recovery_depth=recovery_depth,
        lying=lying_flushes,
        seed=seed,
        whole=whole,
        order=order,
        torn=torn,
    )
    begin = time.monotonic()
    plan = run.with_faults(plan, KINDS if "all" in media else media, faults, seed)
    with progress("exploring") as show_progress:
        result = run.explore_trace(
            plan,
            budget=budget,
            jobs=jobs,
            cluster=cluster,
            journal=Path(f"{trace}.progress"),
            resume=resume,
            progress=show_progress,
        )
    saved = outcome.save(result.findings, save or Path(f"{trace}.findings"))
    if json_path != "-":
        click.echo(outcome.text(result, saved, time.monotonic() - begin))
    document.write(outcome.document(result, saved), json_path)
    sys.exit(result.verdict.exit_code)


def _several(plan: SetPlan, budget: int | None, jobs: int | None, save: Path | None, json_path: str | None) -> NoReturn:
    """Explore all files of a recording."""
    from powercut.explore import sets
    from powercut.report import document, outcome
    from powercut.report import sets as report
    from powercut.report.text import progress

    begin = time.monotonic()
    with progress("exploring") as show:
        result = sets.explore_set(plan, budget=budget, jobs=jobs, progress=show)
    saved = outcome.save(result.findings, save or Path(f"{plan.trace}.findings"))
    if json_path != "-":
        click.echo(report.text(result, saved, time.monotonic() - begin))
    document.write(report.document(result, saved), json_path)
    sys.exit(result.verdict.exit_code)
