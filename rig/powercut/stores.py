"""Exploring a recording of a store: the real open and recovery of an implementation, on every crash state of its files.

A judge is given a crash state as a store, and does with it what a user would do after the crash: open, recover, look.
What it writes is recorded, and a crash at every moment of that is explored in the same way, `depth` levels deep.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from powercut.capture.interrupted import interruptions_are_its_own
from powercut.capture.store import RecordingStore
from powercut.crash.alike import Possible, comparable, possible
from powercut.crash.explore import ENOUGH, MORE, SPENT, Enough, Searched, Task, Unjudged
from powercut.crash.fileset import CrashSet, FileSet, Node, State, Told, of_recording, tell
from powercut.crash.model import CHANGES, epochs
from powercut.crash.options import Options
from powercut.crash.rounds import rounds
from powercut.crash.sample import Sampled, look, sampled
from powercut.crash.search import BudgetSpent, Decision, OneState, Policy, Search
from powercut.crash.settled import Patch, differences, files_at
from powercut.crash.shrink import reduced
from powercut.crash.store import SetFile, SetStore
from powercut.errors import Nondeterministic
from powercut.trace import Kind, Trace, TraceWriter
from powercut.verdict import Problem, Verdict
from quire.store import File, Store

DEFAULT = Options()
INTERRUPTED = "interrupted"
KEPT = 3  # findings of each rule and kind
# Thousands of recoveries are recorded and forgotten: in memory, where there is a place for it.
_MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
_CONTENT = [*CHANGES, Kind.TRUNCATE]


@dataclass(frozen=True, slots=True)
class Case:
    """One crash state, for a judge: `store` is the first directory of the recording after a crash before `position`
    of its trace, or, at `level` 1 or more, after a further crash inside a recovery. `files` is the recording at the
    crash, `state` the state that the store shows.

    `report` takes a broken rule. `explore` runs an independent part of the check for every way its reads can turn out:
    what one part reads is not decided for the next, so nothing that a part has read may be kept for another."""

    store: RecordingStore | SetStore
    files: FileSet
    state: State
    position: int
    level: int
    report: Callable[[Problem], None]
    search: Search
    directories: Mapping[str, Node]

    def again(self) -> SetStore:
        """Another store of the same state, for what is not to be recorded."""
        return SetStore(self.state, self.directories)

    def explore(self, part: Callable[[], None]) -> None:
        """See `Search.explore`."""
        self.search.explore(part)


class Judge(Protocol):
    """The check of one state. It must depend on nothing but what it reads of the store. Raises Unjudged.

    One that is a context manager is entered in each process that it judges in."""

    def __call__(self, case: Case) -> None: ...


@runtime_checkable
class Promising(Protocol):
    """A judge that says what its verdict rests on besides the state: the same where `promise` is the same."""

    def promise(self, position: int) -> bytes: ...


@dataclass(frozen=True, slots=True)
class StoreFinding:
    """A broken rule: a crash before `position`, and what had then survived of what was in flight."""

    position: int
    level: int
    problem: Problem
    decisions: tuple[Told, ...]
    patches: tuple[Patch, ...] = ()  # what recoveries made of the state of level 0
    others: Literal["lost", "survived"] = "lost"  # what else was in flight
    needs: tuple[Told, ...] = ()  # of what survived: what has to have, for the rule to break

    def __str__(self) -> str:
        lines = [f"{self.problem.rule}: {self.problem.text}", f"  crash before position {self.position}"]
        for told in self.decisions:
            state = "as it was" if told.durable else f"as event {told.event} left it"
            where = f" at {told.offset:,}" if told.what == "content" else ""
            level = f" (recovery {told.level})" if told.level else ""
            lines.append(f"  {told.what} of {told.file}{where}: {state}{level}")
        lines.append(f"  everything else in flight: {self.others}")
        return "\n".join(lines)


@dataclass(slots=True)
class StoreOutcome:
    """What the search says. `checks` counts runs of the judge or of a part of it, recoveries included."""

    epochs: int = 0
    exhausted: int = 0  # epochs
    undecided: int = 0  # atoms, sizes and changes of names
    log2_states: float = 0.0
    checks: int = 0
    alike: int = 0  # states of all files together that were not searched: others like them had been
    runs: int = 0  # of programs that judged
    findings: list[StoreFinding] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    sampled: Sampled | None = None

    @property
    def verdict(self) -> Verdict:
        if self.findings:
            return Verdict.BROKEN
        return Verdict.HOLDS if self.exhausted == self.epochs and not self.reasons else Verdict.UNKNOWN

    @property
    def coverage(self) -> dict[str, float]:
        """The numbers, by name."""
        return {
            "epochs": self.epochs,
            "epochs_exhausted": self.exhausted,
            "undecided": self.undecided,
            "log2_states": round(self.log2_states, 1),
            "checks": self.checks,
            "alike": self.alike,
        }


@dataclass(slots=True)
class _Visited(Searched[StoreFinding]):
    """What the search says of one epoch."""

    alike: int = 0


def _concluded(epochs: Sequence[_Visited], seed: int) -> StoreOutcome:
    """The outcome of all epochs."""
    return StoreOutcome(
        epochs=len(epochs),
        exhausted=sum(epoch.exhausted for epoch in epochs),
        undecided=sum(epoch.undecided_atoms for epoch in epochs),
        log2_states=sum(epoch.log2_states for epoch in epochs),
        checks=sum(epoch.checks for epoch in epochs),
        alike=sum(epoch.alike for epoch in epochs),
        runs=sum(epoch.runs for epoch in epochs),
        findings=[found for epoch in epochs for found in epoch.found],
        reasons=list(dict.fromkeys(epoch.unknown for epoch in epochs if epoch.unknown)),
        sampled=sampled(epochs, seed),
    )


class _Known:
    """Which nodes of the state a recovery's trace speaks of."""

    def __init__(self, grain: int) -> None:
        self.grain = grain
        self.nodes: dict[int, Node] = {}

    def file(self, id: int, file: File) -> None:
        assert isinstance(file, SetFile)
        if file.node is not None:
            self.nodes[id] = file.node

    def directory(self, id: int, store: Store) -> None:
        assert isinstance(store, SetStore)
        self.nodes[id] = store.node

    def which(self, store: Store) -> Hashable:
        assert isinstance(store, SetStore)
        return store.node


