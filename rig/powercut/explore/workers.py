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
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from powercut.crash.explore import EpochResult, Task
from powercut.errors import EnvironmentFault
from powercut.explore.session import Plan, Session
from powercut.trace import Trace

_TRIES = 4  # times in a row that workers may be lost before anything is handed in
_PIECE = 32 << 20  # bytes of a trace that are shipped at once


class Workers(Protocol):
    """Explores the epochs of `tasks`, which ascend; results come as they are ready."""

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
    if session is None or session.plan != plan or session.image.position > tasks[0].position:
        session = _local.session = Session(plan)
    return list(session.explore(tasks))


def _portions(plan: Plan, tasks: Sequence[Task]) -> list[list[Task]]:
    """Tasks that are given out together: few where each takes long."""
    size = 1 if plan.checker or plan.faults else max(8, min(64, len(tasks) // 16))
    return [list(tasks[i : i + size]) for i in range(0, len(tasks), size)]


class Pool:
    """Workers behind an executor, which `start` makes, and makes again when it is broken."""

    def __init__(self, start: Callable[[], Executor]) -> None:
        self._start = start
        self._executor = start()

    def explore(self, plan: Plan, tasks: Sequence[Task]) -> Iterator[EpochResult]:
        left, tries = _portions(plan, tasks), 0
        while left:
            if tries == _TRIES:
                raise EnvironmentFault(f"worker processes were lost {tries} times in a row (killed, or out of memory)")
            futures = self._submit(plan, left)
            left, tries = [], tries + 1
            for future in as_completed(futures):
                try:
                    results = future.result()
                except self._lost():
                    left.append(futures[future])
                    continue
                tries = 0
                yield from results
            if left:
                self._again(plan)
                left.sort(key=lambda portion: portion[0].index)

    def _submit(self, plan: Plan, portions: list[list[Task]]) -> dict[Future[list[EpochResult]], list[Task]]:
        futures: dict[Future[list[EpochResult]], list[Task]] = {}
        for portion in portions:
            try:
                futures[self._executor.submit(_work, plan, portion)] = portion
            except BrokenExecutor as error:  # while the first of them are at work already
                future: Future[list[EpochResult]] = Future()
                future.set_exception(error)
                futures[future] = portion
        return futures

    def _lost(self) -> tuple[type[BaseException], ...]:
        """What a future raises whose worker was lost."""
        return (BrokenExecutor,)

    def _again(self, plan: Plan) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)
        self._executor = self._start()

    def abandon(self) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)

    def close(self) -> None:
        """Let the workers go."""
        self._executor.shutdown(cancel_futures=True)


class Processes(Pool):
    """`jobs` processes of this machine. None outlives this one, however it ends."""

    def __init__(self, jobs: int) -> None:
        self._others = set(multiprocessing.active_children())
        super().__init__(lambda: ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), prepare))

    def _submit(self, plan: Plan, portions: list[list[Task]]) -> dict[Future[list[EpochResult]], list[Task]]:
        with _interrupted_later():
            return super()._submit(plan, portions)

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
    """In a new worker process: leave Ctrl-C to the parent, and end with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
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
        super().__init__(lambda: self._client.get_executor(pure=False))

    def explore(self, plan: Plan, tasks: Sequence[Task]) -> Iterator[EpochResult]:
        self._hash = Trace(plan.trace).hash
        self._ship(plan)
        return super().explore(plan, tasks)

    def _submit(self, plan: Plan, portions: list[list[Task]]) -> dict[Future[list[EpochResult]], list[Task]]:
        return {
            self._executor.submit(_work_from_cache, plan, self._hash, portion): portion for portion in portions
        }  # fmt: skip

    def _lost(self) -> tuple[type[BaseException], ...]:
        return (Missing, self._killed, BrokenExecutor)

    def _again(self, plan: Plan) -> None:
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
        self._executor.shutdown(wait=False)

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
    pool = Processes(jobs) if cluster is None else Cluster(cluster)
    try:
        yield pool
    except BaseException:
        pool.abandon()
        raise
    finally:
        pool.close()
