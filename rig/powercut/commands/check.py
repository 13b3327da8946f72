"""`powercut check`."""

from __future__ import annotations

import sys

import click

from powercut.commands import JSON


@click.command()
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
