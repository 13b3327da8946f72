"""`powercut loop`."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import click

from powercut.commands import BISECT, JSON, QEMU, compared, named_values


@click.command()
@click.argument("format", required=False)
@click.option("--ending", default="quit", show_default=True, help="How each guest ends; a wrong name lists all.")
@click.option("--loops", default=100, show_default=True, type=click.IntRange(1), help="How many loops.")
@click.option("--until-proof", metavar="RATE", help="Go on until a failure rate of 0.5% or 0.005, say, is refuted.")
@click.option(
    "--ops", default=200, show_default=True, type=click.IntRange(1), help="Operations for each disk and loop."
)
@click.option("--seed", default=7, show_default=True, help="What operations and moments are drawn from.")
@click.option("--with", "extra", default="", metavar="KINDS", help="Also: zero, discard (with a comma between).")
@click.option("--depth", default=16, show_default=True, type=click.IntRange(1, 64), help="Requests in flight at once.")
@click.option("--moment", type=click.IntRange(1), help="End after so many answers.  [default: drawn for each loop]")
@click.option("--size", default="64M", show_default=True, help="Size of each of the guest's disks.")
@click.option("--option", "options", multiple=True, metavar="NAME=VALUE", help="An option of qemu-img create -o.")
@click.option("--backing", metavar="SIZE", help="Put each image on a read-only backing file of this size.")
@click.option("--filesystem", help="ext4: files are written, fsynced and renamed, in place of requests to the disk.")
@click.option("--host", help="Images lie on a new ext4, xfs or btrfs, where root may mount.  [default: in TMPDIR]")
@click.option("--fresh", is_flag=True, help="New images for each loop.  [default: the same again]")
@click.option(
    "--start", default="restore", show_default=True, help="restore (from a template in memory), plug or boot."
)
@click.option("--device", help="virtio-blk, virtio-scsi, ide or nvme.  [default: virtio-blk; ide with --disk]")
@click.option("--disks", default=1, show_default=True, type=click.IntRange(1, 4), help="How many disks.")
@click.option(
    "--cache", default="writeback", show_default=True, help="writeback, none, writethrough, directsync or unsafe."
)
@click.option("--aio", default="threads", show_default=True, help="threads, native or io_uring.")
@click.option("--no-discard", is_flag=True, help="QEMU ignores the guest's discards.")
@click.option("--cpu", help="The guest's processor (-cpu).")
@click.option("--memory", type=click.IntRange(64), help="The guest's memory in MiB.  [default: 96; 1024 with --disk]")
@click.option(
    "--disk", metavar="IMAGE", help="A disk that boots by itself, in place of FORMAT: guests get overlays on it."
)
@click.option(
    "--after", type=click.FloatRange(0, min_open=True), help="With --disk: seconds.  [default: drawn, 10 to 40]"
)
@QEMU
@BISECT
@click.option("--accelerator", type=click.Choice(["tcg", "kvm"]), help="[default: kvm where a probe guest booted]")
@click.option("--jobs", type=click.IntRange(1), help="Guests at once.  [default: one more than there are cores]")
@click.option(
    "--save", type=click.Path(path_type=Path), default=Path("powercut-loop"), show_default=True, metavar="DIR",
    help="Where loops that failed are kept.",
)  # fmt: skip
@click.option("--replay", type=click.Path(path_type=Path), metavar="DIR", help="Run a kept loop once more.")
@JSON
def loop(
    format: str | None,
    replay: Path | None,
    qemus: tuple[str, ...],
    bisect: bool,
    accelerator: str | None,
    loops: int,
    until_proof: str | None,
    jobs: int | None,
    save: Path,
    json_path: str | None,
    **described: Any,
) -> None:
    """Start a real guest on a disk of FORMAT, let it write, end it, look at what is left; again and again.

    Exits 0 if no loop failed (CLEAN: how much that proves is printed), 1 if one did, 3 if the guests gave no answer.
    """
    from powercut import compare
    from powercut.loops import loop as looping
    from powercut.report import document
    from powercut.report import loop as report
    from powercut.report.text import progress

    if sum(given is not None for given in (format, described["disk"], replay)) != 1:
        raise click.UsageError("give a FORMAT, --disk IMAGE, or --replay DIR")

    def looped(qemu: str | None, save: Path) -> looping.Outcome:
        scenario = _scenario(format, loops, described)
        running = looping.Loops(scenario, qemu=compare.system(qemu), accelerator=accelerator)
        proof = _rate(until_proof) if until_proof else None
        with progress(lambda: report.title(running.outcome)) as show:
            return running.run(
                loops=loops, proof=proof, jobs=jobs, save=save, progress=lambda so_far, of: show(so_far.loops, of)
            )

    def side(qemu: str) -> compare.Worked:
        outcome = looped(qemu, save / f"qemu-{qemus.index(qemu) + 1}")
        return compare.Worked(outcome.exit_code, report.cells(outcome), report.document(outcome, looping.SCHEMA))

    if replay is None and len(qemus) > 1:
        compared(qemus, side, json_path)
    qemu = qemus[0] if qemus else None
    with compare.using(qemu):
        if replay is None:
            outcome = looped(qemu, save)
        else:
            scenario, number, operation, images = looping.load(replay)
            again = looping.Loops(scenario, qemu=compare.system(qemu), accelerator=accelerator)
            outcome = again.replay(replay, images, number, operation, save)
    document.write(report.document(outcome, looping.SCHEMA), json_path)
    if json_path != "-":
        click.echo(report.text(outcome))
    sys.exit(outcome.exit_code)


def _scenario(format: str | None, loops: int, described: dict[str, Any]) -> Any:
    from powercut.scenario import from_options

    disk = described["disk"]
    return from_options(
        {
            "about": "",
            "expect": "CLEAN",
            "format": format or "qcow2",
            "size": described["size"],
            "options": named_values(described["options"]),
            "backing": described["backing"],
            "workload": {
                "operations": described["ops"],
                "seed": described["seed"],
                "with": [kind for kind in described["extra"].split(",") if kind],
                "depth": described["depth"],
            },
            "loop": {
                "ending": described["ending"],
                "loops": loops,
                "start": described["start"],
                "device": described["device"] or ("ide" if disk else "virtio-blk"),
                "cache": described["cache"],
                "aio": described["aio"],
                "discard": not described["no_discard"],
                "disks": described["disks"],
                "fresh": described["fresh"],
                "moment": described["moment"],
                "cpu": described["cpu"],
                "memory": described["memory"] or (1024 if disk else 96),
                "filesystem": described["filesystem"],
                "host": described["host"],
                "disk": disk,
                "after": described["after"],
            },
        }
    )


def _rate(text: str) -> float:
    """0.005 from "0.5%" or "0.005"."""
    match = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*(%?)", text)
    rate = float(match[1]) / (100 if match[2] else 1) if match else 0.0
    if not 0 < rate < 1:
        raise click.BadParameter(f"{text!r} is not a rate such as 0.5% or 0.005", param_hint="--until-proof")
    return rate
