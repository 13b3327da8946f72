"""The search over errors below a format (`powercut.faults.injection`), and what comes of it.

Every event that is raised while a history is carried out, every one of its occurrences, each error, once and for good:
one in each run. First comes a run without any error, which must show nothing. What is found is shrunk to the shortest
history that still shows it, run again, shown to another reader of QEMU's, and written down as a scenario.
"""

from __future__ import annotations

import atexit
import multiprocessing
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from powercut.errors import InputError
from powercut.explore.workers import prepare
from powercut.faults import Failure
from powercut.faults.blkdebug import ERRNOS, EVENTS, Injection
from powercut.faults.full import PLENTY, Full
from powercut.faults.injection import Case, Ran, Rig
from powercut.faults.powered import PoweredRig
from powercut.faults.reopened import Fault, told
from powercut.faults.server import WORDS, Mishap
from powercut.faults.target import LAYOUTS, Target, cluster
from powercut.guest.daemon import version
from powercut.guest.workload import Operation, Verb
from powercut.recording.histories import toml
from powercut.recording.operations import operations
from powercut.scenario import Errors, Scenario, Workload, from_options, parse_size, size_text
from powercut.verdict import Severity, Verdict

CONFIRM = 3  # times that a finding is run again
FORMATS = tuple(LAYOUTS)
_CHUNK = 8  # runs that a process is given at once
_SHRINK = 30.0  # seconds for each finding
_PAGES = 60  # places at which a file system is full, spread over all that an image takes
_ERRORS: dict[str, tuple[str, ...]] = {"blkdebug": (*ERRNOS,), "server": (*ERRNOS, *WORDS), "full": ("full",)}
_TIMES = {"once": 1, "good": None}
_READING = ("load", "read")  # in the name of an event: what follows reads, and no full disk hinders that

Progress = Callable[[int, int], None]
Way = tuple[str, str, str, str]  # rule, kind, error, once or good


@dataclass(slots=True)
class Found:
    """One way in which things went wrong. `points`: all injections that showed it; `case`: the shortest found, in
    which `ran` shows `fault` (`confirmed` times of CONFIRM), as does `witness`, another reader ("": none). `lies_at`:
    where in the image's file the data is that the disk has lost, if it is there."""

    way: Way
    points: list[str]
    case: Case
    ran: Ran
    fault: Fault
    confirmed: int
    witness: str
    lies_at: int | None
    of: int = CONFIRM

    @property
    def lines(self) -> list[str]:
        return [told(operation) for operation in self.case.history]


@dataclass(slots=True)
class Result:
    """What a sweep says. `events`: how often each is raised. `absorbed`: runs in which the guest saw no error at all,
    `stopped`: in which its machine was stopped by one;
    `leaking`: runs that left leaked clusters, which is legal."""

    scenario: Scenario
    target: Target
    history: tuple[Operation, ...]
    qemu: str
    events: dict[str, int] = field(default_factory=dict)
    runs: int = 0
    absorbed: int = 0
    stopped: int = 0
    leaking: int = 0
    found: list[Found] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def lines(self) -> list[str]:
        return [told(operation) for operation in self.history]

    @property
    def verdict(self) -> Verdict:
        if any(found.confirmed for found in self.found):
            return Verdict.BROKEN
        return Verdict.UNKNOWN if self.found or self.reasons else Verdict.HOLDS


def default_history(unit: int) -> list[str]:
    """What a guest does that meets most of a format: fresh and used clusters of `unit` bytes, whole, in part and across
    a border; zeroes, a discard, a cluster used again; flushes between."""
    some = min(unit, 64 << 10)
    return [
        f"write 0 {some // 2}",
        f"write {unit - some // 2} {some}",
        "flush",
        "write 0 4k" if unit > 4096 else f"write 0 {some}",
        f"zero {2 * unit} {some}",
        "zero 512 512",
        "flush",
        f"discard {unit} {unit}",
        f"write {unit} {min(4096, unit)}",
        f"write {4 * unit - some} {2 * some}",
        "flush",
        f"write {5 * unit} 512",
    ]


def scenario_of(format: str, options: dict[str, str], depth: int = 1, **more: Any) -> Scenario:
    """The scenario that sweeps a format, with the default history unless `more` keys say something else. Raises
    InputError."""
    if format not in LAYOUTS:
        raise InputError(f"format {format!r} is not one of {', '.join(LAYOUTS)}")
    unit = max(cluster(format, tuple(options.items())), 4096)
    plain = {"format": format, "options": options, "size": size_text(6 * unit), "errors": {}}
    return from_options(
        {
            "about": "",
            "expect": "HOLDS",
            **plain,
            "workload": {"depth": depth, "history": default_history(unit)},
            **more,
        }
    )


