"""Fuzzing: short histories are recorded on the real QEMU and explored, until one breaks a rule; the shortest that does
becomes a scenario.

Random: hypothesis draws histories and shrinks what is found. A sample is never HOLDS: nothing found is UNKNOWN.
Systematic: all histories over a small alphabet, up to a length; if each of them was exhausted, that is HOLDS.

What breaks the same rule in the same way with the help of the same operations counts as the same defect, and the search
goes on for others: a history is judged by what its operations do not explain already.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import secrets
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from powercut import formats, gate
from powercut.errors import InputError, PowercutError
from powercut.explore import bundle, run
from powercut.guest.daemon import version
from powercut.recording import histories, record
from powercut.report import outcome as reports
from powercut.scenario import Scenario
from powercut.verdict import Verdict

BUDGET = 20_000  # checks for one history; what needs more is UNKNOWN
SHRINK = 60.0  # seconds that shrinking may go on after the time is up
_AGAIN = 3  # recordings of a history whose requests overlap, before it is taken to be harmless while shrinking
CONFIRM = 3  # times that the gate runs a scenario that was found

Progress = Callable[[int, int], None]
Way = tuple[str, str]  # the broken rule, and the kind of breach


@dataclass(frozen=True, slots=True)
class Seen:
    """What came of one history: its verdict, and what broke, the worst first."""

    verdict: Verdict
    broken: dict[Way, str] = field(default_factory=dict)  # how bad, and what is wrong
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Found:
    """A defect: its shortest scenario, the file it was written to, and how often the gate saw it again there; `replay`
    is a command that shows its crash state, from a bundle that needs nothing else."""

    scenario: Scenario
    way: Way
    text: str
    file: Path
    confirmed: int
    runs: int
    replay: str


@dataclass(slots=True)
class Result:
    """What a search says. Systematic: `of` histories there are, of up to `longest` operations (random: 0 and 0)."""

    format: str
    extra: tuple[str, ...]
    seed: int | None
    of: int = 0
    longest: int = 0
    alphabet: tuple[str, ...] = ()
    examples: int = 0
    exhausted: int = 0
    unknown: Counter[str] = field(default_factory=Counter)
    found: list[Found] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def verdict(self) -> Verdict:
        if self.found:
            return Verdict.BROKEN
        return Verdict.HOLDS if self.of and self.exhausted == self.of else Verdict.UNKNOWN


def duration(text: str) -> float:
    """Seconds from "90", "90s", "5m" or "1h". Raises InputError."""
    match = re.fullmatch(r"([0-9]+)([smh]?)", text)
    if match is None or not int(match[1]):
        raise InputError(f"{text!r} is not a time such as 90s, 5m or 1h")
    return float(int(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]])


def look(scenario: Scenario, trace: Path | None = None) -> tuple[Seen, run.Outcome | None]:
    """Record a scenario, into `trace` if that is given, and explore it."""
    with tempfile.TemporaryDirectory(prefix="powercut-") as scratch:
        place = trace or Path(scratch) / "history.trace"
        try:
            record.record(scenario, place)
            plan = gate.plan_of(scenario, place)
            outcome = run.explore_trace(plan, budget=scenario.explore.budget or BUDGET, jobs=1)
        except PowercutError as error:
            return Seen(Verdict.UNKNOWN, reason=re.sub(r"\S*/powercut-\S*", "...", str(error))), None
    broken: dict[Way, str] = {}
    for finding in outcome.findings:
        broken.setdefault((finding.rule, finding.kind), f"{finding.severity} ({finding.rule}): {finding.text}")
    return Seen(outcome.verdict, broken, "; ".join(outcome.reasons)), outcome


def _seen(scenario: Scenario) -> Seen:
    return look(scenario)[0]


class Search:
    """What both modes share: counting, telling old from new, and keeping what is new."""

    def __init__(self, result: Result, save: Path) -> None:
        self.result = result
        self._save = save
        self._begin = time.monotonic()

    def count(self, seen: Seen) -> None:
        result = self.result
        result.examples += 1
        if seen.verdict is Verdict.UNKNOWN:
            result.unknown[seen.reason] += 1
        else:
            result.exhausted += seen.verdict is Verdict.HOLDS
        result.seconds = time.monotonic() - self._begin

    def new(self, scenario: Scenario, seen: Seen) -> list[Way]:
        """What is broken in a way that no finding explains, the worst first."""
        here = histories.operations(scenario.workload.history)
        known = {f.way for f in self.result.found if histories.operations(f.scenario.workload.history) <= here}
        return [way for way in seen.broken if way not in known]

    def keep(self, scenario: Scenario, way: Way, text: str) -> Found:
        """Write the scenario's file, its trace and findings beside it, and have the gate run it."""
        qemu = version()
        scenario = msgspec.structs.replace(
            scenario,
            about=f"Found by powercut with QEMU {qemu}: {text}",
            expect="BROKEN",
            rule=way[0],
            qemu=(".".join(qemu.split(".")[:2]),),
        )
        words = [scenario.format, *way, *sorted(histories.operations(scenario.workload.history))]
        name = "-".join(words).replace(" ", "-")
        taken = sum(found.file.stem.startswith(name) for found in self.result.found)
        file = self._save / f"{name}-{taken + 1}.toml"
        try:
            self._save.mkdir(parents=True, exist_ok=True)
            file.write_text(histories.toml(scenario))
        except OSError as error:
            raise InputError(f"{file}: cannot be written: {error.strerror}") from None
        replay = ""
        for _ in range(CONFIRM if scenario.workload.depth > 1 else 1):
            _, outcome = look(scenario, file.with_suffix(".trace"))
            saved = reports.save(outcome.findings if outcome else [], file.with_suffix(".findings"))
            mine = [item.path for item in saved if (item.finding.rule, item.finding.kind) == way]
            if mine:
                bundle.write(str(mine[0]), str(file.with_suffix(".zip")))
                replay = f"powercut replay {file.with_suffix('.zip')} --out crash.img"
                break
        with tempfile.TemporaryDirectory(prefix="powercut-") as scratch:
            runs = [gate.run_all([file], 1, Path(scratch), quiet=True)[0] for _ in range(CONFIRM)]
        confirmed = sum(bool(r.outcome and r.outcome.verdict is Verdict.BROKEN) for r in runs if r.state == "expected")
        found = Found(scenario, way, text, file, confirmed, CONFIRM, replay)
        self.result.found.append(found)
        return found


