"""The least that a server in Python can do: a write is one call, a flush writes two pages and syncs, as Quire writes
and syncs a record. No checksum, no map, no promise. `quire_qcow2.py` runs it as the ceiling for Quire.

    python benchmarks/bare_nbd.py FILE SOCKET SIZE
"""

from __future__ import annotations

import os
import signal
import sys

from quire.layout import PAGE
from quire.nbd import Server
from quire.nbd_protocol import Data

SLOTS = 64


class Bare:
    """A file as an export; behind the disk are two journals that hold nothing."""

    block_size = 512

    def __init__(self, path: str, size: int) -> None:
        self.size = size
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT)
        self._flushes = 0
        os.truncate(self._fd, size)
        os.posix_fallocate(self._fd, size, 2 * SLOTS * PAGE)

    def read(self, offset: int, length: int) -> bytes:
        return os.pread(self._fd, length, offset)

    def write(self, offset: int, data: Data, fua: bool) -> None:
        os.pwrite(self._fd, data, offset)

    def zero(self, offset: int, length: int, may_unmap: bool, fua: bool) -> None:
        raise NotImplementedError

    def discard(self, offset: int, length: int) -> None:
        raise NotImplementedError

    def flush(self) -> None:
        self._flushes += 1
        for copy in (0, SLOTS):
            os.pwrite(self._fd, bytes(PAGE), self.size + (copy + self._flushes % SLOTS) * PAGE)
        os.fdatasync(self._fd)


if __name__ == "__main__":
    with Server(Bare(sys.argv[1], int(sys.argv[3])), sys.argv[2]):
        signal.pause()
