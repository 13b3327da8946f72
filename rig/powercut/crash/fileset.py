"""Several files at a crash: what each may hold, how long it may be, and which names lead to it.

A *node* is a file or directory, told by the level it came to be at (0: the recorded program; 1: a recovery that ran
on a crash state; 2: a recovery after a crash inside that one) and its number in that level's trace.

A `CrashSet` is one state, decided as it is looked at: a name when it is looked up, a size when it is asked for, an
atom when it is read. Crash states of level 1 and 2 lie over the state that the recovery found: what it did not touch
goes on being decided there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from powercut.crash.contents import Choice, Contents
from powercut.crash.disk import CrashDisk
from powercut.crash.names import Change, Names
from powercut.crash.options import Options
from powercut.crash.recovery import lay_over
from powercut.crash.search import Decision, Search
from powercut.crash.sizes import Sizes
from powercut.crash.survival import Survival, choice_of
from powercut.disk import Bytes
from powercut.trace import Kind, Trace

_BITS = 20  # of a disk's number that tell files apart
_KINDS = 4
_FILES, _SIZES, _NAMES, _WRITES = range(_KINDS)  # what a disk's number is of


class Node(NamedTuple):
    """A file or directory of the trace of `level`."""

    level: int
    id: int


class FileSet:
    """All files of one trace at the current position."""

    def __init__(self, trace: Trace, options: Options) -> None:
        self.trace = trace
        self.options = options
        plain = [info for info in trace.files if info.role not in ("guest", "directory")]
        self.contents = {info.id: Contents(trace, info, options.atom, options.lying, options=options) for info in plain}
        self.sizes = {info.id: Sizes(trace, info, options.lying) for info in plain}
        self.names = Names(trace)

    def advance(self, position: int) -> None:
        """Go on to a crash at `position`."""
        for contents in self.contents.values():
            contents.advance(position)
        for sizes in self.sizes.values():
            sizes.advance(position)
        self.names.advance(position)

    def settle_rest(self) -> None:
        """Let nothing be in flight: all that was done is there."""
        for contents in self.contents.values():
            contents.settle_rest()
        for sizes in self.sizes.values():
            sizes.durable, sizes.in_flight = sizes.newest(), []
        for change in self.names.in_flight:
            self.names.durable.update(change.sets)
        self.names.in_flight = []

    def flight(self) -> list[int]:
        """The events in flight on all files, in the order of issue."""
        files = [*self.contents.values(), *self.sizes.values()]
        return sorted({event for file in files for event in file.in_flight})

    def undone(self) -> list[int]:
        """Those, and the changes of names in flight."""
        return sorted({*self.flight(), *(change.event for change in self.names.in_flight)})

    def newest(self, disk: int, choice: Choice) -> int:
        """The answer by which nothing is lost; of what a recovery did, the last one that there is."""
        what, id = _told(disk)
        last = len(choice.contents) - 1
        if not of_recording(disk):
            return last
        if what == _SIZES:
            possible = list(self.sizes[id].possible())
            newest = self.sizes[id].newest()
            return possible.index(newest) if newest in possible else last
        if what == _FILES:
            if self.options.order == "issue":  # a torn write: there is what was before, and what it made
                return 1
            return next(content for event, content in reversed(self.contents[id].layers(choice)) if event >= 0)
        return last

    def alternatives(self) -> list[int]:
        """How many alternatives each undecided thing has: atoms (or writes), sizes, and changes of names."""
        counts: list[int] = []
        if self.options.narrow:
            flight = self.flight()
            counts = [2] * len(flight) if self.options.order == "any" else [len(flight) + 1] * bool(flight)
        else:
            for contents in self.contents.values():
                counts += contents.undecided().tolist()
        if self.options.sizes and self.options.order == "any":
            counts += [n for sizes in self.sizes.values() if (n := len(sizes.possible())) > 1]
        changes = len(self.names.in_flight)
        if changes:
            counts += [2] * changes if self.options.directory == "posix" else [changes + 1]
        return counts


class State(Protocol):
    """A crash state of several files."""

    search: Search

    def lookup(self, directory: Node, name: str) -> Node | None:
        """What `name` leads to, if anything."""

    def entries(self, directory: Node) -> list[str]:
        """The names in `directory`, sorted."""

    def size(self, node: Node) -> int: ...

    def read(self, node: Node, offset: int, length: int) -> Bytes:
        """`length` bytes of a file; beyond its end, what would be there if it were longer."""

    def names(self, directory: Node) -> set[str]:
        """Every name that `directory` has in some state. Decides nothing."""

    def is_directory(self, node: Node) -> bool: ...


class CrashSet:
    """`files` as one of its crash states.

    `below` is the state that the recovery recorded in `files` found; None for the recorded program itself.
    `known[id]` is the node below that the recovery's file or directory `id` is; what it made itself is not in it."""

    def __init__(
        self, files: FileSet, search: Search, below: CrashSet | None = None, level: int = 0,
        known: Mapping[int, Node] | None = None,
    ) -> None:  # fmt: skip
        self.files = files
        self.search = search
        self.level = level
        self.below = below
        self._known = dict(known or {})
        self._mine = {node: id for id, node in self._known.items()}

    def node(self, id: int) -> Node:
        """The node that this level's trace calls `id`."""
        return self._known.get(id, Node(self.level, id))

    def id_of(self, node: Node) -> int | None:
        """What this level's trace calls `node`, if it knows it."""
        return node.id if node.level == self.level else self._mine.get(node)

    def _number(self, what: int, id: int) -> int:
        return (self.level * _KINDS + what) << _BITS | id

    def _survival(self) -> Survival | None:
        options = self.files.options
        if not options.narrow:
            return None
        return Survival(self.search, options, self.files.flight(), self._number(_WRITES, 0))

    # Names

    def lookup(self, directory: Node, name: str) -> Node | None:
        id = self.id_of(directory)
        if id is not None:
            entry = (id, name)
            for change in self.files.names.touching(entry):
                if self._survived(change):
                    return self.node_of(change.sets[entry])
            if entry in self.files.names.durable:
                return self.node_of(self.files.names.durable[entry])
        return None if self.below is None else self.below.lookup(directory, name)

    def node_of(self, id: int | None) -> Node | None:
        """`node`, or None for none."""
        return None if id is None else self.node(id)

    def _survived(self, change: Change) -> bool:
        if self.files.options.directory == "posix":
            return self._decide(_NAMES, 0, change.number, [0, 1], (-1, change.event)) == 1
        changes = self.files.names.in_flight
        events = (-1, *(c.event for c in changes))
        kept = self._decide(_NAMES, 0, changes[0].number, list(range(len(changes) + 1)), events)
        return change in changes[:kept]

    def names(self, directory: Node) -> set[str]:
        id = self.id_of(directory)
        mine = self.files.names.of(id) if id is not None else set()
        return mine if self.below is None else mine | self.below.names(directory)

    def entries(self, directory: Node) -> list[str]:
        return [name for name in sorted(self.names(directory)) if self.lookup(directory, name) is not None]

    def is_directory(self, node: Node) -> bool:
        if node.level == self.level:
            return self.files.trace.files[node.id].role == "directory"
        return self.below is not None and self.below.is_directory(node)

    # What is decided already

    def survives(self, change: Change) -> bool | None:
        """Whether a change of names survived; None: not decided. Each survives by itself."""
        decision = self.search.decided(self._number(_NAMES, 0), change.number)
        return None if decision is None else decision.chosen == 1

    def chosen(self, id: int, atom: int) -> Bytes | None:
        """What an atom of the file holds, if that was decided at this level."""
        decision = self.search.decided(self._number(_FILES, id), atom)
        return None if decision is None else decision.choice.contents[decision.chosen]

    def sizes_of(self, id: int) -> list[int]:
        """How long the file may be."""
        sizes = self.files.sizes[id]
        if not self.files.options.sizes:
            return [sizes.newest()]
        possible = list(sizes.possible())
        decision = self.search.decided(self._number(_SIZES, id), 0)
        return possible if decision is None else [possible[decision.chosen]]

    # Sizes and contents

    def size(self, node: Node) -> int:
        id = self.id_of(node)
        if id is None:
            assert self.below is not None
            return self.below.size(node)
        sizes = self.files.sizes[id]
        if not self.files.options.sizes:
            return sizes.newest()
        survival = self._survival()
        if survival is not None and self.files.options.order == "issue":
            return sizes.after(self.files.flight()[: survival.survivors()])
        possible = sizes.possible()
        return self._decide(_SIZES, id, 0, list(possible), tuple(possible.values()))

    def read(self, node: Node, offset: int, length: int) -> Bytes:
        id = self.id_of(node)
        if id is None:
            assert self.below is not None
            return self.below.read(node, offset, length)
        contents, number = self.files.contents[id], self._number(_FILES, id)
        if self.below is None:
            return CrashDisk(contents, self.search, number=number, survival=self._survival()).read(offset, length)
        size = contents.atom
        first, last = offset // size, -(-(offset + length) // size)
        if node.level == self.level:
            content = np.zeros((last - first) * size, dtype=np.uint8)
        else:
            content = self.below.read(node, first * size, (last - first) * size).copy()
            content[max(0, self.below.size(node) - first * size) :] = 0  # a file that grows again has zeros there
        lay_over(content.reshape(-1, size), first, last, contents, self.search, number, self._survival())
        return content[offset - first * size :][:length]

    def _decide(self, what: int, id: int, atom: int, values: list[int], events: tuple[int, ...]) -> int:
        """The value that a size or a change of names has in this state."""
        if len(values) == 1:
            return values[0]
        number = self._number(what, id)
        decision = self.search.decided(number, atom)
        if decision is None:
            decision = self.search.decide(number, choice_of(atom, values, events))
        return values[decision.chosen]


