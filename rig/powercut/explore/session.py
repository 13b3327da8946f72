"""One walk through a trace, with a judge looking on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from powercut import formats
from powercut.crash.contents import Contents, Tokens
from powercut.crash.disk import CrashDisk, Deciding
from powercut.crash.explore import EpochResult, Found, Report, Task, Unjudged, explore
from powercut.crash.finding import settled_at
from powercut.crash.media import Damaged, Fault, Noticing
from powercut.crash.options import Options
from powercut.crash.promise import Promise
from powercut.errors import InputError
from powercut.explore.external import External
from powercut.formats import Recording
from powercut.trace import SECTOR, Trace
from powercut.verdict import Problem, Severity

_RELEASE = 8  # epochs after which memory is given back
RULES = ("opens", "structure", "acknowledged")


@dataclass(frozen=True, slots=True)
class Plan:
    """What to explore and how. `rules` without "acknowledged" or "structure" leaves those out of scope. `checker` is
    a command that judges in place of the format's own checker, `recovery_depth` how many levels deep a crash inside
    what it writes is explored. `lying`: so many of the last flushes before each crash did nothing. `faults`: what the
    medium does besides, one at a time. `seed`: what is drawn, is drawn with this. `whole`, `order`, `torn`: see
    `powercut.crash.options`."""

    trace: str
    format: str
    atom: int = SECTOR
    rules: tuple[str, ...] = RULES
    sets: bool = True
    checker: str | None = None
    recovery_depth: int = 1
    lying: int = 0
    faults: tuple[Fault, ...] = ()
    seed: int = 1
    whole: bool = False
    order: str = "any"
    torn: str = "old-or-new"

    @property
    def options(self) -> Options:
        """The choices of the fault model."""
        return Options(self.atom, self.lying, whole=self.whole, order=self.order, torn=self.torn)


class Session:
    """One process's walk through a trace: it goes forward only. `fault` strikes the image when it comes to it."""

    def __init__(self, plan: Plan, trace: Trace | None = None, fault: Fault | None = None) -> None:
        self.plan = plan
        self.trace = trace or Trace(plan.trace)
        image, guest, backing = (self.trace.file(role) for role in ("image", "guest", "backing"))
        if image is None:
            raise InputError(f"{plan.trace}: has no image")
        self._fault = fault
        self.image = Contents(self.trace, image, plan.atom, plan.lying, options=plan.options)
        if fault is not None:
            self.image = Damaged(self.trace, image, plan.atom, plan.lying, fault)
        judged = guest if "acknowledged" in plan.rules else None
        self.promise = None if judged is None else Promise(self.trace, judged, plan.torn)
        self._base: Contents | None = None
        if backing is not None:
            self._base = Contents(self.trace, backing, plan.atom, plan.lying, options=plan.options)
        self.format = formats.find(plan.format)
        self._recording = Recording(self.image, self._base, self.promise, Tokens(self.trace))
        self._format = self.format(self._recording)
        self._external = None
        if plan.checker:
            self._external = External(plan.checker, plan.recovery_depth, self._judge_alone, plan.options)

    def advance(self, position: int) -> None:
        """Go on to a crash at `position`."""
        self.image.advance(position)
        if self.promise is not None:
            self.promise.advance(position)

    def explore(self, tasks: Iterable[Task]) -> Iterator[EpochResult]:
        """Explore the epochs of `tasks`, which ascend. If the plan has faults, a task's index is that of a fault, and
        its position where it strikes."""
        if self.plan.faults:
            for task in tasks:
                fault = self.plan.faults[task.index]
                struck = Session(replace(self.plan, faults=()), self.trace, fault)
                for result in struck.explore([task]):
                    result.found = [
                        replace(found, fault=fault, problem=struck.noticed(found)) for found in result.found
                    ]
                    yield result
            return
        before = self._external.runs if self._external is not None else 0
        for result in explore(self.image, self.promise, self.judge, tasks, sets=self.plan.sets, seed=self.plan.seed):
            if self._external is not None:
                result.runs, before = self._external.runs - before, self._external.runs
            yield result
            if result.index % _RELEASE == 0:
                self.trace.release()

    def noticed(self, found: Found) -> Problem:
        """What was found, no longer as silent if in that very state something else complains."""
        with settled_at(self.image, found.decisions):
            others = {problem.rule for problem in self.problems(100)} - {"acknowledged"}
        loud = found.problem.severity is Severity.SILENT and others
        return replace(found.problem, severity=Severity.LOSS) if loud else found.problem

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
            self._external.judge(disk, report, enough)
        else:
            self._by_format(disk, report, enough)

    def _by_format(self, disk: Deciding, report: Report, enough: Callable[[str], bool]) -> None:
        rules = {"opens", *self.plan.rules}
        if self._base is not None and self._base.position < self.image.position:
            self._base.advance(self.image.position)

        def in_scope(problem: Problem, patches: Sequence[tuple[int, bytes]] = ()) -> None:
            if problem.rule in rules:
                report(problem)

        if self._fault is None:
            self._format.judge(disk, in_scope, enough)
        else:
            noticing = Noticing(disk, report)
            noticing.run(lambda: self._format.judge(noticing, in_scope, enough))

    def _judge_alone(self, disk: Deciding, report: Report, enough: Callable[[str], bool]) -> None:
        """Judge by the format's rules, with no memory of the walk, which is left as it was."""
        image, promise, walking = self.image, self.promise, self._format
        touched, tightened = image.touched[:], promise.tightened[:] if promise else []
        below = self._base.touched[:] if self._base else []
        self._format = self.format(self._recording)
        try:
            self._by_format(disk, report, enough)
        finally:
            self._format, image.touched[:] = walking, touched
            if promise is not None:
                promise.tightened[:] = tightened
            if self._base is not None:
                self._base.touched[:] = below
