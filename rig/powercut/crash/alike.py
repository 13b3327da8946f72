"""When two crashes may leave the same states: a digest of all that the files may then be.

A check depends on nothing but what it reads, so two crashes that may leave the same names, sizes and contents have the
same verdict, whatever led there: another history, another epoch, or another way through a recovery that mended the
difference. What is decided counts as decided, what a recovery wrote hides what lay below.

This can be said where each atom holds one of its possible contents by itself, each size and each change of names too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import xxhash

from powercut.crash.fileset import CrashSet, FileSet, Node
from powercut.disk import Bytes
from powercut.trace import SECTOR

_MOST = 4 << 20  # bytes: in larger files, comparing takes longer than checking again

Entry = tuple[Node, str]  # directory, name


class Held(NamedTuple):
    """What a file may be: one of `sizes` long; `content` is a row for each atom, `undecided` the contents of those that
    may hold several (zeros in `content`)."""

    sizes: frozenset[int]
    content: Bytes
    undecided: dict[int, frozenset[bytes]]


@dataclass(slots=True)
class Possible:
    """All that several files may be. `changes` each survived or not, the oldest first; they lie over `entries`."""

    entries: dict[Entry, Node]
    changes: list[dict[Entry, Node | None]]
    files: dict[Node, Held]

    def digest(self, *also: bytes) -> bytes:
        """Equal where all is equal, and `also`. Files are told by their names, not by how a recording counts them."""
        hash = xxhash.xxh3_128()
        numbers: dict[Node, int] = {}

        def add(entries: Mapping[Entry, Node | None]) -> None:
            for (directory, name), node in sorted(entries.items()):
                number = -1 if node is None else numbers.setdefault(node, len(numbers))
                hash.update(f"{tuple(directory)} {name}\0{number}\n".encode())

        add(self.entries)
        for change in self.changes:
            hash.update(b"change")
            add(change)
        for node in numbers:
            held = self.files.get(node)
            if held is None:  # a directory
                hash.update(f"{tuple(node)}".encode())
                continue
            here = np.flatnonzero(held.content.any(axis=1))
            hash.update(f"file {sorted(held.sizes)} {len(here)}".encode())
            hash.update(here.tobytes())
            hash.update(held.content[here].tobytes())
            for atom, contents in sorted(held.undecided.items()):
                hash.update(b"atom %d %d" % (atom, len(contents)))
                hash.update(b"".join(sorted(contents)))
        for part in also:
            hash.update(part)
        return hash.digest()


def comparable(files: FileSet) -> bool:
    """Whether what the files may be can be said atom by atom, and in little time."""
    options = files.options
    independent = not options.narrow and options.directory == "posix" and options.atom == SECTOR
    return independent and sum(contents.sectors for contents in files.contents.values()) * SECTOR <= _MOST


def possible(state: CrashSet, below: Possible | None = None) -> Possible | None:
    """What a state may be, as far as it is decided; None: nobody can tell. `below` is what the state under it may be,
    if that is known already."""
    if below is None and state.below is not None:
        below = possible(state.below)
        if below is None:
            return None
    found = Possible({}, [], {}) if below is None else Possible(dict(below.entries), [*below.changes], {})
    _name(found, {_entry(state, entry): state.node_of(id) for entry, id in state.files.names.durable.items()})
    for change in state.files.names.in_flight:
        sets = {_entry(state, entry): state.node_of(id) for entry, id in change.sets.items()}
        survived = state.survives(change)
        if survived is None:
            found.changes.append(sets)
        elif survived:
            _name(found, sets)
    nodes = {*found.entries.values(), *(node for change in found.changes for node in change.values())}
    for node in nodes:
        if node is not None and not state.is_directory(node):
            held = _held(state, node, None if below is None else below.files.get(node))
            if held is None:
                return None
            found.files[node] = held
    return found


def _entry(state: CrashSet, entry: tuple[int, str]) -> Entry:
    return state.node(entry[0]), entry[1]


def _name(found: Possible, sets: Mapping[Entry, Node | None]) -> None:
    """Let these entries be so, whatever else was undecided about them."""
    for entry, node in sets.items():
        if node is None:
            found.entries.pop(entry, None)
        else:
            found.entries[entry] = node
    older = [{entry: node for entry, node in change.items() if entry not in sets} for change in found.changes]
    found.changes = [change for change in older if change]


def _held(state: CrashSet, node: Node, below: Held | None) -> Held | None:
    id = state.id_of(node)
    if id is None:
        return below
    contents = state.files.contents[id]
    durable = contents.durable(0, contents.sectors).reshape(-1, SECTOR)
    content, undecided = durable.copy(), dict[int, frozenset[bytes]]()
    if below is not None:
        if len(below.sizes) > 1:
            return None
        (end,) = below.sizes
        content = np.zeros((max(len(durable), len(below.content)), SECTOR), dtype=np.uint8)
        content[: len(below.content)] = below.content
        content.reshape(-1)[end:] = 0  # a file that grows again has zeros there
        undecided = {atom: some for atom, some in below.undecided.items() if atom * SECTOR < end}
        if end % SECTOR and end // SECTOR in undecided:
            return None
        for atom in np.flatnonzero(contents.writer).tolist():
            content[atom] = durable[atom]
            undecided.pop(atom, None)
    flight = contents.in_flight_atoms()
    for atom, other in zip(flight.atom.tolist(), contents.take(flight.rows.reshape(-1)), strict=True):
        chosen = state.chosen(id, atom)
        if chosen is not None:
            content[atom] = chosen
            undecided.pop(atom, None)
            continue
        both = undecided.get(atom, frozenset([content[atom].tobytes()])) | {other.tobytes()}
        if len(both) > 1:
            content[atom] = 0
            undecided[atom] = both
    return Held(frozenset(state.sizes_of(id)), content, undecided)
