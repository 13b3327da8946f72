"""The search: every way a check's reads can turn out, depth first.

A check runs on disks that put a question to the search when an atom with several contents is first read. The first
time the answer is the first content; then the last question with an untried answer gets its next one, and the check
runs again, until every answer was given. Atoms that are never read need no answer: one run of the check stands for
all states that agree on what it read. A tree of answers that is exhausted is a proof over all states of its epoch, for
that checker.

A check that falls into independent parts says so by calling `explore` once for each part from within its own run. A
part's verdict rests only on the answers given before it and those it asks for itself; so exhausting the parts one by
one, each from the same point, covers every state, and the parts' counts add up where otherwise they would multiply.
Two parts may read the same atom.

Where a budget does not suffice, single states are looked at instead (`sample`): a policy gives the answers.

A check must be deterministic in what it reads. A replayed prefix of answers that meets another question than before
raises Nondeterministic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from powercut.crash.contents import Choice
from powercut.errors import Nondeterministic

_FEW = 8  # runs that each part of a check gets in a sample


class Decision(NamedTuple):
    """The atom of `choice` on the disk numbered `disk` was given content number `chosen`."""

    disk: int
    choice: Choice
    chosen: int

    @property
    def event(self) -> int:
        """The event whose content was chosen; -1: the initial content."""
        return self.choice.events[self.chosen]


Policy = Callable[[int, Choice], int]  # the number of the content to choose, on the disk with this number


class BudgetSpent(Exception):
    """The search ran out of checks; what it did so far counts, and is not exhaustive."""


class Search:
    """`checks` counts runs of a check or of a part; `budget` is the most there may be, or None. `path` lists the
    decisions that hold now, in the order in which they were made, `asked` the (disk, atom) of all there ever were, with
    the events that the answers are of."""

    def __init__(self, budget: int | None = None) -> None:
        self.budget = budget
        self.checks = 0
        self.path: list[Decision] = []
        self.asked: dict[tuple[int, int], tuple[int, ...]] = {}
        self._decided: dict[tuple[int, int], Decision] = {}
        self._script: list[Decision] = []
        self._policy: Policy | None = None
        self._sampling = False
        self._assumed: Callable[[int, Choice], int | None] | None = None

    @contextmanager
    def assuming(self, answers: Callable[[int, Choice], int | None]) -> Iterator[None]:
        """For a while, questions that `answers` answers are answered so, and decided no further: what is concluded
        from that must hold for that answer only. Those that it does not (None) are decided as always."""
        before, self._assumed = self._assumed, answers
        try:
            yield
        finally:
            self._assumed = before

    def decided(self, disk: int, atom: int) -> Decision | None:
        """What was decided for `atom` of the disk numbered `disk`."""
        return self._decided.get((disk, atom))

    def decide(self, disk: int, choice: Choice) -> Decision:
        """Answer a question that was not put before in this run."""
        if self._assumed is not None and (answer := self._assumed(disk, choice)) is not None:
            return Decision(disk, choice, answer)
        chosen = 0
        self.asked[disk, choice.atom] = choice.events
        if self._policy is not None:
            chosen = self._policy(disk, choice)
        elif self._script:
            wanted = self._script.pop(0)
            if (wanted.disk, wanted.choice.atom) != (disk, choice.atom):
                raise Nondeterministic(
                    f"a check given the same answers read atom {choice.atom} where it had read atom "
                    f"{wanted.choice.atom} before"
                )
            chosen = wanted.chosen
        decision = Decision(disk, choice, chosen)
        self.path.append(decision)
        self._decided[disk, choice.atom] = decision
        return decision

    def explore(self, part: Callable[[], None]) -> None:
        """Run `part` once for every way its reads can turn out, given the decisions made so far.

        Raises BudgetSpent before a run that `budget` does not allow, and Nondeterministic (see above).
        Afterwards the decisions made so far stand as before.
        """
        base, outer, policy = len(self.path), self._script, self._policy
        self._script = []
        runs = 0
        try:
            while not (self._sampling and runs == _FEW):
                self._count()
                runs += 1
                part()
                if self._script:
                    raise Nondeterministic("a check given the same answers ended before it had read as much as before")
                script = self.path[base:]
                self._forget(base)
                if self._policy is not None and script:  # a sample of this part too, before others
                    self._policy = None
                    continue
                while script and script[-1].chosen + 1 == len(script[-1].choice.contents):
                    script.pop()
                if not script:
                    return
                script[-1] = script[-1]._replace(chosen=script[-1].chosen + 1)
                self._script = script
        finally:
            self._forget(base)
            self._script, self._policy = outer, policy

    def sample(self, whole: Callable[[], None], policy: Policy) -> None:
        """Run `whole` once, with the answers of `policy`; the parts it explores get a few runs each, the first with
        these answers too.

        Raises BudgetSpent before a run that `budget` does not allow.
        """
        self._count()
        self._policy, self._sampling = policy, True
        try:
            whole()
        finally:
            self._forget(0)
            self._policy, self._sampling = None, False

    def answering(self, policy: Policy, part: Callable[[], None]) -> None:
        """Run `part` once more, with the answers of `policy` to what is not decided, which are forgotten afterwards."""
        base, before, assumed = len(self.path), self._policy, self._assumed
        self._policy, self._assumed = policy, None
        try:
            part()
        finally:
            self._forget(base)
            self._policy, self._assumed = before, assumed

    def _count(self) -> None:
        if self.budget is not None and self.checks >= self.budget:
            raise BudgetSpent
        self.checks += 1

    def _forget(self, length: int) -> None:
        for decision in self.path[length:]:
            del self._decided[decision.disk, decision.choice.atom]
        del self.path[length:]


class OneState(Search):
    """No search: one state, in which `answers` says how every question turns out."""

    def __init__(self, answers: Policy) -> None:
        super().__init__()
        self._answers = answers

    @contextmanager
    def assuming(self, answers: Callable[[int, Choice], int | None]) -> Iterator[None]:
        """Nothing: all is answered."""
        yield

    def decide(self, disk: int, choice: Choice) -> Decision:
        """Answer a question that was not put before."""
        decision = Decision(disk, choice, self._answers(disk, choice))
        self.path.append(decision)
        self._decided[disk, choice.atom] = decision
        return decision

    def explore(self, part: Callable[[], None]) -> None:
        """Run `part`: its reads turn out in one way."""
        base = len(self.path)
        part()
        self._forget(base)

    def answering(self, policy: Policy, part: Callable[[], None]) -> None:
        """Run `part`: all is answered."""
        part()
