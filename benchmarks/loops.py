"""What loops of real guests cost, and whether anything is left behind.

    python benchmarks/loops.py [--loops N]

Loops are full cycles: a new image, a restored guest, 200 operations (the end comes at a moment drawn within them),
quit, and everything that is looked at afterwards. Nothing here passes or fails.
"""

from __future__ import annotations

import os
import resource
import statistics
import tempfile
import time
from pathlib import Path

import click
from rows import row

from powercut.capture import recorded
from powercut.capture.filetree import Tree
from powercut.capture.program import build
from powercut.guest import start
from powercut.guest.hardware import Disk, Hardware
from powercut.guest.images import CACHES, Image
from powercut.guest.kernel import kernel
from powercut.guest.ledger import Ledger
from powercut.guest.workload import Operation
from powercut.guest.writing import Writing
from powercut.loops.cycle import Lane
from powercut.loops.loop import Loops
from powercut.scenario import Loop, Scenario, Workload
from powercut.scratch import scratch
from powercut.trace import SECTOR, Kind

SIZE = 256 << 20


def described(**of: object) -> Scenario:
    return Scenario("", "CLEAN", size="64M", workload=Workload(operations=200, depth=16), loop=Loop(**of))  # type: ignore[arg-type]


def left() -> dict[str, int]:
    """What a leak would show in."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() >> 20
    folders = list(Path(tempfile.gettempdir()).glob("powercut-guest-*"))
    descriptors = len(os.listdir("/proc/self/fd"))
    return {"processes": len(children), "descriptors": descriptors, "folders": len(folders), "MiB resident": resident}


def cpu() -> float:
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def loops(number: int, save: Path) -> None:
    loops = Loops(described(fresh=True))
    loops.run(loops=6, save=save)  # makes the template
    before, used = left(), cpu()
    again = Loops(described(fresh=True))
    outcome = again.run(loops=number, save=save)
    row(f"{number:,} restored loops, quit", f"{outcome.rate:.1f} /s", "at least 8 /s")
    row("1,000 of them, at that rate", f"{1000 / outcome.rate:.0f} s", "under 150 s")
    row("processor time of one", f"{(cpu() - used) / number:.2f} s")
    row("verdict", outcome.word, "CLEAN")
    after = left()
    for what, count in after.items():
        row(
            f"{what}, before and after",
            f"{before[what]}, {count}",
            "the same" if what != "MiB resident" else "no growth",
        )


def boots() -> None:
    with scratch() as folder:
        lane = Lane(described(start="boot", fresh=True), Hardware("tcg", kernel()), folder)
        seconds = [lane.run(number).seconds for number in range(5)]
    row("a booted loop, median of 5", f"{statistics.median(seconds):.1f} s", "under 3 s")


def working(folder: Path, image: Image, environment: dict[str, str] | None) -> float:
    """Seconds that a guest takes for 3,000 writes of 4 KiB, flushed each 50."""
    disk = Disk(image.node(CACHES["writeback"], "threads", discard=True), SIZE)
    home = folder / "machine"
    home.mkdir(exist_ok=True)
    operations = [
        (0, Operation(Kind.FLUSH) if i % 51 == 50 else Operation(Kind.WRITE, i * 73 * 4096 % SIZE, 4096))
        for i in range(3060)
    ]
    with start.restore(Hardware("tcg", kernel()), [disk], home, environment) as machine:
        begin = time.monotonic()
        Writing(machine.agent, [Ledger(SIZE // SECTOR)], operations, 16, 1).run()
        seconds = time.monotonic() - begin
        machine.ask("quit")
        machine.wait_end()
    return seconds


def shim(rounds: int) -> None:
    """A guest with and without the recorder in QEMU, in interleaved rounds."""
    library, ratios, bytes_logged = build(), [], 0
    for _ in range(rounds):
        with scratch() as folder, tempfile.TemporaryDirectory(prefix="powercut-") as log:
            image = Image(folder / "disk.qcow2", "qcow2", SIZE)
            image.create({})
            plain = working(folder, image, None)
            image.create({})
            recorded.make_control(Path(log), [str(folder)], Tree([str(folder)], set()).live)
            seconds = working(folder, image, {"LD_PRELOAD": str(library), "POWERCUT_CAPTURE": log})
            ratios.append(seconds / plain)
            bytes_logged = sum(path.stat().st_blocks * 512 for path in Path(log).iterdir())
    row(
        "a guest's work with the recorder in QEMU, over without",
        f"{statistics.median(ratios):.2f} times",
        "at most 1.1",
    )
    row("what it logged meanwhile", f"{bytes_logged >> 20} MiB", "12 MiB are the guest's")


@click.command()
@click.option("--loops", "number", default=60, show_default=True, type=click.IntRange(1))
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(1))
def main(number: int, rounds: int) -> None:
    with tempfile.TemporaryDirectory(prefix="powercut-") as save:
        loops(number, Path(save))
    boots()
    shim(rounds)


if __name__ == "__main__":
    main()
