"""Where a guest's images lie: in a file system of a wanted kind, made for them in a file, where this user may mount."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from powercut.scratch import unmount

_SIZE = 4 << 30  # bytes, of which only what is written takes space
_PATIENCE = 60.0


@contextmanager
def hosted(filesystem: str | None, folder: Path) -> Iterator[tuple[Path, str]]:
    """A place below `folder` on a new `filesystem`, and its name; or `folder` itself, and in words why not there."""
    if filesystem is None:
        yield folder, ""
        return
    place, device = folder / filesystem, folder / f"{filesystem}.img"
    why = _mount(filesystem, device, place)
    if why:
        yield folder, f"not on {filesystem}: {why}"
        return
    try:
        yield place, filesystem
    finally:
        unmount(place)


def _mount(filesystem: str, device: Path, place: Path) -> str:
    """Returns in words why it was not possible, or nothing."""
    if os.geteuid() != 0:
        return "only root may mount"
    if shutil.which(f"mkfs.{filesystem}") is None:
        return f"mkfs.{filesystem} was not found"
    with open(device, "wb") as file:
        file.truncate(_SIZE)
    place.mkdir()
    for command in ([f"mkfs.{filesystem}", "-q", str(device)], ["mount", "-o", "loop", str(device), str(place)]):
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE)
        except (OSError, subprocess.TimeoutExpired) as error:
            return str(error)
        if done.returncode:
            return done.stderr.strip()
    return ""