class _Epoch:
    """The search of one epoch."""

    def __init__(
        self, files: FileSet, judge: Judge, depth: int, search: Search, scratch: str, known: set[bytes] | None = None
    ) -> None:
        self.files = files
        self.judge = judge
        self.depth = depth
        self.scratch = scratch
        self.search = search
        self.traces = {0: files.trace}
        self.directories = {f.name: Node(0, f.id) for f in files.trace.files if f.role == "directory"}
        self.found: dict[tuple[str, str, int], StoreFinding] = {}
        self.paths: dict[tuple[str, str, int], list[Decision]] = {}  # what each rests on
        self._more = MORE
        self._known = known if comparable(files) else None
        self._promise = b""
        self._alike = 0

    def run(self, task: Task, seed: int) -> _Visited:
        """Exhaust the epoch that ends at `task.position`, or look at a sample of its states."""
        self.position = task.position
        self._promise = (
            self.judge.promise(task.position) if isinstance(self.judge, Promising) else b"%d" % task.position
        )
        counts, undone = self.files.alternatives(), self.files.undone()
        result = _Visited(task.index, task.position, undecided_atoms=len(counts), events=len(undone))
        result.log2_states = float(np.log2(counts).sum()) if counts else 0.0
        ran = getattr(self.judge, "runs", 0)
        try:
            if task.sampled:
                for way in look(self.search, self._whole, undone, seed + task.index, of_recording):
                    result.sampled[way] = result.sampled.get(way, 0) + 1
            else:
                whole = CrashSet(self.files, self.search)
                self._once(None if self._known is None else possible(whole), 0, self._whole)
                result.exhausted = not self.found
        except Enough:
            pass
        except BudgetSpent:
            result.unknown = SPENT
        except KeyboardInterrupt:
            result.unknown = INTERRUPTED
        except (Nondeterministic, Unjudged) as error:
            result.unknown = str(error)
        result.checks, result.alike = self.search.checks, self._alike
        result.runs = getattr(self.judge, "runs", 0) - ran
        result.found = list(self.found.values())
        return result

    def state(self, position: int) -> Sequence[StoreFinding]:
        """What is wrong with the one state of a `OneState`."""
        self.position = position
        with suppress(Nondeterministic, Unjudged, Enough):  # what was found until then stands
            self._check(CrashSet(self.files, self.search), 0)
        return list(self.found.values())

    def _whole(self) -> None:
        self._check(CrashSet(self.files, self.search), 0)
        if len(self.found) >= ENOUGH:
            raise Enough

    def _once(self, here: Possible | None, level: int, part: Callable[[], None]) -> None:
        """Explore `part`, unless states like these were explored and nothing was found."""
        key = b"" if here is None else here.digest(b"%d %d" % (level, self.depth), self._promise)
        if self._known is not None and key in self._known:
            self._alike += 1
            return
        before = len(self.found)
        self.search.explore(part)
        if self._known is not None and key and len(self.found) == before:
            self._known.add(key)

    def _patches(self, state: State) -> tuple[Patch, ...]:
        """What `state` has that the state of level 0 has not, if of all that is undecided nothing had survived."""
        with self.search.assuming(lambda disk, choice: 0):
            below = CrashSet(self.files, self.search)
            return tuple(differences(below, state, self.directories["."]))

    def _check(self, state: CrashSet, level: int) -> None:
        def report(problem: Problem) -> None:
            if problem.key not in self.found:
                told = tuple(tell(decision, self.traces) for decision in self.search.path)
                patches = self._patches(state) if level else ()
                self.paths[problem.key] = self.search.path[:]
                self.found[problem.key] = StoreFinding(self.position, level, problem, told, patches)

        def judge(store: RecordingStore | SetStore) -> None:
            self.judge(Case(store, self.files, state, self.position, level, report, self.search, self.directories))
            self._more -= bool(self.found)
            if self._more == 0:  # also deep in a recovery: its states may be without end
                raise Enough

        if level >= self.depth:  # nobody looks into what the judge does
            judge(SetStore(state, self.directories))
            return
        known = _Known(self.files.options.atom)
        path = f"{self.scratch}/recovery-{level + 1}.trace"
        with TraceWriter(path, {}) as writer:
            judge(RecordingStore(SetStore(state, self.directories), writer, known))
        trace = Trace(path)
        files = FileSet(trace, self.files.options)
        if not np.isin(trace.events["kind"], _CONTENT).any() and not files.names.changes:
            return
        # The next recovery is recorded under the same name: this one's file goes on under its map.
        Path(path).unlink()
        self.traces[level + 1] = trace
        here = possible(state) if self._known is not None and comparable(files) else None
        for position in _distinct(trace):
            files.advance(position)
            crashed = CrashSet(files, self.search, state, level + 1, known.nodes)
            then = None if here is None else possible(crashed, here)
            self._once(then, level + 1, lambda crashed=crashed: self._check(crashed, level + 1))  # type: ignore[misc]


