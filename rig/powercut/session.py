"""One walk through a trace, with a format's judge looking on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass

from powercut import formats
from powercut.crash.contents import Contents, Tokens
from powercut.crash.disk import CrashDisk
from powercut.crash.explore import EpochResult, Report, Unjudged, explore
from powercut.crash.promise import Promise
from powercut.errors import InputError
from powercut.formats import Recording
from powercut.trace import SECTOR, Trace
from powercut.verdict import Problem

RULES = ("opens", "structure", "acknowledged")


@dataclass(frozen=True, slots=True)
class Plan:
    """What to explore and how. `rules` without "acknowledged" or "structure" leaves those out of scope."""

    trace: str
    format: str
    atom: int = SECTOR
    rules: tuple[str, ...] = RULES
    sets: bool = True


class Session:
    """One process's walk through a trace: it goes forward only."""

    def __init__(self, plan: Plan, trace: Trace | None = None) -> None:
        self.plan = plan
        self.trace = trace or Trace(plan.trace)
        image, guest, backing = (self.trace.file(role) for role in ("image", "guest", "backing"))
        if image is None:
            raise InputError(f"{plan.trace}: has no image")
        self.image = Contents(self.trace, image, plan.atom)
        self.promise = Promise(self.trace, guest) if guest and "acknowledged" in plan.rules else None
        base = Contents(self.trace, backing) if backing else None
        self.format = formats.find(plan.format)
        self._recording = Recording(self.image, base, self.promise, Tokens(self.trace))
        self._judge = self.format(self._recording).judge

    def advance(self, position: int) -> None:
        """Go on to a crash at `position`."""
        self.image.advance(position)
        if self.promise is not None:
            self.promise.advance(position)

    def judge(self, disk: CrashDisk, report: Report, enough: Callable[[str], bool]) -> None:
        """Judge one crash state, by the rules of the plan."""
        rules = {"opens", *self.plan.rules}

        def in_scope(problem: Problem) -> None:
            if problem.rule in rules:
                report(problem)

        self._judge(disk, in_scope, enough)

    def problems(self, most: int) -> list[Problem]:
        """What is wrong with the image if nothing more is in flight: up to about `most` problems. The walk itself is
        not disturbed."""
        image, promise = self.image, self.promise
        walk = self._judge, image.touched[:], promise.tightened[:] if promise else []
        self._judge = self.format(self._recording).judge
        found: list[Problem] = []
        disk = CrashDisk(image)
        with suppress(Unjudged):  # what was found before counts
            disk.explore(lambda: self.judge(disk, found.append, lambda rule: len(found) >= most))
        self._judge, image.touched[:] = walk[0], walk[1]
        if promise is not None:
            promise.tightened[:] = walk[2]
        return found

    def explore(self, tasks: Iterable[tuple[int, int, int | None]]) -> Iterator[EpochResult]:
        """Explore the epochs (index, position, budget) of `tasks`, which ascend."""
        yield from explore(self.image, self.promise, self.judge, tasks, sets=self.plan.sets)