@dataclass(frozen=True, slots=True)
class Told:
    """A decision in words: `what` is "content", "size", "name", "write" (a whole one) or "order" (all up to that event
    are there); `file` how the trace calls the file, or the directory; `event` the event whose effect is there (-1: what
    was before), in the trace of `level`, `write` that event in words."""

    level: int
    what: str
    file: str
    offset: int
    event: int
    durable: bool
    disk: int  # with `atom`: which question it answers
    atom: int
    chosen: int
    write: str


def _words(trace: Trace, level: int, what: int, event: int) -> str:
    """The event, in words."""
    if event < 0:
        return "as before the recovery" if level else "as before the recording"
    row = trace.events[event]
    kind = Kind(int(row["kind"])).name.lower()
    if what == _NAMES:
        about = trace.about(row)
        return f"{kind} {about.get('name')}{' to ' + str(about['to']) if 'to' in about else ''}"
    if kind == "truncate":
        return f"truncate to {int(row['length']):,} bytes"
    return f"{kind} of {int(row['length']):,} bytes at {int(row['offset']):#x}"


def _told(disk: int) -> tuple[int, int]:
    """What the disk with this number is of, and of which file."""
    return (disk >> _BITS) % _KINDS, disk & ((1 << _BITS) - 1)


def of_recording(disk: int) -> bool:
    """Whether the disk called by this number is of the recorded program's files, not of what a recovery did."""
    return disk >> _BITS < _KINDS


