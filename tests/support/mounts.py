"""Real filesystems for tests: made in a file, loop-mounted, and gone afterwards."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

_MAKE = {"ext4": ["mkfs.ext4", "-q", "-F"], "xfs": ["mkfs.xfs", "-q"], "btrfs": ["mkfs.btrfs", "-q"]}
FILESYSTEMS = tuple(_MAKE)


@contextlib.contextmanager
def mounted(filesystem: str, folder: Path, size: int = 400 << 20) -> Iterator[Path]:
    """An empty filesystem of `size` bytes. Skips the test, saying why, where that is not possible."""
    make = _MAKE[filesystem]
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    if shutil.which(make[0]) is None:
        pytest.skip(f"no {make[0]}")
    device, place = folder / f"{filesystem}.img", folder / filesystem
    with open(device, "wb") as file:
        file.truncate(size)
    place.mkdir()
    subprocess.run([*make, str(device)], check=True, capture_output=True, timeout=60)
    done = subprocess.run(["mount", "-o", "loop", str(device), str(place)], capture_output=True, text=True, timeout=60)
    if done.returncode:
        pytest.skip(f"cannot mount {filesystem}: {done.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=False, timeout=60)
        device.unlink()
