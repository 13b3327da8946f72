"""What a program concluded from what it read: same bytes read, same verdict.

A program that decides by what it reads does the same again while it is given the same bytes. So its runs make a tree:
what it did next (a read, or a write of its own), for each content that it was given. A disk on which the tree is
followed to its end needs no run: the decisions are taken in the same order as the program would have had them taken,
and so the search goes the same way.

A program that does something else after the same bytes is no such program. What it did first stays in the tree;
where the search repeats itself it will be found out (`powercut.errors.Nondeterministic`).
"""

from __future__ import annotations

import contextlib
import threading
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import xxhash

from powercut.crash.disk import Deciding
from powercut.crash.recovery import Overlay

MOST = 1 << 20  # steps that are remembered: some hundred bytes each
Outcome = TypeVar("Outcome")


@dataclass(slots=True)
class _Node(Generic[Outcome]):
    """What the program did next: a read of `length` bytes at `offset`, or a write of `data` there (ZEROS: of as many
    zeros); or how it ended."""

    offset: int = 0
    length: int = 0
    data: bytes | None = None
    after: dict[bytes, _Node[Outcome]] = field(default_factory=dict)  # by the digest of what it was given
    ended: Outcome | None = None


ZEROS = b""
Step = tuple[int, int, bytes | None, bytes]  # offset, length, data of a write, digest of what was read (or nothing was)


class Steps(Overlay):
    """An overlay that lists what is done to it, in the order in which it is done."""

    def __init__(self, disk: Deciding) -> None:
        super().__init__(disk)
        self.steps: list[Step] = []
        self._lock = threading.Lock()

    def read(self, offset: int, length: int) -> bytes:
        with self._lock:
            self.steps.append((offset, length, None, b""))
            self.steps[-1] = (offset, length, None, xxhash.xxh3_128_digest(content := super().read(offset, length)))
        return content

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        with self._lock:
            super().write(offset, data)
            self.steps.append((offset, len(data), bytes(data), b""))

    def zero(self, offset: int, length: int) -> None:
        with self._lock:
            super().zero(offset, length)
            self.steps.append((offset, length, ZEROS, b""))


class Memory(Generic[Outcome]):
    """The outcomes of runs by what was read in them, for disks of any size."""

    def __init__(self) -> None:
        self._roots: dict[int, _Node[Outcome]] = {}
        self._count = 0

    def recall(self, disk: Deciding) -> Outcome | None:
        """The outcome of a run on `disk`, if it would be given just what an earlier one was. What the run would read
        is read, as far as it is known."""
        node = self._roots.get(disk.size)
        overlay = Overlay(disk)
        while node is not None and node.ended is None:
            given = b""
            if node.data is not None:
                if node.data == ZEROS:
                    overlay.zero(node.offset, node.length)
                else:
                    overlay.write(node.offset, node.data)
            else:
                with contextlib.suppress(OSError):  # a read error is what it is given then
                    given = xxhash.xxh3_128_digest(overlay.read(node.offset, node.length))
            node = node.after.get(given)
        return node.ended if node is not None else None

    def keep(self, steps: Steps, outcome: Outcome) -> None:
        """Remember what came of a run that did `steps`."""
        if self._count >= MOST:
            return
        node = self._roots.setdefault(steps.size, _Node())
        for offset, length, data, given in steps.steps:
            if node.ended is not None:
                return  # it ended here before
            if not node.after:
                node.offset, node.length, node.data = offset, length, data
            elif (node.offset, node.length, node.data) != (offset, length, data):
                return
            if given not in node.after:
                node.after[given] = _Node()
                self._count += 1
            node = node.after[given]
        if not node.after:
            node.ended = outcome
