"""The command line. Exit codes: 0 HOLDS or clean, 1 BROKEN or damaged, 2 usage or environment, 3 UNKNOWN.

Commands import what they need when they run: `--help` costs nothing.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import click

from powercut import __version__
from powercut.errors import PowercutError

JSON = click.option("--json", "json_path", metavar="FILE", help="Write the result as JSON (- is standard output).")
SAVE = click.option("--save", type=click.Path(path_type=Path), metavar="DIR", help="Where findings are kept.")
JOBS = click.option("--jobs", type=click.IntRange(1), help="Processes to use.  [default: all cores]")


class _Group(click.Group):
    """Turns the rig's own errors into one sentence and exit code 2."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except PowercutError as error:
            click.echo(f"powercut: {error}", err=True)
            ctx.exit(2)
        except KeyboardInterrupt:
            click.echo("powercut: interrupted; nothing was concluded", err=True)
            ctx.exit(3)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__)
def main() -> None:
    """Pull the plug on a disk image at every possible instant, and show what survives."""


@main.command()
@JSON
def doctor(json_path: str | None) -> None:
    """Show what this machine has, and what is missing for what."""
    from powercut.doctor import examine
    from powercut.report import document

    findings = examine()
    if json_path != "-":
        for item in findings:
            colour = {"ok": "green", "missing": "red", "limited": "yellow"}[item.state]
            click.echo(f"{click.style(f'{item.state:8}', fg=colour)} {item.name:24} {item.detail}")
            if item.state != "ok":
                click.echo(f"{'':9}{'':24} for {item.needed_for}; {item.mend}")
    items = [
        {"name": i.name, "state": i.state, "detail": i.detail, "needed_for": i.needed_for, "mend": i.mend}
        for i in findings
    ]
    document.write({"schema": "powercut.doctor/1", "findings": items}, json_path)


def _options(pairs: tuple[str, ...]) -> dict[str, str]:
    options = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise click.BadParameter(f"{pair!r} is not NAME=VALUE", param_hint="--option")
        options[name] = value
    return options


@main.command()
@click.argument("format")
@click.option("--ops", default=1000, show_default=True, type=click.IntRange(1), help="How many operations.")
@click.option("--seed", default=7, show_default=True, help="What they are drawn from.")
@click.option("--with", "extra", default="", metavar="KINDS", help="Also: zero, discard (with a comma between).")
@click.option("--depth", default=4, show_default=True, type=click.IntRange(1), help="Requests in flight at once.")
@click.option("--size", default="256M", show_default=True, help="Size of the guest's disk.")
@click.option("--option", "options", multiple=True, metavar="NAME=VALUE", help="An option of qemu-img create -o.")
@click.option("--backing", metavar="SIZE", help="Put the image on a raw backing file of this size.")
@click.option(
    "--lie", type=click.Choice(["flush"]), multiple=True, help="Acknowledge this without doing it (a control)."
)
@click.option(
    "--via", type=click.Choice(["nbd", "blklogwrites"]), default="nbd", show_default=True, help="What records."
)
@click.option("--no-flush", is_flag=True, help="cache.no-flush=on on every node (a control; blklogwrites only).")
@click.option("--out", required=True, type=click.Path(dir_okay=False, path_type=Path), help="The trace to write.")
@JSON
def record(
    format: str,
    ops: int,
    seed: int,
    extra: str,
    depth: int,
    size: str,
    options: tuple[str, ...],
    backing: str | None,
    lie: tuple[str, ...],
    via: str,
    no_flush: bool,
    out: Path,
    json_path: str | None,
) -> None:
    """Let a real QEMU write an image of FORMAT, and record everything it asks of the disk."""
    import msgspec

    from powercut import record as recorder
    from powercut.report import document
    from powercut.report.text import count, progress
    from powercut.scenario import from_options
    from powercut.trace import Trace

    kinds = [kind for kind in extra.split(",") if kind]
    scenario = from_options(
        {
            "about": "",
            "expect": "HOLDS",
            "format": format,
            "size": size,
            "options": _options(options),
            "backing": backing,
            "workload": {"operations": ops, "seed": seed, "with": kinds, "depth": depth},
            "record": {"via": via, "lie": list(lie), "no_flush": no_flush},
        }
    )
    with progress("recording") as show:
        recorder.record(scenario, out, show)
    trace = Trace(out)
    image = trace.file("image")
    assert image is not None
    events = int((trace.events["file"] == image.id).sum())
    if json_path != "-":
        click.echo(f"{out}: {count(ops, 'operation')} of a guest became {count(events, 'event')} on a {format} image")
    result = {"schema": "powercut.record/1", "trace": str(out), "hash": trace.hash, "events": events}
    document.write(result | {"scenario": msgspec.to_builtins(scenario)}, json_path)