def _entered(judge: Judge) -> AbstractContextManager[Any]:
    return judge if isinstance(judge, AbstractContextManager) else nullcontext()


def _distinct(trace: Trace) -> list[int]:
    """The crash positions in a recovery that can leave something new. A judge knows nothing of what a recovery had
    been told was durable, so where nothing was done since the last position, that one stood for this one too."""
    issued = trace.events["issued"][~np.isin(trace.events["kind"], [Kind.FLUSH, Kind.SYNC_DIR, Kind.MARK])]
    positions = np.array(epochs(trace))
    changes = np.searchsorted(issued, positions)
    return positions[np.diff(changes, prepend=0) > 0].tolist()  # type: ignore[no-any-return]


def explore_store(
    trace: str | Path,
    judge: Judge,
    *,
    depth: int = 2,
    options: Options = DEFAULT,
    budget: int | None = None,
    positions: Sequence[int] | None = None,
    jobs: int = 1,
    seed: int = 1,
    known: set[bytes] | None = None,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> StoreOutcome:
    """Run `judge` on every crash state of the store recorded in `trace`, at the end of each epoch, or at `positions`.

    States like others that were searched are not searched again (`powercut.crash.alike`): others of this call, and of
    earlier ones that were given the same `known`, with judges that promise what they rest on.
    `budget` bounds the checks; what it does not suffice for is sampled, with `seed`. Processes are forked, so `judge`
    may be anything. `progress` is told the epochs done, and all. Ctrl-C ends the search: what was found until then is
    the outcome, and it says so. Raises InputError if the trace cannot be used."""
    ends = list(positions) if positions is not None else epochs(Trace(trace))
    taken, done = (multiprocessing.get_context("fork").Value("l") for _ in range(2))
    stopped = False

    def walk(tasks: Sequence[Task]) -> list[_Visited]:
        """The next task, again and again: a file set goes forward only."""
        recording = Trace(trace)
        recording.verify()
        files = FileSet(recording, options)
        visited: list[_Visited] = []
        seen = known if known is not None and isinstance(judge, Promising) else set[bytes]()
        with _entered(judge), tempfile.TemporaryDirectory(prefix="powercut-", dir=_MEMORY) as scratch:
            while not (visited and visited[-1].unknown == INTERRUPTED):
                with taken:
                    number = taken.value
                    taken.value += 1
                if number >= len(tasks):
                    break
                task = tasks[number]
                try:
                    files.advance(task.position)
                    searched = None if task.sampled else seen
                    epoch = _Epoch(files, judge, depth, Search(task.budget), scratch, searched)
                    visited.append(epoch.run(task, seed))
                except KeyboardInterrupt:
                    visited.append(_Visited(task.index, task.position, unknown=INTERRUPTED))
                with done:
                    done.value += 1
                if jobs == 1:
                    progress(done.value, len(tasks))
        return visited

    def explore(tasks: list[Task]) -> list[_Visited]:
        nonlocal stopped
        taken.value = done.value = 0
        visited = walk(tasks) if jobs == 1 or len(tasks) < 2 else _in_processes(walk, tasks, jobs, done, progress)
        stopped = any(epoch.unknown == INTERRUPTED for epoch in visited)
        return visited

    empty = [_Visited(index, position) for index, position in enumerate(ends)]
    return _concluded(rounds(empty, budget, explore, lambda: stopped), seed)


def chosen(findings: Sequence[StoreFinding]) -> list[StoreFinding]:
    """Of each rule and kind the `KEPT` findings with the fewest decisions, the worst first."""
    seen: Counter[tuple[str, str]] = Counter()
    kept = []
    for one in sorted(findings, key=lambda one: (-one.problem.severity, len(one.decisions), one.position)):
        key = (one.problem.rule, one.problem.kind)
        seen[key] += 1
        if seen[key] <= KEPT:
            kept.append(one)
    return kept


def shrunk(
    trace: str | Path, judge: Judge, findings: Sequence[StoreFinding], options: Options = DEFAULT
) -> list[StoreFinding]:
    """The `findings`, each with as little lost as will do (`powercut.crash.shrink`). Ctrl-C leaves the rest as they
    are."""
    less = list(findings)
    if not less:
        return less
    recording = Trace(trace)
    with (
        _entered(judge),
        tempfile.TemporaryDirectory(prefix="powercut-", dir=_MEMORY) as scratch,
        suppress(KeyboardInterrupt),
    ):
        for number, one in enumerate(less):
            less[number] = _reduced(files_at(recording, options, one.position), judge, one, scratch)
    return less


def _reduced(files: FileSet, judge: Judge, found: StoreFinding, scratch: str) -> StoreFinding:
    """The same broken rule, by a state in which little was lost."""
    problem = found.problem
    epoch: _Epoch

    def same(policy: Policy) -> StoreFinding | None:
        nonlocal epoch
        epoch = _Epoch(files, judge, found.level, OneState(policy), scratch)
        for one in epoch.state(found.position):
            if (one.problem.rule, one.problem.kind, one.level) == (problem.rule, problem.kind, found.level):
                return one
        return None

    def breaks(policy: Policy) -> list[Decision] | None:
        found = same(policy)
        return None if found is None else epoch.paths[found.problem.key]

    less = reduced(files, {(told.disk, told.atom): told.chosen for told in found.decisions}, breaks)
    last = None if less is None else same(less.policy)
    if less is None or last is None:
        return found
    decisions = tuple(tell(decision, epoch.traces) for decision in less.lost)
    needs = tuple(tell(decision, epoch.traces) for decision in less.needs)
    return replace(last, decisions=decisions, others="survived", needs=needs)


Walk = Callable[[Sequence[Task]], list[_Visited]]


def _in_processes(
    walk: Walk, tasks: Sequence[Task], jobs: int, done: Any, progress: Callable[[int, int], None]
) -> list[_Visited]:
    """`walk` in several processes, which take `tasks` from one another."""
    global _forked
    _forked = walk
    visited: list[_Visited] = []
    with (
        interruptions_are_its_own(),
        ProcessPoolExecutor(jobs, multiprocessing.get_context("fork"), signal.signal, _IGNORE) as pool,
    ):
        futures = {pool.submit(_walk, tasks) for _ in range(min(jobs, len(tasks)))}
        while futures:
            ended, futures = wait(futures, timeout=0.2)
            for future in ended:
                visited += future.result()
            progress(done.value, len(tasks))
    return sorted(visited, key=lambda epoch: epoch.index)


_forked: Walk
_IGNORE = (signal.SIGINT, signal.SIG_IGN)  # where there is nothing to interrupt


def _walk(tasks: Sequence[Task]) -> list[_Visited]:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return _forked(tasks)
    finally:
        signal.signal(*_IGNORE)
