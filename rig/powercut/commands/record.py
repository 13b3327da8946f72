"""`powercut record`."""

from __future__ import annotations

from pathlib import Path

import click

from powercut.commands import JSON, named_values


@click.command()
@click.argument("format")
@click.option("--ops", default=1000, show_default=True, type=click.IntRange(1), help="How many operations.")
@click.option("--seed", default=7, show_default=True, help="What they are drawn from.")
@click.option("--with", "extra", default="", metavar="KINDS", help="Also: zero, discard (with a comma between).")
@click.option("--depth", default=4, show_default=True, type=click.IntRange(1), help="Requests in flight at once.")
@click.option("--size", default="256M", show_default=True, help="Size of the guest's disk.")
@click.option("--option", "options", multiple=True, metavar="NAME=VALUE", help="An option of qemu-img create -o.")
@click.option("--backing", metavar="SIZE", help="Put the image on a raw backing file of this size.")
@click.option(
    "--lie", type=click.Choice(["flush", "order"]), multiple=True, help="Acknowledge this without doing it (a control)."
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

    from powercut.recording import record as recorder
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
            "options": named_values(options),
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