class _Broken(Exception):
    """A history broke what is being looked for."""


class _Over(BaseException):
    """Time or number of examples is up. Not an Exception: hypothesis must not take it for a failing example."""


class _Hunt:
    """One run of hypothesis: up to the first new defect, and on to its shortest history."""

    def __init__(
        self, search: Search, memory: dict[bytes, Seen], until: float, examples: int | None, show: Callable[[], None]
    ) -> None:
        self._search, self._memory, self._until, self._examples, self._show = search, memory, until, examples, show
        self.best: list[tuple[tuple[int, ...], Scenario, Way, str]] = []

    def attempt(self, scenario: Scenario) -> None:
        best, memory = self.best, self._memory
        self._show()
        if time.monotonic() > self._until + (SHRINK if best else 0):
            raise _Over
        key = msgspec.json.encode(scenario)
        if key not in memory:  # hypothesis must be answered the same twice, and recording twice teaches little
            if self._examples is not None and self._search.result.examples >= self._examples and not best:
                raise _Over
            for _ in range(_AGAIN if best and scenario.workload.depth > 1 else 1):
                memory[key] = _seen(scenario)
                self._search.count(memory[key])
                if not best or best[0][2] in memory[key].broken:
                    break
        for way in self._search.new(scenario, memory[key]):
            if not best or way == best[0][2]:
                best.append((_size(scenario), scenario, way, memory[key].broken[way]))
                raise _Broken

    def run(self, strategy: Any, seed: int) -> bool:
        """Draw from `strategy` until something is found, and shrink it; False if time or examples are up."""
        import hypothesis as h

        @h.seed(seed)
        @h.settings(  # all that matters: hypothesis's own defaults differ where CI=true
            max_examples=10_000_000,
            derandomize=False,
            database=None,
            deadline=None,
            phases=(h.Phase.generate, h.Phase.shrink),
            suppress_health_check=list(h.HealthCheck),
            verbosity=h.Verbosity.quiet,
            report_multiple_bugs=False,
            print_blob=False,
        )
        @h.given(strategy)
        def test(scenario: Scenario) -> None:
            self.attempt(scenario)

        try:
            test()
        except _Over:
            return False
        except (_Broken, h.errors.Flaky):
            pass
        return True


