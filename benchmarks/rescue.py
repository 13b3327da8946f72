"""What finding and rescuing the parts of a damaged image costs: a terabyte of tables, and two gigabytes of data.

`python benchmarks/rescue.py`, with QEMU installed; needs 5 GiB of free space for temporary files.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import click
import numpy as np

GIB = 1 << 30


def cost(*arguments: str | Path) -> tuple[float, float, int]:
    """Seconds by the clock and of the processor, and peak resident MiB, of a command that a user runs."""
    command = [sys.executable, "-m", "powercut.cli", *map(str, arguments)]
    clock = os.times().elapsed
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, _, usage = os.wait4(process.pid, 0)
    return os.times().elapsed - clock, usage.ru_utime + usage.ru_stime, usage.ru_maxrss >> 10


def measure(name: str, image: Path) -> None:
    with image.open("r+b") as file:
        file.write(bytes(4096))
    saved = image.with_name("saved.qcow2")
    for command in (("check", image), ("rescue", image, "--out", saved)):
        clock, processor, memory = cost(*command)
        figure = f"{clock:.1f} s ({processor:.1f} s of the processor), {memory} MiB"
        click.echo(f"{name + ', ' + str(command[0]):58} {figure:>44}")
    subprocess.run(["qemu-img", "check", "-q", str(saved)], check=True)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        tables = Path(folder) / "tables.qcow2"
        create = ["qemu-img", "create", "-q", "-f", "qcow2"]
        subprocess.run([*create, "-o", "preallocation=metadata", str(tables), "1T"], check=True)
        measure("1 TiB mapped, 16,777,216 clusters, no data", tables)
    with tempfile.TemporaryDirectory() as folder:
        data, piece = Path(folder) / "data.qcow2", Path(folder) / "piece"
        random = np.random.default_rng(1)
        with piece.open("wb") as file:
            for _ in range(64):
                file.write(random.bytes(1 << 20))
        subprocess.run([*create, str(data), "2G"], check=True)
        writes = [word for at in range(0, 2 * GIB, 64 << 20) for word in ("-c", f"write -s {piece} {at} 64M")]
        subprocess.run(["qemu-io", "-f", "qcow2", *writes, str(data)], check=True, stdout=subprocess.DEVNULL)
        measure("2 GiB of random data", data)


if __name__ == "__main__":
    main()
