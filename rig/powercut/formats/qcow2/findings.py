"""What a check has found: exact counts, and problems up to a limit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from powercut.verdict import Problem, Severity

LIMIT = 1000  # a broken table has a defect in each slot; nobody reads more

Ranges = tuple[tuple[int, int], ...]


def nothing(_: int) -> Ranges:
    """The judgement rests on nothing that could still change."""
    return ()


@dataclass(slots=True)
class Findings:
    problems: dict[tuple[str, str, int], Problem] = field(default_factory=dict)
    omitted: int = 0  # problems beyond the limit
    corruptions: int = 0
    leaks: int = 0
    leaked: NDArray[np.bool_] | None = None  # by cluster
    check_errors: int = 0
    aborted: str = ""  # why QEMU's checker gives up, and the counts say nothing

    def add(self, problem: Problem, *, always: bool = False) -> None:
        """Two findings with one key (one entry, two bad values) are one problem that rests on both."""
        known = self.problems.get(problem.key)
        if known is not None:
            rests = problem.rests_on and known.rests_on and known.rests_on + problem.rests_on
            problem = dataclasses.replace(known, rests_on=tuple(sorted(set(rests))))
        elif len(self.problems) >= LIMIT and not always:
            self.omitted += 1
            return
        self.problems[problem.key] = problem

    def corrupt(self, kind: str, where: int, text: str, count: int = 1, rests_on: Ranges = ()) -> None:
        """A defect of the structure that QEMU's checker counts `count` times."""
        self.corruptions += count
        self.add(Problem("structure", kind, where, Severity.CORRUPT, text, rests_on))

    def corrupt_many(
        self,
        kind: str,
        wheres: Iterable[int],
        text: Callable[[int], str],
        rests_on: Callable[[int], Ranges] = nothing,
    ) -> None:
        """Problems only: the caller counts. `text` and `rests_on` are asked with the position in `wheres`."""
        for position, where in enumerate(wheres):
            if len(self.problems) >= LIMIT and ("structure", kind, where) not in self.problems:
                self.omitted += 1
                continue
            self.add(Problem("structure", kind, where, Severity.CORRUPT, text(position), rests_on(position)))

    def unopenable(self, kind: str, where: int, text: str) -> None:
        self.add(Problem("opens", kind, where, Severity.UNOPENABLE, text), always=True)
