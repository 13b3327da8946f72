"""`powercut rescue`."""

from __future__ import annotations

import sys

import click

from powercut.commands import JSON


@click.command()
@click.argument("image")
@click.option("--out", required=True, metavar="NEW", help="The new image. It must not exist yet.")
@click.option("--size", type=int, metavar="BYTES", help="The size of the guest's disk.  [default: guessed]")
@click.option("--backing", metavar="FILE", help="The backing file, as the lost header named it.")
@click.option("--backing-format", metavar="FORMAT", help="The backing file's format.")
@JSON
def rescue(
    image: str, out: str, size: int | None, backing: str | None, backing_format: str | None, json_path: str | None
) -> None:
    """Write what is left of a damaged qcow2 IMAGE as a new image: exit 0 nothing is lost, 1 something is."""
    from powercut import rescue as module
    from powercut.report import document

    result = module.rescue(image, out, module.Known(size, backing, backing_format))
    if json_path != "-":
        click.echo(result.text)
    document.write(result.document, json_path)
    sys.exit(result.exit_code)