def prepared(scenario: Scenario) -> tuple[Target, tuple[Operation, ...]]:
    """What a scenario sweeps. Raises InputError for one that cannot be."""
    if scenario.format not in LAYOUTS:
        raise InputError(f"format {scenario.format!r} is not one of {', '.join(LAYOUTS)}")
    history = tuple(operations(scenario))
    for operation in history:
        if operation.verb not in (None, Verb.REOPEN):
            raise InputError(
                f"history: {operation.verb} is not swept: writes, zeroes, discards, flushes and reopens are"
            )
    errors = scenario.errors or Errors()
    if errors.event is not None and errors.event not in EVENTS:
        raise InputError(f"errors: event {errors.event!r} is not one of blkdebug's: {', '.join(EVENTS)}")
    if errors.event is not None and errors.below != "blkdebug":
        raise InputError(f"errors: events are blkdebug's, and what fails here is {errors.below}")
    for error in errors.error:
        if error not in _ERRORS[errors.below]:
            raise InputError(f"errors: {error!r} is not one of {', '.join(_ERRORS[errors.below])}")
    if errors.below == "server" and scenario.format not in ("qcow2", "raw"):
        raise InputError(f"errors: {scenario.format} grows its file, and a storage server's disk cannot grow")
    backing = parse_size(scenario.backing) if scenario.backing else 0
    options, depth = tuple(scenario.options.items()), scenario.workload.depth
    return Target(scenario.format, parse_size(scenario.size), options, backing, depth), history


def rig_for(target: Target, errors: Errors) -> Rig:
    """Where a sweep's cases are run. Raises EnvironmentFault."""
    return PoweredRig(target, errors.werror) if errors.werror else Rig(target)


