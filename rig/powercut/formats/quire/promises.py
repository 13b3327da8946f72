"""What a recorded history of a Quire set promises: the trees a crash may leave, and what each sector may then hold.

Everything follows from the marks in the trace and the lines of the history, which run one after the other. A line that
failed is as if a crash had cut it off: what it wrote may be there or not from then on.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from powercut.formats.quire.history import TELLING, Candidates, Line, content
from powercut.trace import SECTOR, Kind, Trace
from quire.layout import BLOCK

_TREE = {"snapshot", "clone", "revert", "rename", "delete", "resize"}
_WRITING = {"write", "zero", "discard", "race"}
_DURABLE = {"flush", "snapshot", "resize", "reopen", "race"}  # what was written before is durable afterwards


Names = dict[str, tuple[str | None, bool]]  # of each name: its leaf, and whether it is a head


@dataclass(slots=True)
class World:
    """A tree that a crash may leave: each name's leaf (None: any) and whether it is a head, and what its sectors may
    hold."""

    names: Names = field(default_factory=dict)
    disks: dict[str, Candidates] = field(default_factory=dict)
    torn: dict[tuple[str, int], tuple[bytes, ...]] = field(default_factory=dict)  # what a sector holds after an error

    def now(self, name: str, sector: int) -> tuple[bytes, ...]:
        """What a sector holds: the newest, unless a write of it failed."""
        return self.torn.get((name, sector), self.disks[name][sector][-1:])

    def durable(self, name: str) -> Candidates:
        """What a disk's sectors hold, and nothing that they held before."""
        return [self.now(name, sector) for sector in range(len(self.disks[name]))]

    def shake(self) -> None:
        """After an error nobody knows what the disk holds until something is written again."""
        for name, disk in self.disks.items():
            self.become(name, disk)

    def saw(self, name: str, sectors: list[str]) -> None:
        """A reopened disk shows this (the first bytes of each sector, in hex), and keeps it."""
        legal = zip(self.disks[name], sectors, strict=True)
        self.become(name, [tuple(data for data in some if data[:TELLING].hex() == seen) for some, seen in legal])

    def become(self, name: str, disk: Candidates) -> None:
        """A disk holds this now: one of several things where nobody knows which."""
        self.disks[name] = list(disk)
        for sector, some in enumerate(disk):
            self.torn.pop((name, sector), None)
            if len(some) > 1:
                self.torn[name, sector] = some


