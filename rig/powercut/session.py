"""One walk through a trace, with a judge looking on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from powercut import formats
from powercut.crash.contents import Contents, Tokens
from powercut.crash.disk import CrashDisk, Deciding
from powercut.crash.explore import EpochResult, Report, Unjudged, explore
from powercut.crash.promise import Promise
from powercut.errors import InputError
from powercut.external import External
from powercut.formats import Recording
from powercut.trace import SECTOR, Trace
from powercut.verdict import Problem

_RELEASE = 32  # epochs after which memory is given back
RULES = ("opens", "structure", "acknowledged")


@dataclass(frozen=True, slots=True)
class Plan:
    """What to explore and how. `rules` without "acknowledged" or "structure" leaves those out of scope. `checker` is
    a command that judges in place of the format's own checker, `recovery_depth` how many levels deep a crash inside
    what it writes is explored. `lying`: so many of the last flushes before each crash did nothing."""

    trace: str
    format: str
    atom: int = SECTOR
    rules: tuple[str, ...] = RULES
    sets: bool = True
    checker: str | None = None
    recovery_depth: int = 1
    lying: int = 0


class Session:
    """One process's walk through a trace: it goes forward only."""

    def __init__(self, plan: Plan, trace: Trace | None = None) -> None:
        self.plan = plan
        self.trace = trace or Trace(plan.trace)
        image, guest, backing = (self.trace.file(role) for role in ("image", "guest", "backing"))
        if image is None:
            raise InputError(f"{plan.trace}: has no image")
        self.image = Contents(self.trace, image, plan.atom, plan.lying)
        self.promise = Promise(self.trace, guest) if guest and "acknowledged" in plan.rules else None
        base = Contents(self.trace, backing) if backing else None
        self.format = formats.find(plan.format)
        self._recording = Recording(self.image, base, self.promise, Tokens(self.trace))
        self._format = self.format(self._recording)
        self._external = External(plan.checker, plan.recovery_depth, self._judge_alone) if plan.checker else None

    def advance(self, position: int) -> None:
        """Go on to a crash at `position`."""
        self.image.advance(position)
        if self.promise is not None:
            self.promise.advance(position)

    def explore(self, tasks: Iterable[tuple[int, int, int | None]]) -> Iterator[EpochResult]:
        """Explore the epochs (index, position, budget) of `tasks`, which ascend."""
        for result in explore(self.image, self.promise, self.judge, tasks, sets=self.plan.sets):
            yield result
            if result.index % _RELEASE == 0:
                self.trace.release()

    def problems(self, most: int) -> list[Problem]:
        """What the format's rules find wrong with the image if nothing more is in flight: about `most` problems."""
        found: list[Problem] = []

        def keep(problem: Problem, patches: Sequence[tuple[int, bytes]] = ()) -> None:
            found.append(problem)

        disk = CrashDisk(self.image)
        with contextlib.suppress(Unjudged):  # what was found until then stands
            disk.explore(lambda: self._judge_alone(disk, keep, lambda rule: len(found) >= most))
        return found

    def judge(self, disk: CrashDisk, report: Report, enough: Callable[[str], bool]) -> None:
        """Judge one crash state: by the plan's checker, or by the format's own."""
        if self._external is not None:
            self._external.judge(disk, report)
        else:
            self._by_format(disk, report, enough)

    def _by_format(self, disk: Deciding, report: Report, enough: Callable[[str], bool]) -> None:
        rules = {"opens", *self.plan.rules}

        def in_scope(problem: Problem, patches: Sequence[tuple[int, bytes]] = ()) -> None:
            if problem.rule in rules:
                report(problem)

        self._format.judge(disk, in_scope, enough)

    def _judge_alone(self, disk: Deciding, report: Report, enough: Callable[[str], bool] = lambda rule: False) -> None:
        """Judge by the format's rules, with no memory of the walk, which is left as it was."""
        image, promise, walking = self.image, self.promise, self._format
        touched, tightened = image.touched[:], promise.tightened[:] if promise else []
        self._format = self.format(self._recording)
        try:
            self._by_format(disk, report, enough)
        finally:
            self._format, image.touched[:] = walking, touched
            if promise is not None:
                promise.tightened[:] = tightened
