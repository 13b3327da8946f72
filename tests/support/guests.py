"""What tests that need a guest share."""

from __future__ import annotations

import functools
import shutil
import subprocess
from pathlib import Path

import pytest

from powercut.errors import EnvironmentFault
from powercut.guest.hardware import Disk, Hardware
from powercut.guest.kernel import kernel

QEMU = "qemu-system-x86_64"
SIZE = 64 << 20


@functools.cache
def _hardware() -> Hardware | str:
    missing = [name for name in (QEMU, "qemu-img") if shutil.which(name) is None]
    if missing:
        return f"not installed: {', '.join(missing)}"
    try:
        return Hardware("tcg", kernel())
    except EnvironmentFault as fault:
        return str(fault)


def hardware() -> Hardware:
    """A machine for tests; without one, the test that asks is skipped."""
    found = _hardware()
    if isinstance(found, str):
        pytest.skip(found)
    return found


def disk(folder: Path, format: str = "qcow2", device: str = "virtio-blk", size: int = SIZE) -> Disk:
    """A disk over a new image in `folder`."""
    image = folder / f"image.{format}"
    subprocess.run(["qemu-img", "create", "-q", "-f", format, image, str(size)], check=True, timeout=60)
    node = {"driver": format, "discard": "unmap", "file": {"driver": "file", "filename": str(image)}}
    return Disk(node, size, device)
