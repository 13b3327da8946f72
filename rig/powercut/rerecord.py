"""The shortest history that still breaks the same rule: operations of a recording are left out, and the rest is
recorded again on the real QEMU and explored, until nothing more can be left out.

What the guest did after the crash goes first, then halves, quarters and so on, from the end, and at last the requests
that overlapped. What breaks only now and then (requests overlap as they happen to) is tried several times.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from powercut import fuzz
from powercut.crash import finding as findings
from powercut.crash import setfinding
from powercut.crash.finding import Finding
from powercut.errors import InputError
from powercut.recording.operations import line, operations, possible
from powercut.scenario import Scenario, Workload, from_options, size_text
from powercut.trace import Trace

Progress = Callable[[int, int], None]
_TRIES = 3  # recordings of a history whose requests overlap


@dataclass(frozen=True, slots=True)
class Shrunk:
    """What became of a recording: of `before` operations those in `found.scenario` are left; `recordings` were made for
    that. `shortest`: none of the rest can be left out; else the time was up."""

    before: int
    found: fuzz.Found
    recordings: int
    shortest: bool


def scenario_of(trace: Trace, finding: Finding) -> Scenario:
    """The scenario that `trace` is a recording of, its operations written down, explored as for `finding`.

    Raises InputError if the trace does not say how to record it again."""
    meta: dict[str, Any] = trace.meta
    backing = trace.file("backing")
    drawn = meta.get("workload") or {}
    if meta.get("recorder") not in ("nbd", "blklogwrites") or not isinstance(drawn, dict) or "size" not in meta:
        raise InputError(f"{trace.path}: not a recording of `powercut record`, which alone can be made again")
    explore = {"atom": "write" if finding.whole else finding.atom, "checker": finding.checker or None}
    scenario = from_options(
        {
            "about": "",
            "expect": "HOLDS",
            "format": meta["format"],
            "size": size_text(int(meta["size"])),
            "options": meta.get("options", {}),
            "backing": None if backing is None else size_text(backing.size),
            "workload": {**drawn, "depth": meta.get("depth", 1)},
            "record": {"via": meta["recorder"], "lie": meta.get("lie", []), "no_flush": meta.get("no_flush", False)},
            "explore": {**explore, "order": finding.survivors, "torn": finding.torn, "lying_flushes": finding.lying},
        }
    )
    workload = Workload(
        depth=scenario.workload.depth, history=tuple(line(operation) for operation in operations(scenario))
    )
    return msgspec.structs.replace(scenario, workload=workload)


class _Attempts:
    """Recordings of one scenario's histories, until one breaks as `way` says; `best` is the shortest that did."""

    def __init__(self, scenario: Scenario, way: fuzz.Way, until: float, progress: Progress) -> None:
        self.best, self.text = scenario, ""
        self.recordings = 0
        self._way, self._until, self._progress = way, until, progress
        self._tried: set[tuple[int, tuple[str, ...]]] = set()

    @property
    def over(self) -> bool:
        return time.monotonic() > self._until

    def breaks(self, history: list[str], depth: int) -> bool:
        """Whether this history breaks; then it is the best."""
        workload = Workload(depth=depth, history=tuple(history))
        candidate = possible(msgspec.structs.replace(self.best, workload=workload))
        key = depth, candidate.workload.history
        if not candidate.workload.history or key in self._tried:
            return False
        self._tried.add(key)
        for _ in range(_TRIES if depth > 1 else 1):
            if self.over:
                return False
            seen, _ = fuzz.look(candidate)
            self.recordings += 1
            if self._way in seen.broken:
                self.best, self.text = candidate, seen.broken[self._way]
                return True
        return False

    def without_parts(self) -> None:
        """Leave out halves, quarters and so on of the history, from its end, and at last single operations."""
        size = max(1, len(self.best.workload.history) // 2)
        while size:
            end = len(self.best.workload.history)
            while end > 0 and not self.over:
                history = list(self.best.workload.history)
                end = min(end, len(history))
                self._progress(self.recordings, 0)
                self.breaks(history[: max(0, end - size)] + history[end:], self.best.workload.depth)
                end -= size
            size //= 2


def shrink(
    path: str, save: Path, seconds: float, trace_path: str | None = None, progress: Progress = lambda done, of: None
) -> Shrunk | None:
    """Shrink the recording of the finding in file `path` for about `seconds`, and write what is left into the folder
    `save`. None if what was recorded again never broke.

    Raises InputError, EnvironmentFault."""
    if setfinding.is_one(path):
        raise InputError(
            f"{path}: about files of a program, which only `powercut capture` can record again; its losses are the "
            "fewest already"
        )
    finding = findings.load(path)
    trace = Trace(trace_path or finding.trace)
    findings.same_trace(finding, trace)
    if finding.fault is not None:
        raise InputError(f"{path}: needs a media fault besides, which strikes at a position of this one recording")
    scenario = scenario_of(trace, finding)
    attempts = _Attempts(scenario, (finding.rule, finding.kind), time.monotonic() + seconds, progress)
    whole, depth = list(scenario.workload.history), scenario.workload.depth
    if not (attempts.breaks(_before_crash(trace, finding, whole), depth) or attempts.breaks(whole, depth)):
        return None
    before = None
    while before != attempts.best and not attempts.over:
        before = attempts.best
        attempts.without_parts()
        if attempts.best.workload.depth > 1:
            attempts.breaks(list(attempts.best.workload.history), 1)
    result = fuzz.Result(scenario.format, (), None)
    found = fuzz.Search(result, save).keep(attempts.best, (finding.rule, finding.kind), attempts.text)
    return Shrunk(len(whole), found, attempts.recordings, before == attempts.best)


def _before_crash(trace: Trace, finding: Finding, history: list[str]) -> list[str]:
    """The operations that had begun when the crash came."""
    guest = trace.file("guest")
    if guest is None:
        return history
    events = trace.events
    mine = events[(events["file"] == guest.id) & (events["issued"] < finding.position)]
    return history[: int(mine["ref"].max(initial=0))]
