"""`powercut bundle`."""

from __future__ import annotations

import click


@click.command()
@click.argument("finding")
@click.option("--out", required=True, metavar="FILE", help="The bundle to write.")
@click.option("--trace", "trace_path", help="Where the trace is, if it was moved.")
def bundle(finding: str, out: str, trace_path: str | None) -> None:
    """Put a FINDING and its trace into one file, which `replay` reads."""
    from powercut.explore import bundle as bundler

    bundler.write(finding, out, trace_path)
    click.echo(f"{out}: powercut replay {out} --out crash.img")
