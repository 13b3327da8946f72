"""Exploring all files of a recording at once: names, sizes and contents, with programs as the checkers.

The user's command judges every crash state, in a directory that shows it (`powercut.explore.outside`); crashes inside
what it writes are explored in their turn. Without a command, disk images are judged by what is known of them
(`powercut.explore.promised`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

from powercut.crash.model import epochs
from powercut.crash.options import Options
from powercut.crash.setfinding import SetFinding, from_found
from powercut.errors import InputError
from powercut.explore.external import External
from powercut.explore.outside import Outside
from powercut.explore.promised import Promised
from powercut.formats.probe import CHECKS
from powercut.stores import DEFAULT, INTERRUPTED, Case, StoreOutcome, chosen, explore_store, shrunk
from powercut.trace import Trace
from powercut.verdict import Problem, Severity, Verdict


@dataclass(frozen=True, slots=True)
class SetPlan:
    """What to explore and how. `checker` is a command; None: images are judged by what is known of them. `image` is
    the file that {} stands for in the command; `seed`: what is drawn, is drawn with this."""

    trace: str
    options: Options = DEFAULT
    checker: str | None = None
    image: str | None = None
    recovery_depth: int = 1
    seed: int = 1


@dataclass(slots=True)
class SetOutcome:
    """A verdict with what it rests on. `unjudged` counts epochs at which nothing is promised yet."""

    plan: SetPlan
    verdict: Verdict
    scope: str
    found: StoreOutcome
    runs: int
    unjudged: int
    judged: list[str]
    findings: list[SetFinding]
    reasons: list[str]


class SetJudge(Protocol):
    """A judge of all files. `judged` says what it looks at, `reasons` what keeps it from saying more."""

    judged: list[str]
    reasons: list[str]

    def positions(self, ends: Sequence[int]) -> list[int]:
        """Those epochs at which there is something to judge."""

    def __call__(self, case: Case) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class ByCommand(Outside):
    """The user's command judges every state."""

    def __init__(self, command: str, image: str | None) -> None:
        super().__init__()
        self._external = External(command, 0)
        self._command, self._image = command, image or ""
        self.judged = [command]
        self.reasons: list[str] = []

    def positions(self, ends: Sequence[int]) -> list[int]:
        return list(ends)

    def __call__(self, case: Case) -> None:
        def program(path: str) -> tuple[bool, str]:
            return self._external.run(os.path.join(path, self._image), path)

        (content, said), _ = self.on(case).run("checker", program)
        if not content:
            where = f" (after a crash inside recovery {case.level})" if case.level else ""
            case.report(Problem("checker", "broken", 0, Severity.CORRUPT, f"{self._command}: {said}{where}"))


def judge_of(plan: SetPlan, trace: Trace) -> SetJudge:
    """The judge that a plan asks for. Raises InputError, EnvironmentFault."""
    if not any(info.role == "directory" and info.name == "." for info in trace.files):
        raise InputError(f"{plan.trace}: not a recording of a directory: nothing to explore (see capture --dir)")
    if plan.checker is None:
        return Promised(trace, plan.options)
    image = plan.image
    if image is None and ("{}" in plan.checker or "{dir}" not in plan.checker):
        images = sorted(path for path, format in Promised(trace, plan.options).formats.items() if format in CHECKS)
        if len(images) != 1:
            known = ", ".join(images) or "none is known"
            raise InputError(f"{plan.checker}: it wants one image, and there is not just one ({known}): --image")
        image = images[0]
    return ByCommand(plan.checker, image)


def explore_set(
    plan: SetPlan,
    *,
    budget: int | None = None,
    jobs: int | None = None,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> SetOutcome:
    """Explore all files of a recording. `budget` bounds the number of checks, `jobs` the processes.

    Raises InputError, EnvironmentFault."""
    trace = Trace(plan.trace)
    trace.verify()
    judge = judge_of(plan, trace)
    ends = epochs(trace)
    positions = judge.positions(ends)
    found = StoreOutcome()
    if positions:
        found = explore_store(
            plan.trace,
            judge,
            depth=plan.recovery_depth,
            options=plan.options,
            budget=budget,
            positions=positions,
            jobs=min(jobs or os.cpu_count() or 1, len(positions)),
            seed=plan.seed,
            progress=progress,
        )
    findings = chosen(found.findings)
    if INTERRUPTED not in found.reasons:
        findings = shrunk(plan.trace, judge, findings, plan.options)
    reasons = found.reasons + judge.reasons
    reasons += [str(why) for why in (trace.truncated, trace.meta.get("truncated")) if why]
    reasons += [f"{name} was changed in ways that were not recorded ({', '.join(ways)})" for name, ways in _past(trace)]
    if not positions:
        reasons.append("nothing is promised at any moment: there is no rule to judge (--checker CMD is one)")
    verdict = found.verdict
    if verdict is Verdict.HOLDS and reasons:
        verdict = Verdict.UNKNOWN
    return SetOutcome(
        plan,
        verdict,
        str(trace.meta.get("scope", "overlap")),
        found,
        found.runs,
        len(ends) - len(positions),
        judge.judged,
        [from_found(one, plan, trace) for one in findings],
        reasons,
    )


def _past(trace: Trace) -> list[tuple[str, list[str]]]:
    return sorted(trace.meta.get("past", {}).items())
