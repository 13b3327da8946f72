"""A really full file system: a small tmpfs with so many pages left. It needs root.

Unlike an injected error it lets a write land in part, and it refuses to make a file longer. The mount is taken out of
sight as soon as it is there; it ends with the descriptor that holds it, however this process ends.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from powercut.errors import EnvironmentFault
from powercut.faults import Armed, file_node

PAGE: Final = 4096
PLENTY: Final = 1 << 16  # pages: 256 MiB
_TRIED = 40  # earlier places
_MARGIN = 8  # pages for what tmpfs keeps besides


@contextmanager
def tmpfs(pages: int) -> Iterator[Path]:
    """A file system of so many pages. Raises EnvironmentFault where it cannot be mounted."""
    if os.geteuid() != 0:
        raise EnvironmentFault("a really full file system has to be mounted, which only root may do")
    folder = tempfile.mkdtemp(prefix="powercut-")
    try:
        _run("mount", "-t", "tmpfs", "-o", f"size={pages * PAGE}", "powercut", folder)
        holder = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        _run("umount", "--lazy", folder)
    finally:
        os.rmdir(folder)
    try:
        yield Path(f"/proc/{os.getpid()}/fd/{holder}")
    finally:
        os.close(holder)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    if done.returncode:
        raise EnvironmentFault(f"{' '.join(command[:3])}: {done.stderr.strip()}")


def _copy(source: Path, target: Path) -> None:
    """With its holes: they take no room."""
    _run("cp", "--sparse=always", str(source), str(target))


@dataclass(frozen=True, slots=True)
class Full:
    """Page number `nth` (from 1) that the image takes beyond what it had is not to be had. Once its guest has seen an
    error there are `more`; if `times` is None only after the image was closed."""

    nth: int
    more: int = 0
    times: int | None = 1
    error: str = "full"

    def __str__(self) -> str:
        return f"full {'until an error is seen' if self.times else 'for good'} at page {self.nth}"

    @property
    def lasting(self) -> str:
        return "once" if self.times else "good"

    @property
    def table(self) -> dict[str, Any]:
        return {"below": "full", "nth": self.nth}

    def earlier(self) -> Iterator[Full]:
        step = max(1, self.nth // _TRIED)
        yield from (replace(self, nth=nth) for nth in range(self.nth, 0, -step))

    @contextmanager
    def armed(self, template: Path, out: Path) -> Iterator[Armed]:
        free = self.nth - 1
        room = -(-template.stat().st_size // PAGE) + free + self.more + _MARGIN
        with tmpfs(room) as disk:
            image, ballast = disk / "image", disk / "ballast"
            _copy(template, image)
            left = os.statvfs(disk).f_bavail
            with open(ballast, "wb") as weight:
                if left > free:
                    os.posix_fallocate(weight.fileno(), 0, (left - free) * PAGE)

            def noticed() -> None:
                if self.times:
                    with suppress(FileNotFoundError):
                        ballast.unlink()

            yield Armed(file_node(image), noticed, lambda: free - os.statvfs(disk).f_bavail)
            _copy(image, out)
