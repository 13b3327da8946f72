"""Folders for what a run needs while it lasts, which are gone afterwards however the run ended.

Each holds a file `lock` that its owner keeps locked as long as it lives. The next run of the rig finds the folders
whose owner is gone (it was killed), ends the processes whose command line names them, and removes them.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_PREFIX = "powercut-guest-"  # of folders among the system's temporary files
_YOUNG = 60.0  # seconds that a folder may go without a lock: it is just being made


@contextmanager
def scratch(prefix: str = _PREFIX, beside: Path | None = None) -> Iterator[Path]:
    """A new folder, in the folder `beside` if that is given, removed when the context is left. What runs that were
    killed left behind there goes first. Raises OSError."""
    sweep(prefix, beside)
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=beside))
    lock = os.open(folder / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def sweep(prefix: str = _PREFIX, beside: Path | None = None) -> list[Path]:
    """Remove every such folder whose owner is gone, with the processes that belong to it. Returns those folders."""
    gone = []
    for folder in (beside or Path(tempfile.gettempdir())).glob(f"{prefix}*"):
        with suppress(OSError):
            if folder.stat().st_uid == os.geteuid() and _is_abandoned(folder):
                _end_processes(folder)
                for place in _mounted(folder):
                    unmount(place)
                shutil.rmtree(folder, ignore_errors=True)
                gone.append(folder)
    return gone


def unmount(place: Path) -> None:
    """Unmount what is mounted there, as soon as nobody uses it any more."""
    subprocess.run(["umount", "-l", place], capture_output=True, timeout=60)


def _mounted(folder: Path) -> list[Path]:
    """What is mounted below `folder`."""
    with suppress(OSError):
        places = [Path(line.split()[1]) for line in Path("/proc/self/mounts").read_text().splitlines()]
        return [place for place in places if folder in place.parents]
    return []


def _is_abandoned(folder: Path) -> bool:
    try:
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return time.time() - folder.stat().st_mtime > _YOUNG
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(lock)


def _end_processes(folder: Path) -> None:
    needle = os.fsencode(f"{folder}/")
    for process in os.listdir("/proc"):
        if process.isdigit() and int(process) != os.getpid():
            with suppress(OSError):
                if needle in Path(f"/proc/{process}/cmdline").read_bytes():
                    os.kill(int(process), signal.SIGKILL)