@main.command("import")
@click.argument("log")
@click.option("--base", required=True, metavar="BEFORE.img", help="The image as it was when logging began.")
@click.option("--out", required=True, type=click.Path(dir_okay=False, path_type=Path), help="The trace to write.")
@click.option("--format", "format_name", default="qcow2", show_default=True, help="The image's format.")
@JSON
def import_(log: str, base: str, out: Path, format_name: str, json_path: str | None) -> None:
    """Make a trace of LOG, a dm-log-writes file as QEMU's blklogwrites writes it."""
    from powercut.record import import_trace
    from powercut.report import document
    from powercut.report.text import count

    events = import_trace(log, base, out, format_name)
    if json_path != "-":
        click.echo(f"{out}: {count(events, 'event')}, in the order of completion")
    document.write({"schema": "powercut.import/1", "trace": str(out), "events": events}, json_path)


@main.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@click.option("--dir", "directories", multiple=True, metavar="DIR", help="What to watch.  [default: where you are]")
@click.option("--image", metavar="NAME", help="The file that is the disk image under test.")
@click.option("--format", "format_name", help="The image's format, for the trace to remember.")
@click.option("--out", required=True, type=click.Path(dir_okay=False, path_type=Path), help="The trace to write.")
@JSON
def capture(
    command: tuple[str, ...],
    directories: tuple[str, ...],
    image: str | None,
    format_name: str | None,
    out: Path,
    json_path: str | None,
) -> None:
    """Run COMMAND (after --) and record what it does to the files under DIR.

    Exits 2 if COMMAND failed; the trace is kept.
    """
    from powercut.capture import program
    from powercut.report import document
    from powercut.report.text import count

    result = program.capture(command, directories or (".",), out, image=image, format=format_name)
    for warning in result.warnings:
        click.echo(f"powercut: warning: {warning}", err=True)
    if json_path != "-":
        click.echo(f"{out}: {count(result.events, 'event')} on {count(result.files, 'file')}", err=True)
    if result.status:
        how = f"exit status {result.status}" if result.status > 0 else f"signal {-result.status}"
        ways = f"; the recorder refused it {', '.join(result.refused)}" if result.refused else ""
        click.echo(f"powercut: {command[0]} ended with {how}{ways}", err=True)
    document.write(
        {
            "schema": "powercut.capture/1",
            "trace": str(out),
            "status": result.status,
            "events": result.events,
            "files": result.files,
            "refused": result.refused,
            "warnings": result.warnings,
        },
        json_path,
    )
    sys.exit(2 if result.status else 0)


@main.command()
@click.argument("trace")
@click.option("--events", is_flag=True, help="List every event.")
@JSON
def show(trace: str, events: bool, json_path: str | None) -> None:
    """Show what a trace holds."""
    from powercut.report import document, tracetext
    from powercut.trace import Trace

    opened = Trace(trace)
    if json_path != "-":
        click.echo(tracetext.summary(opened))
        if events:
            for line in tracetext.lines(opened):
                click.echo(line)
    document.write(tracetext.document(opened), json_path)


