"""A budget of checks, shared out over the epochs of a trace in rounds.

It is shared out evenly, and what some epochs did not need goes to those that want more. A part is kept back: where it
did not suffice, it looks at a sample of the states (`powercut.crash.sample`). The shares do not depend on the number
of processes, so neither does the verdict.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from powercut.crash.explore import SPENT, Searched, Task

_RESERVE = 4  # one part in so many of a budget is for samples
AnyResult = TypeVar("AnyResult", bound=Searched[Any])


def rounds(
    epochs: Sequence[AnyResult],
    budget: int | None,
    explore: Callable[[list[Task]], Sequence[AnyResult]],
    stopped: Callable[[], bool],
) -> list[AnyResult]:
    """What `explore` says of each of `epochs`, which say nothing yet, in `budget` checks in all (None: in as many as it
    takes), unless it is `stopped`. `explore` returns the results of those tasks that it came to."""
    results = {epoch.index: epoch for epoch in epochs}

    def done(left: Sequence[int], share: int | None, sampled: bool = False) -> Sequence[AnyResult]:
        return explore([Task(index, results[index].position, share, sampled) for index in left])

    if budget is None:
        for result in done(list(results), None):
            results[result.index] = result
        return list(results.values())
    for epoch in epochs:
        epoch.unknown = SPENT
    reserve = budget // _RESERVE
    budget -= reserve
    left, share = list(results), budget // max(1, len(results))
    if not share:  # fewer checks than epochs: one each for some, from the first to the last
        left, share = left[:: -(-len(left) // budget)], 1
    while left and share > max(results[index].checks for index in left) and not stopped():
        for result in done(left, share):
            results[result.index] = result
            budget -= result.checks
        left = [index for index, result in results.items() if result.unknown == SPENT]
        share = budget // len(left) if left else 0
    if left and (share := (budget + reserve) // len(left)) and not stopped():
        for result in done(left, share, sampled=True):
            results[result.index].add(result)
    return list(results.values())
