"""Where epochs are explored: in this process, in several of this machine, or on a Dask cluster.

All give the same results in another order. A worker that is lost (killed, out of memory) loses none: what it had not
handed in is given to another one. A trace is shipped to each worker of a cluster once, into its scratch directory,
under its hash.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from powercut.crash.explore import EpochResult, Task
from powercut.errors import EnvironmentFault
from powercut.explore.session import Plan, Session
from powercut.trace import Trace

_TRIES = 4  # times in a row that workers may be lost before anything is handed in
_PORTION = 16  # tasks that are given out together, unless each takes long
_PIECE = 32 << 20  # bytes of a trace that are shipped at once


class Workers(Protocol):
    """Explores the epochs of `tasks`, which ascend; results come as they are ready. Other processes begin at once."""

    def explore(self, plan: Plan, tasks: Sequence[Task]) -> Iterator[EpochResult]: ...

    def abandon(self) -> None:
        """Nothing more is wanted, neither what is under way."""


class Here:
    """This process. `trace` is the plan's, opened."""

    def __init__(self, trace: Trace) -> None:
        self._trace = trace

    def explore(self, plan: Plan, tasks: Sequence[Task]) -> Iterator[EpochResult]:
        return Session(plan, self._trace).explore(tasks)

    def abandon(self) -> None:
        return


class _Local(threading.local):
    """One walk for each thread of a worker, which goes on where it stands if that is behind the tasks."""

    session: Session | None = None


_local = _Local()


def _work(plan: Plan, tasks: list[Task]) -> list[EpochResult]:
    """In a worker: explore `tasks`."""
    session = _local.session
    if session is None or session.plan != plan:
        session = _local.session = Session(plan)
    elif session.image.position > tasks[0].position:
        trace, session, _local.session = session.trace, None, None  # one walk in memory at a time
        session = _local.session = Session(plan, trace)
    return list(session.explore(tasks))


@dataclass(slots=True)
class _Lane:
    """A worker and the tasks it has before it, which follow each other: it goes forward only, and what it skips costs
    it time. `tries`: how often in a row it was lost before it handed anything in."""

    start: Callable[[], Executor]
    executor: Executor
    left: list[Task] = field(default_factory=list)
    tries: int = 0


class Pool:
    """Workers behind an executor each, which `starts` make, and make again when it is broken."""

    def __init__(self, starts: Sequence[Callable[[], Executor]]) -> None:
        self._lanes = [_Lane(start, start()) for start in starts]

    def explore(self, plan: Plan, tasks: Sequence[Task]) -> Iterator[EpochResult]:
        size = 1 if plan.checker or plan.faults else _PORTION
        share = -(-len(tasks) // len(self._lanes))
        for number, lane in enumerate(self._lanes):
            lane.left, lane.tries = list(tasks[number * share : (number + 1) * share]), 0
        futures: dict[Future[list[EpochResult]], tuple[_Lane, list[Task]]] = {}

        def give(lane: _Lane) -> None:
            if not lane.left:
                self._share(lane, size)
            if lane.left:
                portion, lane.left = lane.left[:size], lane.left[size:]
                futures[self._submit(lane, plan, portion)] = lane, portion

        def results() -> Iterator[EpochResult]:
            while futures:
                for future in wait(futures, return_when=FIRST_COMPLETED).done:
                    lane, portion = futures.pop(future)
                    try:
                        ready = future.result()
                        lane.tries = 0
                    except self._lost():
                        ready = []
                        lane.left[:0] = portion
                        lane.tries += 1
                        if lane.tries == _TRIES:
                            words = f"worker processes were lost {_TRIES} times in a row (killed, or out of memory)"
                            raise EnvironmentFault(words) from None
                        self._again(lane, plan)
                    give(lane)
                    yield from ready

        for lane in self._lanes:
            give(lane)
        return results()

    def _share(self, lane: _Lane, size: int) -> None:
        """Let `lane` have half of what is left to the one that has most."""
        richest = max(self._lanes, key=lambda other: len(other.left))
        half = len(richest.left) // 2
        if half >= size:
            richest.left, lane.left = richest.left[:-half], richest.left[-half:]

    def _submit(self, lane: _Lane, plan: Plan, portion: list[Task]) -> Future[list[EpochResult]]:
        try:
            return lane.executor.submit(_work, plan, portion)
        except BrokenExecutor as error:  # it was lost while it had nothing to do
            future: Future[list[EpochResult]] = Future()
            future.set_exception(error)
            return future

    def _lost(self) -> tuple[type[BaseException], ...]:
        """What a future raises whose worker was lost."""
        return (BrokenExecutor,)

    def _again(self, lane: _Lane, plan: Plan) -> None:
        lane.executor.shutdown(wait=False, cancel_futures=True)
        lane.executor = lane.start()

    def abandon(self) -> None:
        for lane in self._lanes:
            lane.executor.shutdown(wait=False, cancel_futures=True)

    def close(self) -> None:
        """Let the workers go."""
        for lane in self._lanes:
            lane.executor.shutdown(cancel_futures=True)


class Processes(Pool):
    """`jobs` processes of this machine. None outlives this one, however it ends.

    They are forked from this one when it has opened `trace` and stands before it, and share what that takes.
    """

    def __init__(self, jobs: int, trace: Trace) -> None:
        self._others = set(multiprocessing.active_children())
        self._trace = trace
        super().__init__([lambda: ProcessPoolExecutor(1, multiprocessing.get_context("fork"), prepare)] * jobs)

    def explore(self, plan: Plan, tasks: Sequence[Task]) -> Iterator[EpochResult]:
        _local.session = Session(plan, self._trace)
        return self._until_done(super().explore(plan, tasks))

    @staticmethod
    def _until_done(results: Iterator[EpochResult]) -> Iterator[EpochResult]:
        try:
            yield from results
        finally:
            _local.session = None

    def _submit(self, lane: _Lane, plan: Plan, portion: list[Task]) -> Future[list[EpochResult]]:
        with _interrupted_later():
            return super()._submit(lane, plan, portion)

    def abandon(self) -> None:
        for process in set(multiprocessing.active_children()) - self._others:
            process.terminate()
        super().abandon()


@contextmanager
def _interrupted_later() -> Iterator[None]:
    """Ctrl-C waits until the processes that are started meanwhile are on their way. They inherit that they are deaf to
    it, until they can ignore it themselves."""
    came: list[int] = []
    main = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGINT, lambda number, frame: came.append(number)) if main else None
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if main:
            signal.signal(signal.SIGINT, handler)
    if came:
        raise KeyboardInterrupt