def points(rig: Rig, history: tuple[Operation, ...], errors: Errors, events: dict[str, int]) -> Iterator[Failure]:
    """Every failure that `errors` asks for. Fills `events` with how many occasions there are for each."""
    times = [_TIMES[lasting] for lasting in errors.lasting]

    def which(what: str, number: int) -> range:
        if number:
            events[what] = number
        return range(1, number + 1) if errors.nth is None else range(errors.nth, min(errors.nth, number) + 1)

    if errors.below == "server":
        words = errors.error or ("EIO", "ENOSPC", "stall", "hangup", "unanswered")
        for nth in which("request", rig.occasions(history, Mishap(0))):
            for word in words:
                yield from (Mishap(nth, word, limit) for limit in times if word in ERRNOS or limit)
    elif errors.below == "full":
        number = rig.occasions(history, Full(PLENTY))
        for nth in which("page", number)[:: -(-number // _PAGES) or 1]:
            yield from (Full(nth, number, limit) for limit in times)
    else:
        for event in [errors.event] if errors.event else EVENTS:
            for nth in which(event, rig.count(history, event)):
                for error in errors.error or ERRNOS:
                    if error == "EIO" or not any(word in event for word in _READING):
                        yield from (Injection(event, nth, error, limit) for limit in times)


def run(scenario: Scenario, *, jobs: int = 1, progress: Progress = lambda done, of: None) -> Result:
    """Sweep. Raises InputError, EnvironmentFault."""
    begin = time.monotonic()
    target, history = prepared(scenario)
    result = Result(scenario, target, history, version())
    errors = scenario.errors or Errors()
    with rig_for(target, errors) as rig:
        cases = [Case(history)]
        cases += [Case(history, point) for point in points(rig, history, errors, result.events)]
        if len(cases) == 1:
            result.reasons.append("there was no occasion for it to fail: nothing was injected")
        ways: dict[Way, list[tuple[Case, Fault]]] = {}
        for case, ran in _all(rig, errors, cases, jobs):
            result.runs += 1
            result.absorbed += case.failure is not None and not ran.seen.errors
            result.stopped += ran.seen.stops > 0
            result.leaking += ran.leaks > 0
            for fault in ran.faults:
                ways.setdefault(_way(case, fault), []).append((case, fault))
            progress(result.runs, len(cases))
        result.found = [_found(rig, way, seen) for way, seen in sorted(ways.items())]
    result.found.sort(key=lambda found: -found.fault.severity)
    result.seconds = time.monotonic() - begin
    return result


def _way(case: Case, fault: Fault) -> Way:
    failure = case.failure
    return fault.rule, fault.kind, failure.error if failure else "none", failure.lasting if failure else ""


# ---- several processes

_rig: Rig | None = None


def _start(target: Target, errors: Errors) -> None:
    global _rig
    prepare()
    _rig = rig_for(target, errors)
    atexit.register(_rig.__exit__)


def _work(cases: list[Case]) -> list[tuple[Case, Ran]]:
    assert _rig is not None
    return [(case, _rig.run(case)) for case in cases]


def _all(rig: Rig, errors: Errors, cases: list[Case], jobs: int) -> Iterator[tuple[Case, Ran]]:
    if jobs == 1:
        yield from ((case, rig.run(case)) for case in cases)
        return
    chunks = [cases[at : at + _CHUNK] for at in range(0, len(cases), _CHUNK)]
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _start, (rig.target, errors))
    try:
        for done in pool.map(_work, chunks):
            yield from done
    finally:  # Ctrl-C, too: what has not begun is not begun any more
        pool.shutdown(cancel_futures=True)


# ---- a finding


def _found(rig: Rig, way: Way, seen: list[tuple[Case, Fault]]) -> Found:
    worst = max(fault.severity for _, fault in seen)
    case = shrink(rig, next(case for case, fault in seen if fault.severity is worst), way, worst)
    kept, best, confirmed = rig.scratch / "kept", None, 0
    for _ in range(CONFIRM):
        ran = rig.run(case, kept)
        fault = next((fault for fault in ran.faults if _way(case, fault) == way), None)
        if fault is not None:
            confirmed, best = confirmed + 1, (ran, fault)
    ran, fault = best or (Ran(), seen[0][1])
    points = [str(case.failure) for case, _ in seen if case.failure]
    witness, lies_at = (
        (rig.reopened.agrees(kept, ran.legal, fault), rig.reopened.lies_at(kept, fault)) if best else ("", None)
    )
    return Found(way, points, case, ran, fault, confirmed, witness, lies_at)


def shrink(rig: Rig, case: Case, way: Way, severity: Severity) -> Case:
    """Leave out operations while the same thing goes wrong, as badly; the error may strike earlier then."""
    deadline = time.monotonic() + _SHRINK

    def fails(history: tuple[Operation, ...]) -> Case | None:
        tried = [Case(history, failure) for failure in case.failure.earlier()] if case.failure else [Case(history)]
        for candidate in tried:
            if time.monotonic() > deadline:
                return None
            faults = rig.run(candidate).faults
            if any(_way(candidate, fault) == way and fault.severity >= severity for fault in faults):
                return candidate
        return None

    size = max(1, len(case.history) // 2)
    while True:
        smaller = None
        for at in range(len(case.history) - size, -1, -size):
            rest = case.history[:at] + case.history[at + size :]
            if rest and (smaller := fails(rest)) is not None:
                case = smaller
                break
        if smaller is None:
            if size == 1:
                return case
            size //= 2


def scenario(result: Result, found: Found) -> Scenario:
    """The scenario that shows a finding, and nothing else."""
    rule, _, error, lasting = found.way
    failure, werror = found.case.failure, (result.scenario.errors or Errors()).werror
    only = Errors(
        event="pwritev", nth=1, lasting=("once",), werror=werror
    )  # what is found without any error is found before it
    if failure:
        only = msgspec.convert({"error": (error,), "lasting": (lasting,), "werror": werror, **failure.table}, Errors)
    return msgspec.structs.replace(
        result.scenario,
        about=found.fault.text,
        expect="BROKEN",
        rule=rule,
        qemu=(".".join(result.qemu.split(".")[:2]),),
        workload=Workload(depth=result.target.depth, history=tuple(found.lines)),
        errors=only,
        name="",  # that of its file
    )


def save(result: Result, directory: Path) -> list[Path]:
    """Write a scenario for each finding; what an earlier sweep of the format left there goes. Raises InputError."""
    paths = []
    try:
        for old in directory.glob(f"{result.target.format}-*.toml"):
            old.unlink()
        for found in result.found:
            directory.mkdir(parents=True, exist_ok=True)
            path = directory / ("-".join(word for word in (result.target.format, *found.way) if word) + ".toml")
            path.write_text(toml(scenario(result, found)))
            paths.append(path)
    except OSError as error:
        raise InputError(f"{directory}: findings cannot be saved: {error.strerror}") from None
    return paths
