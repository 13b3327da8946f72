"""What a checker reads: one protocol, and its implementation over an ordinary file.

A checker is written once, against `Disk`. On an ordinary image every byte has one content. On a crash
disk (`powercut.crash.disk`) a byte may still hold several: `read` then decides, and the search comes back
for the other answers; `variants` shows all answers at once and decides nothing.
"""

from __future__ import annotations

import mmap
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from powercut.errors import InputError

Bytes = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of a range that may hold other bytes than those in `Variants.first`."""

    start: int  # byte offset within the range
    stop: int
    others: Bytes  # shape (k, stop - start), k >= 1: each other content, distinct from the first and each other


@dataclass(frozen=True, slots=True)
class Variants:
    """Everything a byte range may hold. Spans are disjoint, ascending, and vary independently."""

    first: Bytes
    spans: tuple[Span, ...] = ()


Offsets = NDArray[np.int64]
Gathered = tuple[Bytes, list[tuple[int, Variants]]]


class Disk(Protocol):
    """A file of `size` bytes. Bytes beyond the end read as zeros. Results are read-only."""

    size: int

    def read(self, offset: int, length: int) -> Bytes:
        """`length` bytes at `offset`, decided."""

    def variants(self, offset: int, length: int) -> Variants:
        """All contents that `length` bytes at `offset` may have, without deciding any."""


def gather(disk: Disk, offsets: Offsets, length: int) -> Gathered:
    """The first content of `length` bytes at each of `offsets`, shape (n, length); and those that may have another, as
    pairs of an index and all contents. A disk that knows a faster way than one after the other has a method of this
    name."""
    faster: Callable[[Offsets, int], Gathered] | None = getattr(disk, "gather", None)
    if faster is not None:
        return faster(offsets, length)
    found = [disk.variants(offset, length) for offset in offsets.tolist()]
    first = np.stack([variants.first for variants in found]) if found else np.zeros((0, length), dtype=np.uint8)
    return first, [(i, variants) for i, variants in enumerate(found) if variants.spans]


class ImageDisk:
    """An ordinary file, memory mapped and read-only. Holes cost nothing."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise InputError(f"{self.path}: {error.strerror}") from None
        try:
            info = os.fstat(fd)
            if not stat.S_ISREG(info.st_mode) and not stat.S_ISBLK(info.st_mode):
                raise InputError(f"{self.path}: not a regular file or block device")
            self.size = os.lseek(fd, 0, os.SEEK_END)
            mapped = mmap.mmap(fd, self.size, prot=mmap.PROT_READ) if self.size else b""
        finally:
            os.close(fd)
        self._bytes: Bytes = np.frombuffer(mapped, dtype=np.uint8)

    def read(self, offset: int, length: int) -> Bytes:
        if offset + length <= self.size:
            return self._bytes[offset : offset + length]
        out = np.zeros(length, dtype=np.uint8)
        inside = self._bytes[offset : min(offset + length, self.size)]
        out[: len(inside)] = inside
        return out

    def variants(self, offset: int, length: int) -> Variants:
        return Variants(self.read(offset, length))
