"""Whether a trace tells the whole story: replayed, it must give exactly what the program left behind."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from powercut.capture.filetree import Node, Tree, extents
from powercut.errors import InputError
from powercut.trace import NEVER, SECTOR, Kind, Trace

_STEP = 4 << 20
_CHANGES = (Kind.WRITE, Kind.ZERO, Kind.DISCARD, Kind.TRUNCATE)


class Replay:
    """Makes files of a trace's events. Those that failed or never ended are left out: they may have been done."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self._bytes = trace.rows.reshape(-1).data
        self.events = trace.events[np.isin(trace.events["kind"], _CHANGES)]
        self._done = self.events[(self.events["result"] == 0) & (self.events["completed"] != NEVER)]
        self._done = self._done[np.argsort(self._done["completed"], kind="stable")]
        self._done = self._done[np.argsort(self._done["file"], kind="stable")]

    def write(self, file: int, path: Path, size: int) -> None:
        """Write what `file`, which had `size` bytes before the recording, holds at its end to `path`."""
        with open(path, "w+b", buffering=0) as out:
            fd = out.fileno()
            os.ftruncate(fd, size)
            for _, offset, length, row in self.trace.bases[self.trace.bases[:, 0] == file].tolist():
                kept = min(length, size - offset)
                begin = row * SECTOR + offset % SECTOR
                _write(fd, self._bytes[begin : begin + kept], offset)
            first, last = np.searchsorted(self._done["file"], (file, file + 1))
            now = size
            for event in self._done[first:last]:
                kind, offset, length = int(event["kind"]), int(event["offset"]), int(event["length"])
                if kind == Kind.WRITE:
                    _write(fd, self.trace.payload(event), offset)
                    now = max(now, offset + length)
                elif kind == Kind.TRUNCATE:
                    os.ftruncate(fd, now := length)
                else:
                    for begin in range(offset, offset + length, _STEP):
                        _write(fd, memoryview(bytes(min(_STEP, offset + length - begin))), begin)
                    now = max(now, offset + length)

    def maybe(self, file: int, begin: int, end: int) -> Iterator[tuple[int, int, bytes | memoryview]]:
        """What else `file` may hold in a range, piece by piece (begin, end, bytes): of requests that ran at the same
        time any may have been the last, and one that failed or never ended may have been done."""
        mine = self.events[self.events["file"] == file]
        truncates = mine["kind"] == Kind.TRUNCATE
        low = np.where(truncates, mine["length"], mine["offset"])
        high = np.where(truncates, NEVER, mine["offset"] + mine["length"])
        here = (low < end) & (high > begin)
        mine, low, high = mine[here], low[here], high[here]
        settled = mine[(mine["completed"] != NEVER) & (mine["result"] == 0)]
        latest = int(settled["issued"].max()) if len(settled) else -1
        for event, first, last in zip(mine, low.tolist(), high.tolist(), strict=True):
            if event["completed"] > latest or event["result"]:
                first, last = max(first, begin), min(last, end)
                if event["kind"] == Kind.WRITE:
                    at = first - int(event["offset"])
                    yield first, last, self.trace.payload(event)[at : at + last - first]
                else:
                    yield first, last, bytes(last - first)

    def uncertain_size(self, file: int) -> bool:
        """Whether a truncation may have come before or after another event, or an event may not have been done."""
        mine = self.events[self.events["file"] == file]
        unsettled = (mine["completed"] == NEVER) | (mine["result"] != 0)
        return bool(unsettled.any()) or any(
            ((mine["issued"] < one["completed"]) & (mine["completed"] > one["issued"])).sum() > 1
            for one in mine[mine["kind"] == Kind.TRUNCATE]
        )


def _write(fd: int, data: memoryview, offset: int) -> None:
    while data:
        done = os.pwrite(fd, data, offset)
        data, offset = data[done:], offset + done


