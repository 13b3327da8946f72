"""Which names lead to which files at a crash.

A directory's changes (a name made, removed, or moved within the directory: each one change) are durable once the
directory was synced after they completed. Of those in flight

    posix     each survives or not by itself
    ordered   a prefix survives, in the order in which they were issued, over all directories

and those that survive take effect in the order in which they were issued. A move from one directory to another is a
change of each: the file may have both names, or neither.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from powercut.errors import InputError
from powercut.trace import NEVER, Kind, Trace

Entry = tuple[int, str]  # directory, name
_NAMING = (Kind.CREATE, Kind.LINK, Kind.RENAME, Kind.UNLINK)


@dataclass(frozen=True, slots=True)
class Change:
    """What one event does to the entries of one directory: entry -> file, or None for none."""

    event: int
    number: int  # among all changes of the trace, in the order of issue
    directory: int
    sets: dict[Entry, int | None]


class Names:
    """The entries of all directories of a trace. `durable` are those known to be so; None: known not to be there.

    `changes` are all there ever are, `in_flight` those in flight, by issue."""

    def __init__(self, trace: Trace) -> None:
        self.durable: dict[Entry, int | None] = initial(trace)
        self.in_flight: list[Change] = []
        self.changes = changes(trace)
        events = trace.events
        self._issued, self._completed = events["issued"], events["completed"]
        steps = [(int(self._issued[c.event]), 0, c.number) for c in self.changes]
        synced = (events["kind"] == Kind.SYNC_DIR) & (events["result"] == 0) & (events["completed"] != NEVER)
        steps += [(int(self._completed[event]), 1, event) for event in synced.nonzero()[0].tolist()]
        self._directory = events["file"]
        self._steps = sorted(steps)
        self._next = 0

    def advance(self, position: int) -> None:
        """Go on to a crash at `position`."""
        while self._next < len(self._steps) and self._steps[self._next][0] < position:
            _, synced, number = self._steps[self._next]
            self._next += 1
            if not synced:
                self.in_flight.append(self.changes[number])
                continue
            directory, since = self._directory[number], self._issued[number]
            covered = [c for c in self.in_flight if c.directory == directory and self._completed[c.event] < since]
            for change in covered:
                self.durable.update(change.sets)
            self.in_flight = [c for c in self.in_flight if c not in covered]

    def touching(self, entry: Entry) -> list[Change]:
        """The changes in flight of `entry`, the newest first."""
        return [change for change in reversed(self.in_flight) if entry in change.sets]

    def of(self, directory: int) -> set[str]:
        """Every name that `directory` has or may have."""
        entries = [*self.durable, *(entry for change in self.in_flight for entry in change.sets)]
        return {name for parent, name in entries if parent == directory}


def initial(trace: Trace) -> dict[Entry, int | None]:
    """The entries that were there before the recording began: those of its mark "tree" (names, and file ids)."""
    marks = trace.events[trace.events["kind"] == Kind.MARK]
    for about in (trace.about(mark) for mark in marks):
        if about.get("label") == "tree":
            return {(parent, name): file for parent, name, file in about.get("entries", [])}
    return {}


def changes(trace: Trace) -> list[Change]:
    """Every change of names of a trace, in the order of issue; one that failed changed nothing.

    Raises InputError for one that makes no sense."""
    found: list[Change] = []
    for event in range(len(trace.events)):
        row = trace.events[event]
        if row["kind"] not in _NAMING or row["result"]:
            continue
        about, parent = trace.about(row), int(row["file"])
        try:
            parts = _parts(Kind(int(row["kind"])), parent, about)
        except (KeyError, TypeError):
            where = f"the event at position {int(row['issued'])}"
            raise InputError(f"{trace.path}: {where} changes a name, and says only {json.dumps(about)}") from None
        for directory, sets in parts:
            found.append(Change(event, len(found), directory, sets))
    return found


def _parts(kind: Kind, parent: int, about: dict[str, object]) -> list[tuple[int, dict[Entry, int | None]]]:
    file, name = about.get("file"), str(about["name"])
    assert file is None or isinstance(file, int)
    if kind is Kind.UNLINK:
        return [(parent, {(parent, name): None})]
    if kind is not Kind.RENAME:
        return [(parent, {(parent, name): file})]
    target, exchanged = about.get("directory", parent), about.get("exchanges")
    assert isinstance(target, int)
    assert exchanged is None or isinstance(exchanged, int)
    new: Entry = (target, str(about["to"]))
    if target == parent:
        return [(parent, {(parent, name): exchanged, new: file})]
    return [(target, {new: file}), (parent, {(parent, name): exchanged})]
