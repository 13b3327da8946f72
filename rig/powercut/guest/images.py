"""The images of a guest's disks: made, opened in a cache mode, read back."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from powercut import stamp
from powercut.errors import EnvironmentFault
from powercut.guest import ledger
from powercut.guest.daemon import create_image, tool
from powercut.trace import SECTOR

_PATIENCE = 120.0  # seconds for a tool of QEMU's


class Cache(NamedTuple):
    """`direct`: around the host's page cache. `no_flush`: flushes do nothing. `write_cache`: the guest sees one."""

    direct: bool
    no_flush: bool
    write_cache: bool


CACHES: Final = {
    "writeback": Cache(False, False, True),
    "none": Cache(True, False, True),
    "writethrough": Cache(False, False, False),
    "directsync": Cache(True, False, False),
    "unsafe": Cache(False, True, True),
}


@dataclass(frozen=True, slots=True)
class Image:
    """An image of `format` at `path` for a disk of `size` bytes, on a backing file of `backing` bytes (0: none)."""

    path: Path
    format: str
    size: int
    backing: int = 0
    backing_format: str = "qcow2"

    @property
    def base(self) -> Path:
        return self.path.with_name(f"{self.path.name}.base")

    def create(self, options: dict[str, str]) -> None:
        """Make it, and its backing file if it is not there: read-only, and full of stamps of operation 0."""
        if self.backing and not self.base.exists():
            raw = self.base.with_suffix(".raw")
            raw.write_bytes(stamp.make(0, 0, 0, self.backing // SECTOR))
            convert(raw, "raw", self.base, self.backing_format)
            raw.unlink()
            self.base.chmod(0o444)
        self.path.unlink(missing_ok=True)
        backing = Path(self.base.name) if self.backing else None  # relative: both may move together
        create_image(self.path, self.format, self.size, options, backing, self.backing_format)

    def node(self, cache: Cache, aio: str, *, discard: bool) -> dict[str, Any]:
        """Its block node, without a name."""
        modes = {"direct": cache.direct, "no-flush": cache.no_flush}
        unmap = "unmap" if discard else "ignore"
        file = {"driver": "file", "filename": str(self.path), "aio": aio, "cache": modes, "discard": unmap}
        return {"driver": self.format, "file": file, "cache": modes, "discard": unmap}

    def base_node(self) -> dict[str, Any]:
        """The block node of its backing file."""
        file = {"driver": "file", "filename": str(self.base)}
        return {"driver": self.backing_format, "read-only": True, "file": file}

    def read_base(self, raw: Path) -> None:
        """Write what its backing file holds to `raw`."""
        convert(self.base, self.backing_format, raw, "raw")

    def held(self, snapshot: str | None = None) -> NDArray[np.int64]:
        """By sector, which operation's stamp the guest would read (`powercut.guest.ledger.read`), or would have read
        when an internal snapshot was taken."""
        raw = self.path.with_name(f"{self.path.name}.raw")
        try:
            convert(self.path, self.format, raw, "raw", snapshot)
            return ledger.read(raw, self.size // SECTOR)
        finally:
            raw.unlink(missing_ok=True)


def convert(source: Path, source_format: str, target: Path, format: str, snapshot: str | None = None) -> None:
    """Run `qemu-img convert`, of an internal snapshot if one is named. Raises EnvironmentFault with what it said."""
    command = [tool("qemu-img"), "convert", "-f", source_format, "-O", format]
    if snapshot is not None:
        command += ["-l", f"snapshot.name={snapshot}"]
    done = subprocess.run([*command, str(source), str(target)], capture_output=True, text=True, timeout=_PATIENCE)
    if done.returncode:
        raise EnvironmentFault(f"qemu-img convert: {done.stderr.strip()}")