@main.command()
@click.argument("trace")
@click.option("--format", "format_name", help="The image's format.  [default: what the trace says]")
@click.option(
    "--atom",
    type=click.Choice(["512", "4096"]),
    default="512",
    show_default=True,
    help="Bytes the disk writes in one piece.",
)
@click.option("--checker", metavar="CMD", help="Let this command judge, on an NBD URI ({}, or its last word).")
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
@click.option("--budget", type=click.IntRange(1), help="At most this many checks.  [default: until exhausted]")
@click.option(
    "--rule",
    "rules",
    type=click.Choice(["opens", "structure", "acknowledged"]),
    multiple=True,
    help="Judge only this rule (opens is always judged).  [default: all]",
)
@JOBS
@SAVE
@JSON
def explore(
    trace: str,
    format_name: str | None,
    atom: str,
    checker: str | None,
    recovery_depth: int,
    lying_flushes: int,
    budget: int | None,
    rules: tuple[str, ...],
    jobs: int | None,
    save: Path | None,
    json_path: str | None,
) -> None:
    """Visit every crash state of TRACE and say HOLDS, BROKEN or UNKNOWN."""
    from powercut import run
    from powercut.report import document, outcome
    from powercut.report.text import progress
    from powercut.session import RULES, Plan
    from powercut.trace import Trace

    format_name = format_name or str(Trace(trace).meta.get("format", ""))
    if not format_name:
        raise click.UsageError(f"{trace} does not say which format it is of: give --format")
    plan = Plan(
        trace,
        format_name,
        int(atom),
        rules or RULES,
        checker=checker,
        recovery_depth=recovery_depth,
        lying=lying_flushes,
    )
    begin = time.monotonic()
    with progress("exploring") as show_progress:
        result = run.explore_trace(plan, budget=budget, jobs=jobs, progress=show_progress)
    saved = outcome.save(result.findings, save or Path(f"{trace}.findings"))
    if json_path != "-":
        click.echo(outcome.text(result, saved, time.monotonic() - begin))
    document.write(outcome.document(result, saved), json_path)
    sys.exit(result.verdict.exit_code)


@main.command()
@click.argument("finding")
@click.option("--out", required=True, metavar="FILE", help="The crash image to write.")
@click.option("--trace", "trace_path", help="Where the trace is, if it was moved.")
@JSON
def replay(finding: str, out: str, trace_path: str | None, json_path: str | None) -> None:
    """Write the crash image of a FINDING, and find its fault again in it."""
    from powercut import replay as replayer
    from powercut.report import document

    result = replayer.replay(finding, out, trace_path)
    if json_path != "-":
        click.echo(result.text)
    document.write(result.document, json_path)
    sys.exit(0 if result.confirmed else 3)


@main.command()
@click.argument("finding")
@click.option("--out", required=True, metavar="FILE", help="The bundle to write.")
@click.option("--trace", "trace_path", help="Where the trace is, if it was moved.")
def bundle(finding: str, out: str, trace_path: str | None) -> None:
    """Put a FINDING and its trace into one file, which `replay` reads."""
    from powercut import bundle as bundler

    bundler.write(finding, out, trace_path)
    click.echo(f"{out}: powercut replay {out} --out crash.img")


@main.command()
@click.argument("image")
@click.option("--format", "format_name", help="The format it is known to have.  [default: by its magic or its name]")
@JSON
def check(image: str, format_name: str | None, json_path: str | None) -> None:
    """Check an ordinary IMAGE: exit 0 clean or leaks only, 1 damaged, 2 not an image."""
    from powercut import inspection
    from powercut.report import document

    result = inspection.inspect(image, format_name)
    if json_path != "-":
        click.echo(result.text)
    document.write(result.document, json_path)
    sys.exit(result.exit_code)


@main.command()
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
@JSON
def gate(scenarios: tuple[Path, ...], jobs: int | None, save: Path, json_path: str | None) -> None:
    """Run SCENARIOS (files or folders; default: scenarios/) and compare with what they expect.

    Exits 1 if any result was unexpected, else 3 if any was UNKNOWN or skipped, else 0; 2 if nothing ran.
    """
    from powercut import gate as gatekeeper
    from powercut.report import document

    results = gatekeeper.run_all(scenarios, jobs, save, quiet=json_path == "-")
    document.write(gatekeeper.document(results), json_path)
    sys.exit(gatekeeper.exit_code(results))


