"""Programs as checkers on crash disks: the same search, with controls that must fail."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from powercut.crash.explore import explore_epoch
from powercut.crash.model import epochs
from powercut.errors import EnvironmentFault
from powercut.explore.replay import replay
from powercut.explore.run import explore_trace
from powercut.explore.session import Plan, Session
from powercut.recording.record import record
from powercut.report.outcome import save
from powercut.scenario import from_options, load
from powercut.verdict import Verdict

pytestmark = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="QEMU's tools are not installed")

HISTORY = ["write 0 4k", "flush", "write 64k 4k", "write 8k 4k"]


@pytest.fixture(scope="module")
def traces(tmp_path_factory) -> dict[str, Path]:
    """Small recordings: an honest disk and one that lies."""
    folder = tmp_path_factory.mktemp("traces")
    made = {}
    for name, lie in (("honest", []), ("lying", ["flush"])):
        options = {"about": "", "expect": "HOLDS", "size": "256k", "options": {"cluster_size": "4k"}}
        options |= {"workload": {"history": HISTORY, "depth": 1}, "record": {"lie": lie}}
        made[name] = folder / f"{name}.trace"
        record(from_options(options), made[name])
    return made


def explored(trace: Path, checker: str, depth: int = 0, budget: int | None = 3000):
    return explore_trace(Plan(str(trace), "qcow2", checker=checker, recovery_depth=depth), budget=budget, jobs=1)


def script(folder: Path, text: str) -> str:
    """A command that runs a small Python program on the image's URI."""
    path = folder / "checker.py"
    path.write_text(f"import subprocess, sys\nimage = sys.argv[1]\n{text}\n")
    return f"{sys.executable} {path}"


def test_qemu_img_check_agrees_with_our_checker(traces, figure):
    for name, verdict in (("honest", Verdict.HOLDS), ("lying", Verdict.BROKEN)):
        theirs = explored(traces[name], "qemu-img check -f qcow2")
        ours = explore_trace(Plan(str(traces[name]), "qcow2", rules=("opens", "structure")), jobs=1)
        assert theirs.verdict is verdict
        assert ours.verdict is verdict
        figure(f"checks by qemu-img / by our checker, {name}", f"{theirs.coverage.checks} / {ours.coverage.checks}")
    assert {finding.rule for finding in theirs.findings} == {"checker"}


def test_repairs_hold_and_crashes_inside_them_too(traces, figure):
    outcome = explored(traces["honest"], "qemu-img check -f qcow2 -r all", depth=2)
    assert outcome.verdict is Verdict.HOLDS, outcome.reasons
    figure("checks of qemu-img check -r all with crashes inside, two deep", str(outcome.coverage.checks))
    alone = explored(traces["honest"], "qemu-img check -f qcow2 -r all", depth=0)
    assert alone.coverage.checks < outcome.coverage.checks, "the repairs wrote, and crashes inside were explored"


@pytest.mark.parametrize("name", ["honest", "lying"])
@pytest.mark.parametrize(("command", "depth"), [("qemu-img check -f qcow2", 0), ("qemu-img check -f qcow2 -r all", 1)])
def test_same_bytes_read_same_verdict(traces, monkeypatch, figure, name, command, depth):
    """With the memory and without, everything but the number of runs is the same."""
    with_memory = explored(traces[name], command, depth)
    monkeypatch.setattr("powercut.explore.external.Memory.recall", lambda self, disk: None)
    without = explored(traces[name], command, depth)
    saved = with_memory.coverage.runs
    figure(f"runs of {command}, {name}: remembered / not", f"{saved} / {without.coverage.runs}")
    if depth or with_memory.coverage.epochs > 1:
        assert saved < without.coverage.runs
    else:
        assert saved == without.coverage.runs, "in one epoch each run of a plain check is given something else"
    with_memory.coverage.runs = without.coverage.runs
    assert with_memory == without


@pytest.mark.parametrize("name", ["honest", "lying"])
def test_states_met_again_are_not_judged_again(traces, monkeypatch, figure, name):
    saved = explored(traces[name], "qemu-img check -f qcow2 -r all", 2)
    monkeypatch.setattr("powercut.explore.external.Visited.again", lambda *state: False)
    every = explored(traces[name], "qemu-img check -f qcow2 -r all", 2)
    figure(
        f"checks two levels deep, {name}: each state once / as often as met",
        f"{saved.coverage.checks} / {every.coverage.checks}",
    )
    assert saved.coverage.checks < every.coverage.checks
    assert saved.verdict is every.verdict
    assert {(f.rule, f.kind) for f in saved.findings} == {(f.rule, f.kind) for f in every.findings}


