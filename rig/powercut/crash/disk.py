"""The crash disk: a lazy image that decides an atom only when it is first read.

The number of crash states is astronomic; what a checker can observe of them is small. So a check runs on a
disk whose undecided atoms are settled on first read: the first time with the durable content, later with each
of the others, depth first, until every answer was given (`CrashDisk.explore`). Atoms that are never read need
no decision: one run of the check stands for all states that agree on what it read. A tree of answers that is
exhausted is a proof over all states of its epoch, for that checker.

A check that falls into independent parts says so by calling `explore` once for each part from within its own
run. A part's verdict rests only on the decisions made before it and those it makes itself; so exhausting the
parts one by one, each from the same point, covers every state, and the parts' counts add up where otherwise
they would multiply. Two parts may read the same atom.

A check must be deterministic in what it reads. A replayed prefix of answers that meets another question than
before raises Nondeterministic.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from powercut.crash.contents import Choice, Contents
from powercut.disk import Bytes, Span, Variants
from powercut.errors import Nondeterministic


class Decision(NamedTuple):
    """Atom number `atom` was given content number `chosen` of `choice`."""

    atom: int
    chosen: int
    choice: Choice

    @property
    def event(self) -> int:
        """The event whose content was chosen; -1: the initial content."""
        return self.choice.events[self.chosen]


class BudgetSpent(Exception):
    """The search ran out of checks; what it did so far counts, and is not exhaustive."""


class CrashDisk:
    """`contents` as one of its crash states, decided as it is read.

    With `sets=False`, `variants` decides too: every check then sees one decided disk at a time, which is the
    plain search, slower and with nothing left to a checker's own reasoning. The two must agree.
    `checks` counts finished runs of a check or of a part; `budget` is the most there may be, or None.
    """

    def __init__(self, contents: Contents, *, sets: bool = True, budget: int | None = None) -> None:
        self.contents = contents
        self.size = contents.size
        self.sets = sets
        self.budget = budget
        self.checks = 0
        self.path: list[Decision] = []
        self._decided: dict[int, Decision] = {}
        self._script: list[Decision] = []

    def read(self, offset: int, length: int) -> Bytes:
        return self._assemble(offset, length, decide=True)[0]

    def variants(self, offset: int, length: int) -> Variants:
        first, open_choices = self._assemble(offset, length, decide=not self.sets)
        spans = []
        for choice in open_choices:
            start = max(choice.atom * self.contents.atom, offset)
            stop = min((choice.atom + 1) * self.contents.atom, offset + length)
            inner = choice.contents[:, start - choice.atom * self.contents.atom :][:, : stop - start]
            if stop - start < self.contents.atom:
                _, order = np.unique(inner, axis=0, return_index=True)
                inner = inner[np.sort(order)]
            if len(inner) > 1:
                spans.append(Span(start - offset, stop - offset, inner[1:]))
        return Variants(first, tuple(spans))

    def undecided(self, offset: int, length: int) -> bool:
        """Whether some byte of the range could still hold something else."""
        return bool(self._assemble(offset, length, decide=False)[1])

    def _assemble(self, offset: int, length: int, *, decide: bool) -> tuple[Bytes, list[Choice]]:
        """The range with every decision applied, and the choices in it that are open."""
        size = self.contents.atom
        first, last = offset // size, -(-(offset + length) // size)
        content = self.contents.durable(first, last)
        open_choices: list[Choice] = []
        copied = False
        for choice in self.contents.choices(first, last):
            decision = self._decided.get(choice.atom)
            if decision is None:
                if not decide:
                    open_choices.append(choice)
                    continue
                decision = self._decide(choice)
            if decision.chosen:
                if not copied:
                    content, copied = content.copy(), True
                begin = (choice.atom - first) * size
                content[begin : begin + size] = choice.contents[decision.chosen]
        return content[offset - first * size :][:length], open_choices

    def _decide(self, choice: Choice) -> Decision:
        chosen = 0
        if self._script:
            wanted = self._script.pop(0)
            if wanted.atom != choice.atom:
                raise Nondeterministic(
                    f"a check given the same answers read byte {choice.atom * self.contents.atom} where it had read "
                    f"byte {wanted.atom * self.contents.atom} before"
                )
            chosen = wanted.chosen
        decision = Decision(choice.atom, chosen, choice)
        self.path.append(decision)
        self._decided[choice.atom] = decision
        return decision

    def explore(self, part: Callable[[], None]) -> None:
        """Run `part` once for every way its reads can turn out, given the decisions made so far.

        Raises BudgetSpent before a run that `budget` does not allow, and Nondeterministic (see above).
        Afterwards the decisions made so far stand as before.
        """
        base, outer = len(self.path), self._script
        self._script = []
        try:
            while True:
                if self.budget is not None and self.checks >= self.budget:
                    raise BudgetSpent
                self.checks += 1
                part()
                if self._script:
                    raise Nondeterministic("a check given the same answers ended before it had read as much as before")
                script = self.path[base:]
                self._forget(base)
                while script and script[-1].chosen + 1 == len(script[-1].choice.contents):
                    script.pop()
                if not script:
                    return
                script[-1] = script[-1]._replace(chosen=script[-1].chosen + 1)
                self._script = script
        finally:
            self._forget(base)
            self._script = outer

    def _forget(self, length: int) -> None:
        for decision in self.path[length:]:
            del self._decided[decision.atom]
        del self.path[length:]
