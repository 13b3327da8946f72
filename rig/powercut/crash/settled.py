"""A state of several files as real files in a real directory."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from powercut.crash.fileset import CrashSet, FileSet, Node, State
from powercut.crash.options import Options
from powercut.crash.search import Search
from powercut.disk import Bytes
from powercut.errors import InputError
from powercut.trace import SECTOR, Trace

_STEP = 1 << 20


def root_of(trace: Trace) -> Node:
    """The directory that a recording is of."""
    return next(Node(0, info.id) for info in trace.files if info.role == "directory" and info.name == ".")


def files_at(trace: Trace, options: Options, position: int) -> FileSet:
    files = FileSet(trace, options)
    files.advance(position)
    return files


def beginning(trace: Trace, options: Options) -> CrashSet:
    """All files as they were before the recording."""
    return CrashSet(files_at(trace, options, 0), Search())


def end(trace: Trace, options: Options) -> CrashSet:
    """All files as they are if nothing is lost."""
    files = files_at(trace, options, trace.length)
    files.settle_rest()
    return CrashSet(files, Search())


def on_disk(trace: Trace, options: Options) -> CrashSet:
    """What was on disk when the recording ended, as if the names were too."""
    files = files_at(trace, options, trace.length)
    for change in files.names.in_flight:
        files.names.durable.update(change.sets)
    files.names.in_flight = []
    return CrashSet(files, Search())


def paths(state: State, directory: Node, inside: str = "") -> dict[str, Node]:
    """Every file there is below a directory, by its path."""
    found: dict[str, Node] = {}
    for name in state.entries(directory):
        node = state.lookup(directory, name)
        assert node is not None
        if state.is_directory(node):
            found |= paths(state, node, os.path.join(inside, name))
        else:
            found[os.path.join(inside, name)] = node
    return found


@dataclass(frozen=True, slots=True)
class Patch:
    """A file's size (-1: it is gone) and some of its bytes."""

    path: str
    size: int
    pieces: tuple[tuple[int, bytes], ...] = ()


def differences(below: State, state: State, root: Node) -> Iterator[Patch]:
    """What has to be done to `below` to make `state` of it."""
    old, new = paths(below, root), paths(state, root)
    for path in sorted(old.keys() | new.keys()):
        if path not in new:
            yield Patch(path, -1)
            continue
        size, had = state.size(new[path]), below.size(old[path]) if path in old else 0
        content = _content(state, new[path], size)
        before = _content(below, old[path], min(had, size)) if path in old else content[:0]
        padded = np.zeros(size, dtype=np.uint8)
        padded[: len(before)] = before
        differ = np.unique(np.flatnonzero(content != padded) // SECTOR)
        pieces = tuple((n * SECTOR, content[n * SECTOR : (n + 1) * SECTOR].tobytes()) for n in differ.tolist())
        if pieces or size != had or path not in old:
            yield Patch(path, size, pieces)


def _content(state: State, node: Node, size: int) -> Bytes:
    return state.read(node, 0, size) if size else np.zeros(0, dtype=np.uint8)


def apply(patches: Sequence[Patch], target: str | Path) -> None:
    """Make of the files under `target` what `patches` say."""
    for patch in patches:
        place = Path(target) / patch.path
        if patch.size < 0:
            place.unlink(missing_ok=True)
            continue
        place.parent.mkdir(parents=True, exist_ok=True)
        with open(place, "r+b" if place.exists() else "w+b") as out:
            out.truncate(patch.size)
            for offset, data in patch.pieces:
                out.seek(offset)
                out.write(data)


def write_out(state: State, directory: Node, target: str | Path) -> list[str]:
    """Write all files below `directory` under `target`, which is made. Returns their paths. Raises InputError."""
    try:
        os.makedirs(target, exist_ok=True)
        written = paths(state, directory)
        for path, node in written.items():
            place = Path(target) / path
            place.parent.mkdir(parents=True, exist_ok=True)
            size = state.size(node)
            with open(place, "wb") as out:
                for offset in range(0, size, _STEP):
                    piece = state.read(node, offset, min(_STEP, size - offset))
                    if piece.any():
                        out.seek(offset)
                        out.write(piece.tobytes())
                out.truncate(size)
    except OSError as error:
        raise InputError(f"{target}: cannot be written: {error.strerror}") from None
    return sorted(written)