@pytest.mark.parametrize(("lie", "verdict"), [([], Verdict.HOLDS), (["flush"], Verdict.BROKEN)])
def test_the_storage_daemon_opens_a_dirty_image_for_writing(tmp_path, planted, lie, verdict):
    """Refcounts are rebuilt as it opens, and crashes inside that explored; control: a disk that lied about flushes."""
    scenario = load(Path(__file__).parents[1] / "scenarios" / "qcow2-open.toml")
    options = {"cluster_size": "512", "lazy_refcounts": "on"}
    about = {"about": "", "expect": "HOLDS", "size": "64k", "options": options, "record": {"lie": lie}}
    history = ["write 0 4k", "flush", "write 8k 4k", "flush"]
    record(from_options(about | {"workload": {"history": history, "depth": 1}}), tmp_path / "t.trace")
    outcome = explored(tmp_path / "t.trace", scenario.explore.checker, depth=1)
    assert outcome.verdict is verdict, outcome.reasons
    if lie:
        planted("flushes that lied, opened for writing", outcome.verdict is Verdict.BROKEN)
    else:
        assert outcome.coverage.checks > outcome.coverage.epochs, "opening wrote, and crashes inside were explored"


def test_once_something_is_found_few_states_more_are_judged(traces, planted):
    """Where flushes lied, a repair leaves states without end: 64 judgements after the first finding are enough."""
    for depth in (0, 1, 2):
        outcome = explored(traces["lying"], "qemu-img check -f qcow2 -r all", depth, budget=None)
        planted(f"flushes that lied, repaired, {depth} deep", outcome.verdict is Verdict.BROKEN)
        assert outcome.coverage.checks < 200


def test_what_a_repair_left_is_judged_in_all_its_states(tmp_path):
    """Refcounts of a dirty image are rebuilt: what that leaves is decided as it is judged, in several runs."""
    about = {"about": "", "expect": "HOLDS", "size": "1M", "options": {"lazy_refcounts": "on", "compat": "1.1"}}
    workload = {"operations": 12, "seed": 3, "depth": 1}
    record(from_options(about | {"workload": workload}), tmp_path / "t.trace")
    outcome = explored(tmp_path / "t.trace", "qemu-img check -f qcow2 -r all", depth=1)
    assert outcome.verdict is Verdict.HOLDS, outcome.reasons


def test_a_program_must_not_be_split_into_what_it_reads_apart(traces, tmp_path, planted):
    """The counterexample: two sectors that no run reads together, and a verdict that rests on both."""
    plan = Plan(str(traces["honest"]), "qcow2", checker="true")
    session = Session(plan)
    for position in epochs(session.trace, session.image.file):
        session.advance(position)
        flight = session.image.choices(0, session.image.sectors)
        added = {choice.events[1]: choice.atom for choice in flight if not choice.contents[0].any()}
        if len(added) > 1:  # the first sectors of two writes to new places
            break
    one, other = [*added.values()][:2]
    text = "".join(
        f"{name} = subprocess.call(['qemu-io', '-f', 'raw', '-r', '-c', 'read -P 0 {atom * 512} 512', image])\n"
        for name, atom in (("one", one), ("other", other))
    )
    command = script(tmp_path, f"{text}sys.exit(1 if one and other else 0)")
    session = Session(replace(plan, checker=command))
    session.advance(position)

    def part(atom: int):
        def judge(disk, report, enough):
            with disk.search.assuming(lambda number, choice: None if choice.atom == atom else 0):
                session.judge(disk, report, enough)

        return explore_epoch(0, session.image, judge, budget=100)

    apart = [part(one), part(other)]
    assert [result.exhausted for result in apart] == [True, True], "each part holds by itself"
    whole = explore_epoch(0, session.image, session.judge, budget=100)
    planted("a program that fails where two parts meet", bool(whole.found))
    assert len(whole.found[0].decisions) == 2


