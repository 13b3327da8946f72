"""Processes and a real Dask cluster as workers: the same results, whatever their number, and none lost with one."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from powercut.cli import main
from powercut.crash.explore import EpochResult, Task
from powercut.crash.model import epochs
from powercut.errors import EnvironmentFault
from powercut.explore.run import explore_trace
from powercut.explore.session import Plan
from powercut.explore.workers import Cluster, Here, Processes
from powercut.trace import Trace
from support.qemu import needs_qemu

SHIPPED = Path(__file__).parents[1] / "scenarios"
needs_dask = pytest.mark.skipif(
    importlib.util.find_spec("distributed") is None, reason="Dask (distributed) is not installed"
)


def tasks_of(trace: Path) -> list[Task]:
    return [Task(i, position, None) for i, position in enumerate(epochs(Trace(trace), 0))]


def sorted_results(results) -> list[EpochResult]:
    """By epoch, without the number of programs run: that depends on what each worker remembers."""
    return sorted((replace(result, runs=0) for result in results), key=lambda result: result.index)


@pytest.fixture(scope="module", params=["shipped-qcow2", "shipped-lying-flush"])
def plan(request) -> Plan:
    return Plan(str(SHIPPED / f"{request.param}.trace"), "qcow2")


@pytest.fixture(scope="module")
def cluster():
    from distributed import LocalCluster

    with LocalCluster(n_workers=3, threads_per_worker=1, dashboard_address=None) as there:
        yield there


def test_processes_and_this_one_say_the_same(plan):
    tasks = tasks_of(Path(plan.trace))
    here = sorted_results(Here(Trace(plan.trace)).explore(plan, tasks))
    pool = Processes(2, Trace(plan.trace))
    try:
        assert sorted_results(pool.explore(plan, tasks)) == here
    finally:
        pool.close()
    assert len(here) == len(tasks)


@needs_qemu
def test_a_killed_process_loses_no_result(tmp_path):
    """One of two workers is killed at once, another after the first result."""
    plan = Plan(str(SHIPPED / "shipped-qcow2.trace"), "qcow2", checker="qemu-img check -f qcow2")
    tasks = tasks_of(Path(plan.trace))
    here = sorted_results(Here(Trace(plan.trace)).explore(plan, tasks))
    before = set(multiprocessing.active_children())
    pool = Processes(2, Trace(plan.trace))
    try:
        results, killed = [], 0
        for result in pool.explore(plan, tasks):
            results.append(result)
            if killed < 2:
                victim = min(set(multiprocessing.active_children()) - before, key=lambda process: process.pid or 0)
                os.kill(victim.pid or 0, signal.SIGKILL)
                killed += 1
        assert killed == 2
        assert sorted_results(results) == here
    finally:
        pool.close()


def test_workers_that_cannot_live_are_not_tried_for_ever(monkeypatch):
    """Control: if every worker dies, that is said, and is no verdict."""
    monkeypatch.setattr("powercut.explore.workers.prepare", _die)
    plan = Plan(str(SHIPPED / "shipped-qcow2.trace"), "qcow2")
    pool = Processes(1, Trace(plan.trace))
    with pytest.raises(EnvironmentFault, match="4 times in a row"):
        list(pool.explore(plan, tasks_of(Path(plan.trace))))
    pool.close()


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@needs_dask
def test_a_cluster_says_the_same_and_gets_the_trace_once(plan, cluster):
    alone = explore_trace(plan, jobs=1)
    assert explore_trace(plan, cluster=cluster.scheduler_address) == alone
    pool = Cluster(cluster.scheduler_address)
    shipped = []
    run = pool._client.run
    pool._client.run = lambda function, *a, **k: shipped.append(function.__name__) or run(function, *a, **k)
    try:
        tasks = tasks_of(Path(plan.trace))
        assert len(list(pool.explore(plan, tasks))) == len(tasks)
        assert shipped == ["_cached"], "they had it from the exploration before, by its hash"
        copies = run(lambda dask_worker: [n for n in os.listdir(dask_worker.local_directory) if n.endswith(".trace")])
        assert len(copies) == 3
        assert all(f"{Trace(plan.trace).hash}.trace" in names for names in copies.values())
    finally:
        pool.close()


@needs_dask
@needs_qemu
def test_a_killed_worker_of_a_cluster_loses_no_result(cluster):
    plan = Plan(str(SHIPPED / "shipped-qcow2.trace"), "qcow2", checker="qemu-img check -f qcow2")
    tasks = tasks_of(Path(plan.trace))
    here = sorted_results(Here(Trace(plan.trace)).explore(plan, tasks))
    pool = Cluster(cluster.scheduler_address)
    try:
        results = []
        for result in pool.explore(plan, tasks):
            if not results:
                os.kill(next(iter(pool._client.run(os.getpid).values())), signal.SIGKILL)
            results.append(result)
        assert sorted_results(results) == here
        deadline = time.monotonic() + 120
        while len(pool._client.run(os.getpid)) < 3 and time.monotonic() < deadline:
            time.sleep(0.1)
        assert sorted_results(pool.explore(plan, tasks)) == here, "with a worker that came without the trace"
    finally:
        pool.close()


@needs_dask
def test_no_cluster_is_one_sentence(capsys):
    from click.testing import CliRunner

    done = CliRunner().invoke(main, ["explore", str(SHIPPED / "shipped-qcow2.trace"), "--cluster", "nonsense"])
    assert done.exit_code == 2
    assert "no Dask scheduler answers at nonsense" in done.output
