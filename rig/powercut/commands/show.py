"""`powercut show`."""

from __future__ import annotations

import click

from powercut.commands import JSON


@click.command()
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