def test_a_program_with_a_mind_of_its_own_is_not_taken_at_its_first_word(traces, tmp_path):
    """Control: the memory holds for what is read. A program that reads elsewhere on other bytes runs for each."""
    text = """
shown = subprocess.run(['qemu-io', '-f', 'raw', '-r', '-c', 'read -v 12288 8', image], capture_output=True, text=True)
l1 = int(''.join(shown.stdout.split(':')[1].split()[:8]), 16)
sys.exit(1 if l1 else 0)
"""
    outcome = explored(traces["honest"], script(tmp_path, text))
    assert outcome.verdict is Verdict.BROKEN
    assert 1 < outcome.coverage.runs < outcome.coverage.checks


def test_a_repair_that_destroys_is_found_and_replays(traces, tmp_path, planted):
    """Control: a program that is content and leaves a header of zeros."""
    command = script(tmp_path, "subprocess.run(['qemu-io', '-f', 'raw', '-c', 'write -P 0 0 512', image], check=True)")
    outcome = explored(traces["honest"], command)
    found = outcome.verdict is Verdict.BROKEN and {f.rule for f in outcome.findings} == {"repairs"}
    planted("a repair that destroys the header", found)
    assert found
    saved = save(outcome.findings, tmp_path / "findings")
    assert replay(str(saved[0].path), str(tmp_path / "crash.qcow2")).confirmed


def test_a_repair_that_is_only_wrong_when_cut_off(traces, tmp_path, planted, monkeypatch):
    """Control: the L1 table is zeroed, flushed, and written back: right in the end, and fatal in between."""
    text = """
open_raw = ['qemu-io', '-f', 'raw']
shown = subprocess.run([*open_raw, '-r', '-c', 'read -v 12288 8', image], capture_output=True, text=True).stdout
first = bytes(int(word, 16) for word in shown.split(':')[1].split()[:8])
if not any(first):
    sys.exit(1)
open(sys.argv[0] + '.sector', 'wb').write(first.ljust(512, bytes(1)))
subprocess.run([*open_raw, '-c', 'write -P 0 12288 512', '-c', 'flush', image], check=True)
subprocess.run([*open_raw, '-c', f'write -s {sys.argv[0]}.sector 12288 512', '-c', 'flush', image], check=True)
"""
    command = script(tmp_path, text)
    # Until the first L1 entry is on disk the program would call every image broken: so the last epoch only.
    results = {}
    for depth in (0, 1):
        session = Session(Plan(str(traces["honest"]), "qcow2", checker=command, recovery_depth=depth))
        session.advance(session.trace.length)
        results[depth] = explore_epoch(0, session.image, session.judge, budget=500)
    planted("a repair that is fatal when it is cut off", bool(results[1].found))
    assert not results[0].found
    assert [found.problem.rule for found in results[1].found] == ["checker"]
    assert results[1].found[0].patches
    monkeypatch.setattr("powercut.explore.external.Visited.again", lambda *state: True)
    session = Session(Plan(str(traces["honest"]), "qcow2", checker=command, recovery_depth=1))
    session.advance(session.trace.length)
    assert not explore_epoch(0, session.image, session.judge, budget=500).found, "control: it was seen in a new state"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("sys.exit(7)", "exit code 7"),
        ("import os; os.kill(os.getpid(), 9)", "signal 9"),
        ("print('\\udcff garbage'.encode('utf-8', 'surrogateescape')); sys.exit(250)", "exit code 250"),
    ],
)
def test_a_checker_without_an_opinion_is_never_a_pass(traces, tmp_path, text, why):
    outcome = explored(traces["honest"], script(tmp_path, text))
    assert outcome.verdict is Verdict.UNKNOWN
    assert why in outcome.reasons[0]


def test_a_checker_that_hangs(traces, tmp_path, monkeypatch):
    monkeypatch.setattr("powercut.explore.external.TIMEOUT", 0.2)
    outcome = explored(traces["honest"], script(tmp_path, "import time; time.sleep(60)"), budget=20)
    assert outcome.verdict is Verdict.UNKNOWN
    assert any("did not end" in reason for reason in outcome.reasons)


def test_a_missing_checker():
    with pytest.raises(EnvironmentFault, match="no-such-program"):
        explored(Path(__file__).parents[1] / "scenarios" / "shipped-qcow2.trace", "no-such-program check")