def random(
    result: Result, save: Path, seconds: float, examples: int | None, lie: tuple[str, ...], progress: Progress
) -> Result:
    """Draw histories until the time or the number of examples is up; whatever is found is shrunk and kept."""
    search = Search(result, save)
    strategy = histories.drawn(result.format, result.extra, lie)
    memory: dict[bytes, Seen] = {}
    begin, seed, more = time.monotonic(), result.seed or 0, True

    def show() -> None:
        done, of = (result.examples, examples) if examples else (time.monotonic() - begin, seconds)
        progress(min(int(done), int(of)), int(of))

    while more:
        hunt, before = _Hunt(search, memory, begin + seconds, examples, show), result.examples
        more = hunt.run(strategy, seed) and (bool(hunt.best) or result.examples > before)
        seed += 1
        if hunt.best:
            _, scenario, way, text = min(hunt.best, key=lambda item: item[0])
            search.keep(scenario, way, text)
    return result


def _size(scenario: Scenario) -> tuple[int, ...]:
    """What makes a scenario simple to read: few operations first."""
    history = scenario.workload.history
    options = len(scenario.options) + (scenario.backing is not None) + (scenario.workload.depth > 1)
    return len(history), options, sum(map(len, history))


def systematic(
    result: Result, save: Path, seconds: float | None, jobs: int, lie: tuple[str, ...], progress: Progress
) -> Result:
    """Try every history of up to `result.longest` operations over the alphabet."""
    search = Search(result, save)
    result.alphabet = tuple(histories.alphabet(result.extra))
    result.of = sum(1 for _ in histories.every(result.format, result.extra, result.longest))
    begin = time.monotonic()
    tries, again = (histories.every(result.format, result.extra, result.longest, lie) for _ in range(2))
    with _mapper(jobs) as mapped:
        for scenario, seen in zip(tries, mapped(again), strict=True):
            search.count(seen)
            for way in search.new(scenario, seen):
                search.keep(scenario, way, seen.broken[way])
            progress(result.examples, result.of)
            if seconds is not None and time.monotonic() - begin > seconds:
                break
    return result


@contextmanager
def _mapper(jobs: int) -> Iterator[Callable[[Iterable[Scenario]], Iterator[Seen]]]:
    if jobs == 1:
        yield lambda scenarios: map(_seen, scenarios)
        return
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"))
    try:
        yield lambda scenarios: pool.map(_seen, scenarios, chunksize=8)
    finally:
        pool.shutdown(cancel_futures=True)


def search(
    format: str,
    save: Path,
    *,
    extra: str | None = None,
    limit: str | None = None,
    seed: int | None = None,
    examples: int | None = None,
    longest: int | None = None,
    lie: tuple[str, ...] = (),
    jobs: int | None = None,
    progress: Progress = lambda done, of: None,
) -> Result:
    """Search for defects of `format`: at random, or through all histories of up to `longest` operations. `extra`: the
    kinds of operations to use besides writes, flushes and reopens (None: all).

    Raises InputError, EnvironmentFault.
    """
    formats.find(format)
    version()
    known = histories.KINDS[format]
    kinds = known if extra is None else tuple(dict.fromkeys(kind for kind in extra.split(",") if kind))
    if not set(known).issuperset(kinds):
        raise InputError(f"--with {extra}: for {format} only {', '.join(known)}, with a comma between")
    seconds = duration(limit) if limit else None
    if longest is not None:
        if examples is not None or seed is not None:
            raise InputError("--systematic tries all histories: --examples and --seed do not go with it")
        jobs = jobs or os.cpu_count() or 1
        return systematic(Result(format, kinds, None, longest=longest), save, seconds, jobs, lie, progress)
    if seconds is None:
        seconds = 60.0 if examples is None else float("inf")
    seed = secrets.randbelow(1 << 32) if seed is None else seed
    return random(Result(format, kinds, seed), save, seconds, examples, lie, progress)
