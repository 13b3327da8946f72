"""What the tests of Quire share: a trivial model of a set, histories, and their exploration."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from powercut.crash.model import epochs
from powercut.formats.quire.history import parse, record
from powercut.formats.quire.judge import Quire
from powercut.formats.quire.promises import Promises
from powercut.stores import StoreOutcome, explore_store
from powercut.trace import Kind, Trace
from quire.layout import BLOCK, CHECKED_RECORDS

SIZE = 16 << 10
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # where many small recordings are made
SLOTS = 4  # so that a few flushes fill the journal

HISTORIES = {
    "allocate, overwrite": ["write main 0 1k", "flush main", "write main 0 1k", "write main 4k 1k", "flush main"],
    "discard, rewrite": ["write main 0 1k", "flush main", "discard main 0 4k", "flush main", "write main 0 512"],
    "checkpoint": [
        "write main 0 512",
        "flush main",
        "write main 4k 512",
        "flush main",
        "write main 8k 512",
        "flush main",
        "discard main 0 4k",
        "flush main",
        "write main 0 1k",
        "flush main",
    ],
    "tree": [
        "write main 0 512",
        "snapshot main s",
        "write main 512 512",
        "clone s c",
        "write c 0 512",
        "flush c",
        "rename c d",
        "delete s",
    ],
    "revert": [
        "write main 0 512",
        "snapshot main s",
        "write main 0 512",
        "flush main",
        "revert main s",
        "write main 512 512",
        "flush main",
    ],
    "resize": ["write main 12k 1k", "resize main 6k", "write main 4k 1k", "resize main 16k", "write main 5k 512"],
    "a write while a flush syncs": ["write main 0 512", "race main 0 512", "discard main 0 4k", "race main 0 512"],
    "killed": [
        "write main 0 512",
        "snapshot main s",
        "write main 0 512",
        "kill main",
        "write main 512 512",
        "flush main",
    ],
    "reopen": ["write main 0 512", "reopen", "discard main 0 4k", "write main 0 512", "reopen", "write main 0 1k fua"],
}

RECORDS = {"P": 0, "C": CHECKED_RECORDS}


def explored(folder: Path, history: Sequence[str], features: int, depth: int = 0) -> StoreOutcome:
    """Record a history, and judge every crash state of it."""
    trace, judge = recorded(folder, history, features, range(2))
    return explore_store(trace, judge, depth=depth)


def one_by_one(
    folder: Path, history: Sequence[str], features: int, depth: int = 0, touch: range = range(2)
) -> Iterator[StoreOutcome]:
    """The same, epoch by epoch, the last first."""
    trace, judge = recorded(folder, history, features, touch)
    for position in reversed(epochs(Trace(trace))):
        yield explore_store(trace, judge, depth=depth, positions=[position])


def recorded(folder: Path, history: Sequence[str], features: int, touch: range) -> tuple[Path, Quire]:
    """A history's trace, and its judge."""
    lines = parse(history)
    trace = folder / "t.trace"
    record(lines, SIZE, SLOTS, trace, features)
    return trace, Quire(Promises(trace, lines), touch)


def after(trace: Path, line: int) -> list[int]:
    """The crash positions once line number `line` has begun; -1: once the set is made."""
    read = Trace(trace)
    marks = [(int(event["issued"]), read.about(event)) for event in read.events if event["kind"] == Kind.MARK]
    label = "end" if line < 0 else "begin"
    begin = next(place for place, mark in marks if mark["label"] == label and mark.get("line") == line)
    return [position for position in epochs(read) if position > begin]


@dataclass
class Model:
    """A set as a dictionary of byte strings: what `quire.sets.Set` promises, without a disk."""

    heads: dict[str, bytearray] = field(default_factory=dict)
    snapshots: dict[str, bytes] = field(default_factory=dict)

    def write(self, head: str, offset: int, data: bytes) -> None:
        self.heads[head][offset : offset + len(data)] = data

    def zero(self, head: str, offset: int, length: int) -> None:
        self.heads[head][offset : offset + length] = bytes(length)

    def discard(self, head: str, offset: int, length: int) -> None:
        disk, end = self.heads[head], offset + length
        first = -(-offset // BLOCK) * BLOCK
        last = end if end == len(disk) else end // BLOCK * BLOCK
        if first < last:
            disk[first:last] = bytes(last - first)

    def snapshot(self, head: str, name: str) -> None:
        self.snapshots[name] = bytes(self.heads[head])

    def clone(self, snapshot: str, head: str) -> None:
        self.heads[head] = bytearray(self.snapshots[snapshot])

    def revert(self, head: str, snapshot: str) -> None:
        self.heads[head] = bytearray(self.snapshots[snapshot])

    def rename(self, old: str, new: str) -> None:
        for names in (self.heads, self.snapshots):
            if old in names:
                names[new] = names.pop(old)  # type: ignore[index]

    def delete(self, name: str) -> None:
        self.heads.pop(name, None)
        self.snapshots.pop(name, None)

    def resize(self, head: str, size: int) -> None:
        self.heads[head] = self.heads[head][:size].ljust(size, b"\0")