def of_contents(disk: int) -> bool:
    """Whether the disk called by this number is a file's content, not a size or a name."""
    return _told(disk)[0] == _FILES


def tell(decision: Decision, traces: Mapping[int, Trace]) -> Told:
    """What a decision means. `traces` are those of the levels."""
    level, (what, id) = (decision.disk >> _BITS) // _KINDS, _told(decision.disk)
    trace = traces[level]
    durable = decision.chosen == 0

    def told(kind: str, file: str, offset: int, event: int) -> Told:
        answer = decision.disk, decision.choice.atom, decision.chosen
        return Told(level, kind, file, offset, event, durable, *answer, _words(trace, level, what, event))

    if what == _NAMES:
        event = decision.event if decision.event >= 0 else decision.choice.events[-1]
        return told("name", trace.files[int(trace.events["file"][event])].name, 0, event)
    if what == _WRITES:
        ordered = decision.choice.atom < 0
        event = decision.event if ordered else decision.choice.atom
        where = "" if event < 0 else trace.files[int(trace.events["file"][event])].name
        return told("order" if ordered else "write", where, 0, event)
    size = decision.choice.contents.shape[1] if what == _FILES else 0
    name = trace.files[id].name
    offset = decision.choice.atom * size
    return told(("content", "size")[what], name, offset, decision.event)
