"""Measures Quire beside qcow2 served by qemu-nbd: the same client, the same folder, interleaved rounds of one run.

    python benchmarks/quire_qcow2.py [--rounds N] [--folder DIR]

Nothing here passes or fails: what a figure should be is written beside it. Ratios are of medians.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import click

from powercut.guest.nbd_client import Client
from quire.layout import BLOCK, DATA, default_slots
from quire.nbd_protocol import Command
from quire.sets import Set
from quire.store import RealFile, RealStore

MIB, GIB, TIB = 1 << 20, 1 << 30, 1 << 40
SIZE = GIB
SERVE = "import sys; from quire.cli import main; main(['serve', sys.argv[1], '--socket', sys.argv[2]])"


def row(what: str, figure: str, wanted: str = "") -> None:
    click.echo(f"{what:62} {figure:>26}   {wanted}")


# ---- served, beside qemu-nbd --------------------------------------------------------------------------------


@contextlib.contextmanager
def served(words: list[str], socket: Path) -> Iterator[Client]:
    serving = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not socket.exists():
            time.sleep(0.01)
        time.sleep(0.05)
        with Client(socket) as client:
            yield client
    finally:
        serving.terminate()
        serving.wait()
        socket.unlink(missing_ok=True)


@contextlib.contextmanager
def quire(folder: Path) -> Iterator[Client]:
    (folder / "q").mkdir()
    Set.create(RealStore(folder / "q"), SIZE).close()
    with served([sys.executable, "-c", SERVE, str(folder / "q"), str(folder / "q.sock")], folder / "q.sock") as client:
        yield client


@contextlib.contextmanager
def qcow2(folder: Path) -> Iterator[Client]:
    image, socket = folder / "disk.qcow2", folder / "n.sock"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, str(SIZE)], check=True)
    words = ["qemu-nbd", "-t", "-f", "qcow2", "-k", str(socket), "--cache=writeback", "--discard=unmap", str(image)]
    with served(words, socket) as client:
        yield client


@contextlib.contextmanager
def bare(folder: Path) -> Iterator[Client]:
    words = [sys.executable, str(Path(__file__).with_name("bare_nbd.py"))]
    with served([*words, str(folder / "f"), str(folder / "b.sock"), str(SIZE)], folder / "b.sock") as client:
        yield client


def at_depth(client: Client, requests: list[tuple[Command, int, bytes | int]], depth: int) -> None:
    waiting = 0
    for number, (kind, offset, data) in enumerate(requests):
        if waiting == depth:
            assert client.wait().error == 0
            waiting -= 1
        if isinstance(data, int):
            client.submit(kind, offset, data, tag=number)
        else:
            client.submit(kind, offset, data=data, tag=number)
        waiting += 1
    for _ in range(waiting):
        assert client.wait().error == 0


Work = Callable[[Client, random.Random], int]  # returns how many operations it did


def allocating(client: Client, chance: random.Random) -> int:
    for block in chance.sample(range(SIZE // BLOCK), 400):
        client.write(block * BLOCK, bytes([block % 251 + 1]) * BLOCK)
        client.flush()
    return 400


def prepared(client: Client) -> None:
    for place in range(0, 64 * MIB, MIB):
        client.write(place, b"p" * MIB)
    client.flush()


def overwriting(depth: int) -> Work:
    def work(client: Client, chance: random.Random) -> int:
        data = b"o" * BLOCK
        places = [chance.randrange(64 * MIB // BLOCK) * BLOCK for _ in range(6000)]
        at_depth(client, [(Command.WRITE, place, data) for place in places], depth)
        return 6000

    return work


def reading(depth: int) -> Work:
    def work(client: Client, chance: random.Random) -> int:
        places = [chance.randrange(64 * MIB // BLOCK) * BLOCK for _ in range(6000)]
        at_depth(client, [(Command.READ, place, BLOCK) for place in places], depth)
        return 6000

    return work


def streaming(kind: Command) -> Work:
    def work(client: Client, chance: random.Random) -> int:
        data = b"s" * MIB
        places = range(0, 64 * MIB, MIB)
        at_depth(client, [(kind, place, data if kind is Command.WRITE else MIB) for place in places], 4)
        return len(places)

    return work


WORKS: list[tuple[str, Work, float]] = [
    ("random 4 KiB allocating writes, a flush after each", allocating, 2.0),
    ("random 4 KiB overwrites, depth 16", overwriting(16), 1.2),
    ("random 4 KiB reads, depth 16", reading(16), 1.2),
    ("random 4 KiB overwrites, depth 1", overwriting(1), 1.0),
    ("random 4 KiB reads, depth 1", reading(1), 1.0),
    ("sequential 1 MiB writes", streaming(Command.WRITE), 1.0),
    ("sequential 1 MiB reads", streaming(Command.READ), 1.0),
]


def beside_qcow2(scratch: Path, rounds: int) -> None:
    rates: dict[tuple[str, str], list[float]] = {}
    for seed in range(rounds):
        for name, begin in [("quire", quire), ("qcow2", qcow2), ("bare", bare)]:
            with tempfile.TemporaryDirectory(dir=scratch) as folder, begin(Path(folder)) as client:
                prepared(client)
                for what, work, _ in WORKS:
                    start = time.perf_counter()
                    done = work(client, random.Random(seed))
                    rates.setdefault((name, what), []).append(done / (time.perf_counter() - start))
    for what, _, wanted in WORKS:
        ours, theirs, least = (statistics.median(rates[name, what]) for name in ("quire", "qcow2", "bare"))
        row(
            what,
            f"{ours / theirs:.2f} ({ours:,.0f} / {theirs:,.0f} a second)",
            f"qcow2 by qemu-nbd: {wanted} times; a bare server that writes as much: {least / theirs:.2f}",
        )


# ---- in process ---------------------------------------------------------------------------------------------


class Counting:
    """Counts what a leaf does to its file."""

    def __init__(self) -> None:
        self.syncs = self.written = 0

    def __enter__(self) -> Counting:
        sync, write = self._sync, self._write = RealFile.sync, RealFile.write

        def counted_sync(file: RealFile) -> None:
            self.syncs += 1
            sync(file)

        def counted_write(file: RealFile, offset: int, data: bytes) -> None:
            self.written += len(data)
            write(file, offset, data)

        RealFile.sync, RealFile.write = counted_sync, counted_write  # type: ignore[method-assign, assignment]
        return self

    def __exit__(self, *_: object) -> None:
        RealFile.sync, RealFile.write = self._sync, self._write  # type: ignore[method-assign]


def costs(scratch: Path) -> None:
    chance = random.Random(3)
    with tempfile.TemporaryDirectory(dir=scratch) as folder, Set.create(RealStore(folder), SIZE) as made:
        image = made.image("main")
        for what, blocks in [
            ("allocating", chance.sample(range(SIZE // BLOCK), 500)),
            ("overwriting", [chance.randrange(64) for _ in range(500)]),
        ]:
            for block in range(64):
                image.write(block * BLOCK, b"x" * BLOCK)
            image.flush()
            with Counting() as count:
                for block in blocks:
                    image.write(block * BLOCK, b"y" * BLOCK)
                    image.flush()
            row(
                f"syncs per guest flush, 4 KiB {what}",
                f"{count.syncs / 500:.2f}",
                "1 (two while allocating with P records)",
            )
            row(f"bytes written per guest byte, 4 KiB {what}", f"{count.written / 500 / BLOCK:.2f}")
        data = b"z" * BLOCK
        for what, places in [
            ("allocating writes", [place * BLOCK for place in range(100_000, 150_000)]),
            ("overwrites", [place * BLOCK for place in range(100_000, 150_000)]),
        ]:
            start = time.perf_counter()
            for place in places:
                image.write(place, data)
            row(f"4 KiB {what}, in process", f"{len(places) / (time.perf_counter() - start):,.0f} a second")
        start = time.perf_counter()
        for place in places:
            image.read(place, BLOCK)
        row("4 KiB reads, in process", f"{len(places) / (time.perf_counter() - start):,.0f} a second")
    geometry_size = TIB
    from quire.layout import Geometry

    place = Geometry.of(geometry_size, default_slots(geometry_size))
    row("metadata of a full disk of 1 TiB", f"{2 * place.pages * BLOCK / geometry_size:.4%}", "at most 0.1 %")


def large(scratch: Path) -> None:
    """A disk of 1 TiB with 10 million allocated blocks: their states are set as writes set them, without the data."""
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        with Set.create(RealStore(folder), TIB) as made:
            image = made.image("main")
            per_run, runs = 1000, 10_000
            step = TIB // BLOCK // runs
            for run in range(runs):
                image.leaf._reserve([(run * step, per_run)])
                image.leaf.change(run * step, per_run, DATA)
                image.leaf.writes += 1
                if run % 200 == 199:
                    image.flush()
            image.flush()
            with image.leaf.commit_lock:
                image.leaf._checkpoint()  # as a journal that went round has done: every page of the map is on the disk
            start = time.perf_counter()
            made.snapshot("main", "s")
            row("snapshot of 1 TiB with 10 million blocks", f"{(time.perf_counter() - start) * 1000:.0f} ms", "50 ms")
        code = (
            "import resource, sys, time; from quire.sets import Set; from quire.store import RealStore\n"
            "start = time.perf_counter()\n"
            "made = Set.open(RealStore(sys.argv[1]), write=True); made.image('main')\n"
            "print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        )
        done = subprocess.run([sys.executable, "-c", code, folder], check=True, capture_output=True, text=True)
        seconds, kib = map(float, done.stdout.split())
        row("opening it for writing", f"{seconds:.2f} s, {kib / 1024:.0f} MiB", "1 s, 300 MiB")


def chain(scratch: Path) -> None:
    with contextlib.ExitStack() as stack:
        images = {}
        for leaves in (1, 100):
            folder = stack.enter_context(tempfile.TemporaryDirectory(dir=scratch))
            made, chance = stack.enter_context(Set.create(RealStore(folder), 64 * MIB)), random.Random(1)
            image = images[leaves] = made.image("main")
            for block in range(64 * MIB // BLOCK):
                image.write(block * BLOCK, b"c" * BLOCK)
            for number in range(leaves - 1):
                made.snapshot("main", f"s{number}")
                for _ in range(20):
                    image.write(chance.randrange(64 * MIB // BLOCK) * BLOCK, b"d" * BLOCK)
        places = [chance.randrange(64 * MIB // BLOCK) * BLOCK for _ in range(5000)]
        times: dict[int, list[float]] = {1: [], 100: []}
        for _ in range(9):
            for leaves, image in images.items():
                start = time.process_time()
                for place in places:
                    image.read(place, BLOCK)
                times[leaves].append(time.process_time() - start)
    ratio = statistics.median(times[1]) / statistics.median(times[100])
    row("random 4 KiB reads through 100 leaves, to through one", f"{ratio:.2f}", "0.5")


def deltas(scratch: Path) -> None:
    """Bytes that rsync sends after 1 % of the blocks changed, scattered."""
    if shutil.which("rsync") is None:
        row("bytes rsync sends after 1 % changed", "no rsync here")
        return
    size, chance = 256 * MIB, random.Random(5)
    blocks = chance.sample(range(size // BLOCK), size // BLOCK // 100)
    for name in ("quire", "qcow2"):
        with tempfile.TemporaryDirectory(dir=scratch) as text:
            folder = Path(text)
            source, target = folder / "source", folder / "target"
            source.mkdir()
            with contextlib.ExitStack() as stack:
                if name == "quire":
                    made = stack.enter_context(Set.create(RealStore(source), size))
                    disk = made.image("main")
                else:
                    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", source / "disk", str(size)], check=True)
                    words = ["qemu-nbd", "-t", "-f", "qcow2", "-k", str(folder / "s"), str(source / "disk")]
                    disk = stack.enter_context(served(words, folder / "s"))  # type: ignore[assignment]
                for place in range(0, size, MIB):
                    disk.write(place, chance.randbytes(MIB))
                disk.flush()
            words = [
                "rsync",
                "-a",
                "--ignore-times",
                "--inplace",
                "--no-whole-file",
                "--stats",
                "-B",
                "4096",
                f"{source}/",
                f"{target}/",
            ]
            subprocess.run(words, check=True, capture_output=True)
            with contextlib.ExitStack() as stack:
                if name == "quire":
                    disk = stack.enter_context(Set.open(RealStore(source), write=True)).image("main")
                else:
                    words_ = ["qemu-nbd", "-t", "-f", "qcow2", "-k", str(folder / "s"), str(source / "disk")]
                    disk = stack.enter_context(served(words_, folder / "s"))  # type: ignore[assignment]
                for block in blocks:
                    disk.write(block * BLOCK, chance.randbytes(BLOCK))
                disk.flush()
            said = subprocess.run(words, check=True, capture_output=True, text=True).stdout
            literal = int(re.search(r"Literal data: ([\d,]+)", said)[1].replace(",", ""))  # type: ignore[index]
            ratio = literal / (len(blocks) * BLOCK)
            row(f"bytes rsync sends after 1 % changed, to changed ones: {name}", f"{ratio:.3f}", "1.1")


@click.command()
@click.option("--rounds", default=5, show_default=True)
@click.option(
    "--folder", type=click.Path(path_type=Path, exists=True), help="Where to work.  [default: a temporary one]"
)
def main(rounds: int, folder: Path | None) -> None:
    """Print one line for each measure."""
    with tempfile.TemporaryDirectory(prefix="quire-bench-", dir=folder) as scratch:
        click.echo(f"on {os.uname().release}, {os.cpu_count()} cores, soft limit of files {resource.getrlimit(7)[0]:,}")
        for part in (costs, large, chain, deltas):
            part(Path(scratch))
        beside_qcow2(Path(scratch), rounds)


if __name__ == "__main__":
    main()
