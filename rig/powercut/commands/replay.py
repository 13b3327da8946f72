"""`powercut replay`."""

from __future__ import annotations

import sys

import click

from powercut.commands import JSON


@click.command()
@click.argument("finding")
@click.option("--out", required=True, metavar="FILE", help="The crash image to write.")
@click.option("--trace", "trace_path", help="Where the trace is, if it was moved.")
@JSON
def replay(finding: str, out: str, trace_path: str | None, json_path: str | None) -> None:
    """Write the crash image of a FINDING, and find its fault again in it."""
    from powercut.explore import replay as replayer
    from powercut.report import document

    result = replayer.replay(finding, out, trace_path)
    if json_path != "-":
        click.echo(result.text)
    document.write(result.document, json_path)
    sys.exit(0 if result.confirmed else 3)