def compare(tree: Tree, trace: Trace, folder: Path, why: dict[Node, set[str]]) -> None:
    """Compare what the program left under the tree's roots with the tree, and the files with the trace.

    `folder` is for scratch, `why` what is known to have passed the recorder. Raises InputError for the first
    difference.
    """
    replay = Replay(trace)
    seen: set[int] = set()

    def visit(path: str, node: Node) -> None:
        there = {entry.name: entry for entry in tree.list(path)}
        assert node.entries is not None
        for name in sorted(there.keys() | node.entries.keys()):
            child, entry = node.entries.get(name), there.get(name)
            inner = os.path.join(path, name)
            if entry is not None and child is None and _is_special(entry):
                continue  # a socket or a fifo: nothing that a crash could tear
            if entry is None or child is None:
                what = "was there at the end" if child is None else "was gone at the end"
                raise InputError(f"{tree.name(inner)} {what}, and the recorder did not see that happen")
            if entry.is_dir(follow_symlinks=False) != (child.entries is not None):
                raise InputError(f"{tree.name(inner)} is of another kind than the recorder saw")
            if child.entries is not None:
                visit(inner, child)
            elif not child.other and id(child) not in seen:
                seen.add(id(child))
                _compare_file(inner, child)

    def _compare_file(path: str, node: Node) -> None:
        expected = folder / "replayed"
        if node.id is not None:
            replay.write(node.id, expected, node.size_before)
        elif node.copy is not None:
            expected = node.copy
        difference = _difference(path, expected, node, replay)
        if difference is not None:
            how = f" ({' and '.join(sorted(why[node]))})" if node in why else ""
            raise InputError(f"{tree.name(path)}: {difference}: it was written past the recorder{how}")

    for root, node in tree.roots.items():
        visit(root, node)


def _is_special(entry: os.DirEntry[str]) -> bool:
    mode = entry.stat(follow_symlinks=False).st_mode
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode) or stat.S_ISLNK(mode))


def _difference(path: str, expected: Path, node: Node, replay: Replay) -> str | None:
    """How the file at `path` differs from the `expected` one, in words."""
    with open(path, "rb", buffering=0) as left, open(expected, "rb", buffering=0) as right:
        a, b = left.fileno(), right.fileno()
        size, wanted = os.fstat(a).st_size, os.fstat(b).st_size
        if size != wanted and not (node.id is not None and replay.uncertain_size(node.id)):
            return f"{size:,} bytes long, and what was recorded makes {wanted:,}"
        for begin, end in _either(a, b):
            for place in range(begin, min(end, size), _STEP):
                count = min(_STEP, end - place, size - place)
                one, two = os.pread(a, count, place), os.pread(b, count, place).ljust(count, b"\0")
                if one != two:
                    where = _unexplained(
                        np.frombuffer(one, np.uint8), np.frombuffer(two, np.uint8), place, node, replay
                    )
                    if where is not None:
                        held, meant = one[where - place], two[where - place]
                        return (
                            f"byte {where:,} ({where:#x}) is {held:#04x}, and what was recorded makes it {meant:#04x}"
                        )
    return None


def _either(a: int, b: int) -> Iterator[tuple[int, int]]:
    """The ranges where either file has data, in order, merged."""
    merged: list[list[int]] = []
    for begin, end in sorted([*extents(a), *extents(b)]):
        if merged and begin <= merged[-1][1]:
            merged[-1][1] = max(end, merged[-1][1])
        else:
            merged.append([begin, end])
    return ((begin, end) for begin, end in merged)


def _unexplained(
    one: np.ndarray[tuple[int], np.dtype[np.uint8]],
    two: np.ndarray[tuple[int], np.dtype[np.uint8]],
    place: int,
    node: Node,
    replay: Replay,
) -> int | None:
    """The first byte that differs and that no event which may have been the last there explains."""
    wrong = one != two
    for number in np.unique(np.flatnonzero(wrong) // SECTOR).tolist():
        begin, end = number * SECTOR, min((number + 1) * SECTOR, len(one))
        if node.id is not None:
            for first, last, data in replay.maybe(node.id, place + begin, place + end):
                inner = slice(first - place, last - place)
                wrong[inner] &= one[inner] != np.frombuffer(data, np.uint8)
        bad = np.flatnonzero(wrong[begin:end])
        if len(bad):
            return int(place + begin + bad[0])
    return None
