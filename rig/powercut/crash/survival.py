"""Which of an atom's contents survived, where that depends on what else did.

With whole writes the question is, for each write, whether it survived; in the order of issue it is how many did, and
then, unless writes are whole, which atoms of the next one did. Any atom's content follows from the answers.

Questions about writes are put to the search as those of a disk of their own, whose atoms are events.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from powercut.crash.contents import Choice
from powercut.crash.options import Options
from powercut.crash.search import Search

Layers = Sequence[tuple[int, int]]  # (event, number of the content it leaves), in the order of issue
OF_WRITES = -1  # the number of the disk that questions about writes are put on, where there is one file only


def choice_of(atom: int, values: Sequence[int], events: tuple[int, ...]) -> Choice:
    """A question whose answers are numbers."""
    return Choice(atom, np.array(values, dtype=np.int64).view(np.uint8).reshape(len(values), -1), events)


class Survival:
    """Answers for files that lie on one disk. `flight` lists the events in flight on all of them, by issue; `disk` is
    the number that questions about them are put on."""

    def __init__(self, search: Search, options: Options, flight: Sequence[int], disk: int = OF_WRITES) -> None:
        self._search = search
        self._options = options
        self._flight = flight
        self._disk = disk

    def content(self, disk: int, choice: Choice, layers: Layers) -> int:
        """The number of the content that an atom of `disk` has; 0: what is durable."""
        if self._options.order == "issue":
            return self._in_order(disk, choice, layers)
        for event, content in reversed(layers):
            if self._survived(event):
                return content
        return 0

    def _survived(self, event: int) -> bool:
        decision = self._search.decided(self._disk, event)
        if decision is None:
            decision = self._search.decide(self._disk, choice_of(event, (0, 1), (-1, event)))
        return decision.chosen == 1

    def survivors(self) -> int:
        """How many of `flight` survived, in the order of issue."""
        decision = self._search.decided(self._disk, -1)
        if decision is None:
            events = (-1, *self._flight)
            decision = self._search.decide(self._disk, choice_of(-1, range(len(events)), events))
        return decision.chosen

    def _in_order(self, disk: int, choice: Choice, layers: Layers) -> int:
        kept = self.survivors()
        alive, torn = set(self._flight[:kept]), self._flight[kept : kept + 1]
        known = set(self._flight)
        content = 0
        for event, number in layers:
            if event in alive or (event not in known and event >= 0):  # a rival is durable in any case
                content = number
        if self._options.whole or not torn:
            return content
        wanted = [number for event, number in layers if event == torn[0]]
        if not wanted:
            return content
        wanted += [number for event, number in layers if event < 0]
        numbers = list(dict.fromkeys([content, *wanted]))
        if len(numbers) == 1:
            return content
        decision = self._search.decided(disk, choice.atom)
        if decision is None:
            events = tuple(choice.events[number] for number in numbers)
            decision = self._search.decide(disk, Choice(choice.atom, choice.contents[numbers], events))
        return numbers[decision.chosen]


def log2_states(options: Options, atoms: dict[int, int], flight: Sequence[int]) -> float:
    """How many states there are, as a power of two, in the ways that depend on writes; `atoms[event]` is how many
    atoms an event in flight is on."""
    if options.order == "any":
        return float(len(flight))
    torn = [0.0 if options.whole else float(atoms.get(event, 0)) for event in flight]
    return float(np.logaddexp2.reduce([0.0, *torn]))
