"""What recording a program costs: real programs, with and without the recorder, in interleaved rounds of one run.

    python benchmarks/capture.py [--rounds N]

Each figure is the median of the rounds' ratios: the time the program itself runs, recorded, over unrecorded. What
`powercut capture` does before (copying the files) and after (writing the trace, comparing) is printed beside it. The
same program under strace, the usual way to see such calls, is what the ratio is held against.
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click

from powercut.capture.program import capture

MIB = 1 << 20
STRACE = ["strace", "-f", "-qq", "-o", "/dev/null", "-s", "65536", "-xx", "-e", "trace=desc,file"]


def shell(text: str) -> Callable[[Path], list[str]]:
    return lambda folder: ["sh", "-c", text.replace("DIR", str(folder))]


def database(folder: Path) -> list[str]:
    inserts = "".join(
        f"INSERT INTO t VALUES ({i}, hex(randomblob(200)));" + ("COMMIT; BEGIN;" if i % 20 == 0 else "")
        for i in range(20000)
    )
    (folder.parent / "sql").write_text(f"CREATE TABLE t (a INTEGER PRIMARY KEY, b TEXT); BEGIN; {inserts} COMMIT;")
    return ["sh", "-c", f"sqlite3 {folder}/db < {folder.parent}/sql"]


def guest(cache: str, flushes: int) -> Callable[[Path], list[str]]:
    """20,000 writes of 4 KiB through QEMU's qcow2 driver, 16 at a time, with so many writes from flush to flush."""

    def prepare(folder: Path) -> list[str]:
        image = str(folder / "image")
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, "1G"], check=True)
        often = ["--flush-interval", str(flushes), "--no-drain"]
        how = [
            "-w",
            "-f",
            "qcow2",
            "-t",
            cache,
            "-i",
            "threads",
            "-c",
            "20000",
            "-d",
            "16",
            "-s",
            "4096",
            "-S",
            "49152",
        ]
        return ["qemu-img", "bench", *how, *often, image]

    return prepare


def converted(folder: Path) -> list[str]:
    with open(folder.parent / "raw", "wb") as raw:
        for i in range(128):
            raw.write(bytes([i + 1]) * MIB)
    return ["qemu-img", "convert", "-t", "writeback", "-O", "qcow2", str(folder.parent / "raw"), str(folder / "out")]


WORKLOADS: dict[str, tuple[str, Callable[[Path], list[str]]]] = {
    "qemu-img bench, cache none, flushed each 64": ("qemu-img", guest("none", 64)),
    "qemu-img bench, writeback, flushed each 64": ("qemu-img", guest("writeback", 64)),
    "sqlite3, 20,000 inserts, 1,000 commits": ("sqlite3", database),
    "dd, 2,000 synchronous writes of 4 KiB": (
        "dd",
        shell("dd if=/dev/zero of=DIR/x bs=4k count=2000 oflag=dsync 2>/dev/null"),
    ),
    "qemu-img convert, 128 MiB to qcow2": ("qemu-img", converted),
    "dd, 20,000 writes of 4 KiB, one flush": (
        "dd",
        shell("dd if=/dev/zero of=DIR/x bs=4k count=20000 conv=fdatasync 2>/dev/null"),
    ),
}


def timed(command: list[str]) -> float:
    begin = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begin


@click.command()
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(1))
@click.option("--rival/--no-rival", default=True, help="Run under strace too.")
def main(rounds: int, rival: bool) -> None:
    """Measure what recording costs."""
    every: list[float] = []
    for name, (tool, prepare) in WORKLOADS.items():
        if shutil.which(tool) is None:
            click.echo(f"{name:45} {tool} is not here")
            continue
        plain, ratios, around, rivals = [], [], [], []
        for _ in range(rounds):
            with tempfile.TemporaryDirectory(prefix="powercut-bench-") as scratch:

                def fresh(number: int, scratch: str = scratch) -> Path:
                    folder = Path(scratch) / str(number) / "data"
                    folder.mkdir(parents=True)
                    return folder

                plain.append(timed(prepare(fresh(1))))
                folder = fresh(2)
                command = prepare(folder)
                begin = time.perf_counter()
                result = capture(command, [str(folder)], folder.parent / "trace")
                around.append(time.perf_counter() - begin - result.seconds)
                ratios.append(result.seconds / plain[-1])
                if rival and shutil.which("strace"):
                    rivals.append(timed([*STRACE, *prepare(fresh(3))]) / plain[-1])
        every += ratios
        beside = f"; under strace {statistics.median(rivals):.1f}" if rivals else ""
        click.echo(
            f"{name:45} {statistics.median(ratios):5.2f} times {statistics.median(plain):.2f} s"
            f" (rounds {min(ratios):.2f} to {max(ratios):.2f}); {result.events:,} events;"
            f" before and after {statistics.median(around):.2f} s{beside}"
        )
    click.echo(f"{'all':45} {statistics.median(every):5.2f} times (wanted: at most 1.10)")


if __name__ == "__main__":
    main()