class Promises:
    """What a history that was recorded in `trace` promises at each position."""

    def __init__(self, trace: Path, lines: Sequence[Line]) -> None:
        recording = Trace(trace)
        size = int(recording.meta["size"])
        said = [
            (int(event["issued"]), recording.about(event)) for event in recording.events if event["kind"] == Kind.MARK
        ]
        marks = [(position, mark) for position, mark in said if mark["label"] in ("begin", "end", "failed")]
        self._steps: list[tuple[int, list[World]]] = []  # from this position on, these worlds
        alive: list[World] = []  # the trees there may be on the disk, the one that was acknowledged first
        for position, mark in marks:
            number = mark["line"]
            line = lines[number] if 0 <= number < len(lines) else None
            if mark["label"] == "begin":
                alive = [_begun(world, line) for world in alive]
                self._steps.append((position, list(alive)))
            elif mark["label"] == "failed":
                if line is not None and line.what in _TREE and mark["tried"]:
                    alive += [_unseen(_after(world, line), line) for world in alive if _can(world, line)]
                for world in alive:
                    world.shake()
                self._steps.append((position, copy.deepcopy(alive)))
                self._steps[-2][1].extend(alive[len(self._steps[-2][1]) :])
            else:
                names = {name: (leaf, writable) for name, (leaf, writable) in mark["names"].items()}
                old, alive = alive, self._ended(alive, number, line, names, size)
                for name, sectors in mark["seen"].items():
                    alive[0].saw(name, sectors)
                # While a line that changes the tree was running, the tree could be the new one already.
                if not old:
                    self._steps[-1][1].append(World())
                if not old or old[0].names != names:
                    self._steps[-1][1].append(copy.deepcopy(alive[0]))
                self._steps.append((position, copy.deepcopy(alive)))

    @staticmethod
    def _ended(alive: list[World], number: int, line: Line | None, names: Names, size: int) -> list[World]:
        """What is left once a line has returned, and the tree was acknowledged to be `names`."""
        if number < 0:
            return [World(names, {"main": [(bytes(SECTOR),)] * (size // SECTOR)})]
        if line is None:
            after = [_settled(world) for world in alive]
        else:
            after = [_after(world, line) if _can(world, line) else world for world in alive]
        if line is not None and (line.what in _TREE or line.what in ("reopen", "kill")):
            after = [world for world in after if world.disks.keys() == names.keys()][:1]
        after[0].names = names
        return after

    def worlds(self, position: int) -> list[World]:
        """The trees that a crash before `position` may leave. One without names: there may be no set."""
        found: list[World] = []
        for begin, worlds in self._steps:
            if begin >= position:
                break
            found = worlds
        return found or [World()]


def _begun(world: World, line: Line | None) -> World:
    """What is legal once a line began: all that was, and what it writes."""
    begun = copy.deepcopy(world)
    if line is not None and line.what in _WRITING and _can(world, line):
        for sector, data in _written(world, line):
            _add(begun.disks[line.names[0]], sector, data)
    return begun


def _can(world: World, line: Line) -> bool:
    """Whether a tree has the names that a line speaks of."""
    needed = line.names if line.what == "revert" else line.names[:1]
    return world.disks.keys() >= set(needed)


def _written(world: World, line: Line) -> list[tuple[int, bytes]]:
    """The sectors that a line writes, and with what."""
    offset, length = line.numbers
    end = offset + length
    if line.what == "discard":
        size = len(world.disks[line.names[0]]) * SECTOR
        offset, end = -(-offset // BLOCK) * BLOCK, end if end == size else end // BLOCK * BLOCK
    zero = line.what in ("zero", "discard")
    sectors = range(offset // SECTOR, end // SECTOR)
    return [(sector, bytes(SECTOR) if zero else content(line.stamp, sector)) for sector in sectors]


def _add(disk: Candidates, sector: int, data: bytes) -> None:
    """`data` is the newest that a sector may hold."""
    disk[sector] = (*(one for one in disk[sector] if one != data), data)


def _settled(world: World) -> World:
    """After all of it became durable: of each sector only the newest."""
    return World(dict(world.names), {name: world.durable(name) for name in world.disks}, dict(world.torn))


def _after(world: World, line: Line) -> World:
    """What is promised once a line has returned."""
    after = copy.deepcopy(world)
    name = line.names[0] if line.names else ""
    disks = after.disks
    if line.what in ("write", "zero", "discard"):
        for sector, _ in _written(world, line):
            after.torn.pop((name, sector), None)
    if line.what in _DURABLE:
        for head in [name] if name else list(disks):
            disks[head] = world.durable(head)
    if line.what == "race":  # what the flush promises came before the write
        for sector, data in _written(world, line):
            disks[name][sector] = tuple(dict.fromkeys((*world.disks[name][sector][-2:-1], data)))
            after.torn.pop((name, sector), None)
    elif line.what == "write" and line.fua:
        for sector, data in _written(after, line):
            disks[name][sector] = (data,)
    elif line.what in ("snapshot", "clone"):
        after.become(line.names[1], disks[name])
    elif line.what == "revert":
        after.become(name, disks[line.names[1]])
    elif line.what == "rename":
        after.become(line.names[1], world.durable(name))
        del disks[name]
    elif line.what == "delete":
        del disks[name]
    elif line.what == "resize":
        count = line.numbers[0] // SECTOR
        after.become(name, (disks[name] + [(bytes(SECTOR),)] * count)[:count])
    return after


def _unseen(world: World, line: Line) -> World:
    """A tree that nobody looked at: its leaves are not known."""
    heads = {name for name, (_, writable) in world.names.items() if writable}
    if line.what == "clone" or (line.what == "rename" and line.names[0] in heads):
        heads.add(line.names[1])
    world.names = {name: (None, name in heads) for name in world.disks}
    return world