@main.command()
@click.argument("format")
@click.option("--time", "limit", metavar="TIME", help="Draw no more after this: 90s, 5m, 1h.  [default: 1m]")
@click.option("--examples", type=click.IntRange(1), help="Draw no more after this many recordings.")
@click.option("--seed", type=int, help="What histories are drawn from.  [default: another one each time]")
@click.option("--with", "extra", default="", metavar="KINDS", help="Also: zero, discard (with a comma between).")
@click.option("--systematic", type=click.IntRange(1), metavar="N", help="All histories of up to N operations.")
@click.option(
    "--lie", type=click.Choice(["flush"]), multiple=True, help="Acknowledge this without doing it (a control)."
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
    extra: str,
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


@main.command()
@click.argument("format", required=False)
@click.option("--length", default=3, show_default=True, type=click.IntRange(0, 6), help="Operations in a history.")
@click.option("--holds", default=1, show_default=True, type=click.IntRange(0, 3), help="Requests held at once.")
@click.option("--random", "samples", default=0, type=click.IntRange(0), help="So many long random cases besides.")
@click.option("--seed", default=7, show_default=True, help="What random cases are drawn from.")
@click.option("--with", "extra", default="", metavar="KINDS", help="Also: zero, discard (with a comma between).")
@click.option("--start", "starts", default="", metavar="STARTS", help="Only from these starts.  [default: all]")
@click.option("--option", "options", multiple=True, metavar="NAME=VALUE", help="An option of qemu-img create -o.")
@click.option("--lie", type=click.Choice(["drop", "misplace", "stale"]), help="Spoil what was held (a control).")
@click.option("--time", "limit", type=click.FloatRange(0), help="Seconds after which nothing new is begun.")
@click.option("--jobs", default=2, show_default=True, type=click.IntRange(1), help="Processes to use.")
@click.option("--replay", "bundle", type=click.Path(path_type=Path), metavar="FILE", help="Run a finding again.")
@click.option("--tries", default=5, show_default=True, type=click.IntRange(1), help="How often, with --replay.")
@SAVE
@JSON
def races(
    format: str | None,
    length: int,
    holds: int,
    samples: int,
    seed: int,
    extra: str,
    starts: str,
    options: tuple[str, ...],
    lie: str | None,
    limit: float | None,
    jobs: int,
    bundle: Path | None,
    tries: int,
    save: Path | None,
    json_path: str | None,
) -> None:
    """Hold requests of a real QEMU writing FORMAT while its guest goes on, and judge what comes of it.

    With --replay: exits 1 if the fault happens again, else 3.
    """
    from powercut import races as racing
    from powercut.inflight import Plan
    from powercut.report import document
    from powercut.report import races as report
    from powercut.report.text import progress

    if bundle is not None:
        found, seen = racing.replay(bundle, tries)
        if json_path != "-":
            click.echo(report.replayed(found, bundle, seen, tries))
        again = {"schema": "powercut.races-replay/1", "file": str(bundle), "kind": found.kind}
        document.write(again | {"seen": seen, "of": tries}, json_path)
        sys.exit(1 if seen else 3)
    if format is None:
        raise click.UsageError("give a FORMAT, or --replay FILE")

    def words(text: str) -> tuple[str, ...]:
        return tuple(word for word in text.split(",") if word)

    pairs = tuple(_options(options).items())
    plan = Plan(format, pairs, words(extra), words(starts), length, holds, seed, lie)
    with progress("racing") as show_progress:
        result = racing.run(plan, samples=samples, jobs=jobs, limit=limit, progress=show_progress)
    saved = report.save(result, save or Path("powercut-races"))
    if json_path != "-":
        click.echo(report.text(result, saved))
    document.write(report.document(result, saved), json_path)
    sys.exit(result.verdict.exit_code)


if __name__ == "__main__":
    main()
