"""`powercut import`."""

from __future__ import annotations

from pathlib import Path

import click

from powercut.commands import JSON


@click.command("import")
@click.argument("log")
@click.option("--base", required=True, metavar="BEFORE.img", help="The image as it was when logging began.")
@click.option("--out", required=True, type=click.Path(dir_okay=False, path_type=Path), help="The trace to write.")
@click.option("--format", "format_name", default="qcow2", show_default=True, help="The image's format.")
@JSON
def import_(log: str, base: str, out: Path, format_name: str, json_path: str | None) -> None:
    """Make a trace of LOG, a dm-log-writes file as QEMU's blklogwrites writes it."""
    from powercut.recording.record import import_trace
    from powercut.report import document
    from powercut.report.text import count

    events = import_trace(log, base, out, format_name)
    if json_path != "-":
        click.echo(f"{out}: {count(events, 'event')}, in the order of completion")
    document.write({"schema": "powercut.import/1", "trace": str(out), "events": events}, json_path)
