"""`powercut capture`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from powercut.commands import JSON


@click.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@click.option("--dir", "directories", multiple=True, metavar="DIR", help="What to watch.  [default: where you are]")
@click.option("--image", metavar="NAME", help="The file that is the disk image under test.")
@click.option("--format", "format_name", help="The image's format, for the trace to remember.")
@click.option("--recorder", type=click.Choice(["preload", "strace"]), help="[default: strace only without a compiler]")
@click.option("--out", required=True, type=click.Path(dir_okay=False, path_type=Path), help="The trace to write.")
@JSON
def capture(
    command: tuple[str, ...],
    directories: tuple[str, ...],
    image: str | None,
    format_name: str | None,
    recorder: str | None,
    out: Path,
    json_path: str | None,
) -> None:
    """Run COMMAND (after --) and record what it does to the files under DIR.

    Exits 2 if COMMAND failed; the trace is kept.
    """
    from powercut.capture import program
    from powercut.report import document
    from powercut.report.text import count

    result = program.capture(command, directories or (".",), out, image=image, format=format_name, recorder=recorder)
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
