"""Explorations that are cut short, by SIGKILL and by Ctrl-C: what they found is kept, and they go on from there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from powercut.crash.explore import Task
from powercut.crash.media import KINDS
from powercut.explore.journal import Journal
from powercut.explore.run import explore_trace, with_faults
from powercut.explore.session import Plan, Session
from powercut.trace import Trace

SHIPPED = Path(__file__).parents[1] / "scenarios"
# The command as it is, but that it keeps its progress from the start, sleeps in each epoch, and counts them.
SLOW = """
import sys, time
from powercut.explore import journal
from powercut.crash import explore
real, (path, naps, *arguments) = explore.explore_epoch, sys.argv[1:]
def slow(*a, **k):
    time.sleep(float(naps))
    with open(path, "a") as out:
        out.write(".")
    return real(*a, **k)
journal.AFTER, explore.explore_epoch = 0, slow
from powercut.cli import main
main(arguments)
"""


def start(folder: Path, naps: float, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SLOW, str(folder / "visited"), str(naps), "explore", *map(str, arguments)]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    out, err = process.communicate(timeout=180)
    assert "Traceback" not in err, err
    return process.returncode, out + err


def cut_off(folder: Path, trace: Path, number: int, how: signal.Signals, *options: str) -> tuple[int, str]:
    """Start an exploration, and end it `how` once it has kept `number` results."""
    process = start(folder, 0.1, trace, "--jobs", "1", *options)
    progress = folder / f"{trace.name}.progress"
    deadline = time.monotonic() + 180
    while not progress.exists() or progress.read_bytes().count(b"\n") <= number:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(how)
    return finish(process)


def visited(folder: Path) -> int:
    return len((folder / "visited").read_text())


@pytest.fixture
def trace(tmp_path) -> Path:
    copy = tmp_path / "t.trace"
    copy.write_bytes((SHIPPED / "shipped-qcow2.trace").read_bytes())
    return copy


def verdict(folder: Path, trace: Path, *options: str) -> dict[str, object]:
    code, said = finish(start(folder, 0, trace, "--json", "verdict.json", *options))
    assert code in (0, 1, 3), said
    return json.loads((folder / "verdict.json").read_text())


@pytest.mark.parametrize("options", [(), ("--budget", "30")], ids=["exhaustive", "budget"])
def test_killed_and_resumed_is_as_if_nothing_had_been(tmp_path, trace, options):
    uninterrupted = verdict(tmp_path, trace, *options)
    whole = visited(tmp_path)
    os.unlink(tmp_path / "visited")
    code, _ = cut_off(tmp_path, trace, 3, signal.SIGKILL, *options)
    assert code == -signal.SIGKILL
    before = visited(tmp_path)
    assert before < whole, "it was cut off in the middle"
    kept = (tmp_path / "t.trace.progress").read_bytes().count(b"\n") - 1
    assert kept >= 3
    resumed = verdict(tmp_path, trace, "--resume", *options)
    assert resumed == uninterrupted
    assert visited(tmp_path) - before == whole - kept, "what was kept was not done again"
    assert not (tmp_path / "t.trace.progress").exists()


def test_a_line_that_was_cut_off_is_done_again(tmp_path, trace):
    uninterrupted = verdict(tmp_path, trace)
    cut_off(tmp_path, trace, 3, signal.SIGKILL)
    progress = tmp_path / "t.trace.progress"
    progress.write_bytes(progress.read_bytes()[:-40])
    assert verdict(tmp_path, trace, "--resume") == uninterrupted


def test_a_line_that_is_damaged_is_told(tmp_path, trace):
    cut_off(tmp_path, trace, 3, signal.SIGKILL)
    progress = tmp_path / "t.trace.progress"
    progress.write_bytes(progress.read_bytes().replace(b'"checks":1', b'"checks":"one"', 1))
    code, said = finish(start(tmp_path, 0, trace, "--resume"))
    assert (code, "t.trace.progress:2: damaged" in said) == (2, True), said


def test_what_is_read_back_is_what_was_kept(tmp_path):
    """Results with findings in them, of media faults and of samples too."""
    lying = str(SHIPPED / "shipped-lying-flush.trace")
    plan = with_faults(Plan(lying, "qcow2"), KINDS, 3, 1)
    journal = Journal(tmp_path / "progress", plan, "hash", False)
    for number, fault in enumerate(plan.faults):
        task = Task(number, fault.position, 40, number % 2 == 1)
        journal.put(task, next(iter(Session(plan).explore([task]))))
    assert any(found.fault for result in journal.known.values() for found in result.found)
    assert any(result.sampled for result in journal.known.values())
    assert journal.keep()
    assert Journal(tmp_path / "progress", plan, "hash", True).known == journal.known


def test_interrupted_says_so_and_never_holds(tmp_path, trace):
    got, said = cut_off(tmp_path, trace, 3, signal.SIGINT)
    assert got == 3, said
    assert "UNKNOWN" in said
    assert "interrupted after" in said
    assert "--resume goes on from there" in said
    assert verdict(tmp_path, trace, "--resume")["verdict"] == "HOLDS"


def test_interrupted_keeps_what_it_found(tmp_path, trace):
    """Media faults are tasks of their own; the first ones are findings."""
    code, said = cut_off(tmp_path, trace, 8, signal.SIGINT, "--media", "zero", "--faults", "30")
    assert code == 1, said
    assert "BROKEN" in said
    assert "interrupted after" in said
    assert list((tmp_path / "t.trace.findings").iterdir())


def test_resuming_something_else_is_refused(tmp_path, trace):
    code, said = finish(start(tmp_path, 0, trace, "--resume"))
    assert (code, "there is no exploration to resume" in said) == (2, True), said
    cut_off(tmp_path, trace, 3, signal.SIGKILL)
    code, said = finish(start(tmp_path, 0, trace, "--resume", "--atom", "4096"))
    assert (code, "of another exploration (plan)" in said) == (2, True), said
    (tmp_path / "t.trace.progress").write_bytes(b"\xff\n")
    code, said = finish(start(tmp_path, 0, trace, "--resume"))
    assert (code, "not the progress of an exploration" in said) == (2, True), said


def test_a_journal_that_cannot_be_written_costs_only_itself(tmp_path, monkeypatch):
    monkeypatch.setattr("powercut.explore.journal.AFTER", 0.0)
    plan = Plan(str(SHIPPED / "shipped-qcow2.trace"), "qcow2")
    alone = explore_trace(plan, jobs=1)
    assert explore_trace(plan, jobs=1, journal=tmp_path / "no" / "such" / "folder") == alone
    journal = Journal(tmp_path / "no" / "such", plan, Trace(plan.trace).hash, False)
    journal.put(None, None)  # type: ignore[arg-type]
    assert "progress is not kept" in str(journal.fault)