def prepare() -> None:
    """In a new worker process: leave Ctrl-C to the parent, and end with it, or when it says so."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    parent = multiprocessing.parent_process()

    def follow() -> None:
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


class Missing(Exception):
    """A worker of a cluster has not got the trace."""


class Cluster(Pool):
    """The workers of the Dask cluster at `address`. Raises EnvironmentFault if there is none, or no Dask."""

    def __init__(self, address: str) -> None:
        try:
            distributed: Any = importlib.import_module("distributed")
        except ImportError:
            raise EnvironmentFault("a cluster needs Dask: pip install 'powercut[cluster]'") from None
        try:
            self._client: Any = distributed.Client(address, timeout="30s", set_as_default=False)
        except (OSError, ValueError) as error:
            raise EnvironmentFault(f"no Dask scheduler answers at {address}: {error}") from None
        self._killed: type[BaseException] = distributed.KilledWorker
        self._hash = ""
        threads = [address for address, number in self._client.nthreads().items() for _ in range(number)]
        super().__init__([partial(self._executor_at, address) for address in threads or [None]])

    def _executor_at(self, address: str | None) -> Executor:
        """The worker at `address`, or another if that is gone."""
        there = {"workers": [address], "allow_other_workers": True} if address else {}
        executor: Executor = self._client.get_executor(pure=False, **there)
        return executor

    def explore(self, plan: Plan, tasks: Sequence[Task]) -> Iterator[EpochResult]:
        self._hash = Trace(plan.trace).hash
        self._ship(plan)
        return super().explore(plan, tasks)

    def _submit(self, lane: _Lane, plan: Plan, portion: list[Task]) -> Future[list[EpochResult]]:
        return lane.executor.submit(_work_from_cache, plan, self._hash, portion)

    def _lost(self) -> tuple[type[BaseException], ...]:
        return (Missing, self._killed, BrokenExecutor)

    def _again(self, lane: _Lane, plan: Plan) -> None:
        self._ship(plan)  # a worker that came later has not got the trace

    def _ship(self, plan: Plan) -> None:
        """Send the trace to the workers that lack it."""
        has: dict[str, bool] = self._client.run(_cached, self._hash)
        without = [worker for worker, there in has.items() if not there]
        if not without:
            return
        with open(plan.trace, "rb") as source:
            size, begin = os.fstat(source.fileno()).st_size, 0
            while begin < size:
                piece = source.read(_PIECE)
                self._client.run(_receive, self._hash, begin, piece, begin + len(piece) == size, workers=without)
                begin += len(piece)

    def abandon(self) -> None:
        for lane in self._lanes:
            lane.executor.shutdown(wait=False)

    def close(self) -> None:
        self._client.close()


def _place(worker: Any, digest: str) -> Path:
    """Where a worker of a cluster keeps a trace."""
    return Path(worker.local_directory) / f"{digest}.trace"


def _cached(digest: str, dask_worker: Any) -> bool:
    """In a worker of a cluster: whether it has got the trace. Dask fills in `dask_worker`."""
    return _place(dask_worker, digest).exists()


def _receive(digest: str, begin: int, piece: bytes, last: bool, dask_worker: Any) -> None:
    """Keep a piece of a trace that begins at byte `begin`; with the last one it is complete."""
    place = _place(dask_worker, digest)
    partial = place.with_suffix(".partial")
    with open(partial, "r+b" if begin else "wb") as out:
        out.seek(begin)
        out.write(piece)
    if last:
        partial.rename(place)


def _work_from_cache(plan: Plan, digest: str, tasks: list[Task]) -> list[EpochResult]:
    distributed: Any = importlib.import_module("distributed")
    place = _place(distributed.get_worker(), digest)
    if not place.exists():
        raise Missing(digest)
    return _work(replace(plan, trace=str(place)), tasks)


@contextmanager
def workers(trace: Trace, jobs: int, cluster: str | None) -> Iterator[Workers]:
    """The cluster at an address, or `jobs` processes, or for one job none but this."""
    if cluster is None and jobs == 1:
        yield Here(trace)
        return
    pool = Processes(jobs, trace) if cluster is None else Cluster(cluster)
    try:
        yield pool
    except BaseException:
        pool.abandon()
        raise
    finally:
        pool.close()
