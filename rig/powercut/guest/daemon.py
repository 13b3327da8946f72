"""qemu-storage-daemon: QEMU's own block layer and format drivers, without a machine around them."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from powercut.errors import EnvironmentFault
from powercut.guest.lifetime import with_parent
from powercut.guest.nbd_client import Client

_PATIENCE = 20.0  # seconds until the daemon must serve, or must have ended


def tool(name: str) -> str:
    """The path of a program of QEMU's. Raises EnvironmentFault."""
    path = shutil.which(name)
    if path is None:
        raise EnvironmentFault(f"{name} was not found: install QEMU's tools, or run `make setup`")
    return path


def version() -> str:
    """The version of the installed QEMU tools, for example "7.2.22"."""
    words = subprocess.run([tool("qemu-img"), "--version"], capture_output=True, text=True, timeout=30).stdout.split()
    return words[2] if len(words) > 2 else "unknown"


def create_image(
    path: Path,
    format: str,
    size: int,
    options: dict[str, str],
    backing: Path | None = None,
    backing_format: str = "raw",
) -> None:
    """Run `qemu-img create`. Raises EnvironmentFault with what it said."""
    command = [tool("qemu-img"), "create", "-q", "-f", format]
    if options:
        command += ["-o", ",".join(f"{key}={value}" for key, value in options.items())]
    if backing is not None:
        command += ["-b", str(backing), "-F", backing_format]
    done = subprocess.run([*command, str(path), str(size)], capture_output=True, text=True, timeout=60)
    if done.returncode:
        raise EnvironmentFault(f"qemu-img create: {done.stderr.strip()}")


class Daemon:
    """A storage daemon that exports the node called "disk" over NBD; a context manager.

    `nodes` are block nodes in the form of QMP's blockdev-add, each after those it refers to.
    Leaving the context ends the daemon in an orderly way, so that the format driver closes its image; if it
    then reports a failure, EnvironmentFault is raised.
    """

    def __init__(self, nodes: list[dict[str, Any]]) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="powercut-")
        self._socket = str(Path(self._directory.name) / "disk.sock")
        self._command = [tool("qemu-storage-daemon")]
        for node in nodes:
            self._command += ["--blockdev", json.dumps(node)]
        self._command += ["--nbd-server", f"addr.type=unix,addr.path={self._socket}"]
        self._command += ["--export", "type=nbd,id=disk,node-name=disk,name=disk,writable=on"]
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        command = with_parent(self._command)
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + _PATIENCE
        while not Path(self._socket).exists():
            if self._process.poll() is not None:
                raise EnvironmentFault(f"qemu-storage-daemon: {self._end(kill=True)}")
            if time.monotonic() > deadline:
                self._end(kill=True)
                raise EnvironmentFault(f"qemu-storage-daemon did not serve within {_PATIENCE:.0f} s")
            time.sleep(0.005)
        return self

    def connect(self) -> Client:
        """A client of the disk. The socket is there before the daemon listens, and it listens before it exports."""
        assert self._process is not None
        deadline = time.monotonic() + _PATIENCE
        while True:
            try:
                return Client(self._socket, "disk")
            except EnvironmentFault:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise
                time.sleep(0.005)

    def _end(self, *, kill: bool) -> str:
        assert self._process is not None
        if kill:
            self._process.kill()
        else:
            self._process.terminate()
        try:
            _, said = self._process.communicate(timeout=_PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            _, said = self._process.communicate()
            said += f"it did not end within {_PATIENCE:.0f} s and was killed"
            self._process.returncode = -9
        self._directory.cleanup()
        return said.strip()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        said = self._end(kill=error is not None)
        if error is None and self._process is not None and self._process.returncode not in (0, -15):
            raise EnvironmentFault(f"qemu-storage-daemon ended with {self._process.returncode}: {said}")
