"""Everything that keeps a guest's disk, behind one protocol: QEMU's formats, our model of its qcow2 driver, Quire."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from powercut.crash.store import in_memory
from powercut.formats.qcow2.check import check
from powercut.formats.qcow2.driver import snapshots
from powercut.formats.qcow2.driver.create import create
from powercut.formats.qcow2.driver.host import MemoryFile, run
from powercut.formats.qcow2.driver.opening import open_image
from powercut.guest.daemon import Daemon, create_image
from quire.scrub import scrub
from quire.sets import Set

TIMEOUT = 30


class Subject(Protocol):
    """A disk of `size` bytes, open. Offsets and lengths are bytes, whole sectors."""

    def read(self, offset: int, length: int) -> bytes: ...
    def write(self, offset: int, data: bytes) -> None: ...
    def zero(self, offset: int, length: int) -> None: ...
    def discard(self, offset: int, length: int) -> None: ...
    def flush(self) -> None: ...

    def reopen(self) -> None:
        """Close in an orderly way, and open again."""

    def take(self, name: str) -> None:
        """A snapshot of the disk as it is."""

    def apply(self, name: str) -> None:
        """The disk becomes what the snapshot is."""

    def drop(self, name: str) -> None:
        """Delete a snapshot."""

    def close(self) -> str:
        """Close it. What the format's own check then has against it; "" if nothing."""


class OfQemu:
    """A format of QEMU's, written by its storage daemon."""

    def __init__(self, folder: Path, size: int, format: str, options: dict[str, str]) -> None:
        self._path, self._format = folder / "image", format
        self._path.unlink(missing_ok=True)
        create_image(self._path, format, size, options)
        self._open()

    def _open(self) -> None:
        file = {"driver": "file", "node-name": "file", "filename": str(self._path), "discard": "unmap"}
        node = {"driver": self._format, "node-name": "disk", "file": "file", "discard": "unmap"}
        self._daemon = Daemon([file, node])
        self._daemon.__enter__()
        self._client = self._daemon.connect()

    def _shut(self) -> None:
        self._client.close()
        self._daemon.__exit__(None, None, None)

    def read(self, offset: int, length: int) -> bytes:
        return bytes(self._client.read(offset, length))

    def write(self, offset: int, data: bytes) -> None:
        self._client.write(offset, data)

    def zero(self, offset: int, length: int) -> None:
        self._client.zero(offset, length, may_unmap=True)

    def discard(self, offset: int, length: int) -> None:
        self._client.discard(offset, length)

    def flush(self) -> None:
        self._client.flush()

    def reopen(self) -> None:
        self._shut()
        self._open()

    def _between(self, *words: str) -> None:
        self._shut()
        subprocess.run(["qemu-img", "snapshot", *words, str(self._path)], check=True, timeout=TIMEOUT)
        self._open()

    def take(self, name: str) -> None:
        self._between("-c", name)

    def apply(self, name: str) -> None:
        self._between("-a", name)

    def drop(self, name: str) -> None:
        self._between("-d", name)

    def close(self) -> str:
        self._shut()
        if self._format == "raw":
            return ""
        done = subprocess.run(["qemu-img", "check", str(self._path)], capture_output=True, text=True, timeout=TIMEOUT)
        return f"{done.stdout}{done.stderr}" if done.returncode else ""


class Model:
    """The model of the qcow2 driver."""

    def __init__(self, size: int, bits: int, version: int, lazy: bool) -> None:
        self._file = MemoryFile(create(size, cluster_bits=bits, version=version, lazy=lazy))
        self._image = self._do(open_image())

    def _do(self, work: Any) -> Any:
        return run(work, self._file)

    def read(self, offset: int, length: int) -> bytes:
        return bytes(self._do(self._image.read(offset, length)))

    def write(self, offset: int, data: bytes) -> None:
        self._do(self._image.write(offset, data))

    def zero(self, offset: int, length: int) -> None:
        self._do(self._image.zero(offset, length))

    def discard(self, offset: int, length: int) -> None:
        self._do(self._image.discard(offset, length))

    def flush(self) -> None:
        self._do(self._image.flush_all())

    def reopen(self) -> None:
        self._do(self._image.close())
        self._image = self._do(open_image())

    def take(self, name: str) -> None:
        self._do(snapshots.create(self._image, name))

    def apply(self, name: str) -> None:
        self._do(snapshots.apply(self._image, name))

    def drop(self, name: str) -> None:
        self._do(snapshots.delete(self._image, name))

    def close(self) -> str:
        self._do(self._image.close())
        found = check(self._file, trust_dirty=True)
        return "" if found.exit_code == 0 else f"{found.corruptions} corruptions, {found.leaks} leaks"


class Quire:
    """A set of Quire with one head, on a store in memory."""

    def __init__(self, size: int) -> None:
        self._store = in_memory()
        self._set = Set.create(self._store, size, slots=8)
        self._image = self._set.image("main")

    def read(self, offset: int, length: int) -> bytes:
        return bytes(self._image.read(offset, length))

    def write(self, offset: int, data: bytes) -> None:
        self._image.write(offset, data)

    def zero(self, offset: int, length: int) -> None:
        self._image.zero(offset, length)

    def discard(self, offset: int, length: int) -> None:
        self._image.discard(offset, length)

    def flush(self) -> None:
        self._image.flush()

    def reopen(self) -> None:
        self._set.close()
        self._set = Set.open(self._store, write=True)
        self._image = self._set.image("main")

    def take(self, name: str) -> None:
        self._set.snapshot("main", name)

    def apply(self, name: str) -> None:
        self._image.close()
        self._set.revert("main", name)
        self._image = self._set.image("main")

    def drop(self, name: str) -> None:
        self._set.delete(name)

    def close(self) -> str:
        self._image.close()
        found = [str(one) for one in scrub(self._set) if not one.mended]
        self._set.close()
        return "\n".join(found)


Make = Callable[[Path, int], Subject]

# Name -> how it is made in an empty folder, with a disk of so many bytes. `raw` has no snapshots.
SUBJECTS: dict[str, Make] = {
    "qcow2": lambda folder, size: OfQemu(folder, size, "qcow2", {}),
    "qcow2, small clusters": lambda folder, size: OfQemu(folder, size, "qcow2", {"cluster_size": "4096"}),
    "raw": lambda folder, size: OfQemu(folder, size, "raw", {}),
    "model, version 2": lambda _, size: Model(size, 9, 2, False),
    "model, version 3": lambda _, size: Model(size, 12, 3, False),
    "model, lazy": lambda _, size: Model(size, 16, 3, True),
    "quire": lambda _, size: Quire(size),
}
SLOW = {"qcow2", "qcow2, small clusters", "raw"}  # each starts programs
WITHOUT_SNAPSHOTS = {"raw"}
