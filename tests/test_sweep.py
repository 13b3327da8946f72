"""Errors below a format on a real QEMU: counted exactly, one in each run; a loss that is planted is found, and without
one raw and qcow2 hold."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from powercut import stamp
from powercut.cli import main
from powercut.faults import sweep
from powercut.faults.blkdebug import Injection
from powercut.faults.full import PLENTY, Full, tmpfs
from powercut.faults.injection import Case, Rig
from powercut.faults.reopened import Fault
from powercut.faults.server import Mishap
from powercut.faults.target import Target
from powercut.guest.stubborn import Served
from powercut.scenario import load
from powercut.trace import Kind
from powercut.verdict import Severity, Verdict
from support.qemu import needs_qemu

pytestmark = needs_qemu
RAW = ["write 0 4k", "write 8k 4k", "flush", "zero 0 512", "write 4k 512", "flush"]


def raw(**errors):
    return sweep.scenario_of("raw", {}, workload={"depth": 1, "history": RAW}, errors=errors)


@pytest.fixture
def rig():
    with Rig(sweep.prepared(raw())[0]) as rig:
        yield rig


def test_events_are_counted_exactly(rig):
    history = sweep.prepared(raw())[1]
    counted = {event: rig.count(history, event) for event in ("pwritev", "pwritev_zero", "write_aio", "l2_load")}
    assert counted == {"pwritev": 3, "pwritev_zero": 1, "write_aio": 3, "l2_load": 0}
    assert rig.count(history, "flush_to_disk") == 2, "the guest's last flush, and that of closing, have nothing to do"


def test_an_injection_fails_the_request_it_names_and_no_other(rig):
    history = sweep.prepared(raw())[1]
    for nth, number in ((1, 1), (2, 2), (3, 5)):
        once = rig.run(Case(history, Injection("pwritev", nth)))
        assert (once.seen.errors, once.seen.repeated, once.faults) == (1, 1, [])
        assert [line for line in once.seen.story if line.endswith("EIO")] == [f"{number} EIO"]
    assert rig.run(Case(history, Injection("pwritev", 1, times=3))).seen.errors == 3
    full = rig.run(Case(history, Injection("pwritev", 2, "ENOSPC", None)))
    assert full.seen.given_up == [2, 4, 5], "a full disk takes no write, and flushes"
    dead = rig.run(Case(history, Injection("pwritev", 2, "EIO", None)))
    assert dead.seen.given_up == [2, 3, 4, 5, 6, 7]
    assert not full.faults
    assert not dead.faults


def test_control_without_a_loss_raw_and_qcow2_hold(tmp_path, figure):
    for format in ("raw", "qcow2"):
        result = sweep.run(sweep.scenario_of(format, {}, errors={"event": "pwritev"}))
        assert result.verdict is Verdict.HOLDS, result.found
        assert result.runs == 1 + 4 * result.events["pwritev"]
        figure(f"errors under {format}, runs", result.runs)


@pytest.fixture
def repeated_writes_are_dropped(monkeypatch):
    """A disk that acknowledges a write which failed before, and does nothing."""
    failed, submit, wait = set(), Served.submit, Served.wait
    answers = []

    def lying(self, tag, operation, data):
        if tag in failed:
            answers.append((tag, 0))
        else:
            submit(self, tag, operation, data)

    def failing(self):
        tag, error = answers.pop() if answers else wait(self)
        if error:
            failed.add(tag)
        return tag, error

    monkeypatch.setattr(Served, "submit", lying)
    monkeypatch.setattr(Served, "wait", failing)


@pytest.mark.usefixtures("repeated_writes_are_dropped")
def test_control_a_repeated_write_that_is_dropped_is_found_shrunk_and_told(tmp_path, planted):
    result = sweep.run(raw(event="pwritev", error=["EIO"], lasting=["once"]))
    kinds = {found.way[1] for found in result.found}
    planted("errors: a repeated write is dropped", result.verdict is Verdict.BROKEN)
    assert (result.verdict, kinds) == (Verdict.BROKEN, {"live-zeros", "reopened-zeros"})
    found = next(found for found in result.found if found.way[1] == "reopened-zeros")
    assert (len(found.case.history), found.confirmed, found.witness) == (1, found.of, "qemu-img convert")
    paths = sweep.save(result, tmp_path)
    assert {load(path).errors.event for path in paths} == {"pwritev"}
    again = sweep.run(load(paths[0]))
    assert again.verdict is Verdict.BROKEN, "the scenario that was written shows the same"


@pytest.mark.usefixtures("repeated_writes_are_dropped")
@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts the small file system")
def test_control_the_same_on_a_file_system_that_is_full(planted):
    result = sweep.run(raw(below="full", lasting=["once"]))
    planted("full disk: a repeated write is dropped", result.verdict is Verdict.BROKEN)
    assert result.verdict is Verdict.BROKEN


@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts the small file system")
def test_a_file_system_that_is_full_for_a_while_and_for_good(rig):
    history = sweep.prepared(raw())[1]
    assert rig.occasions(history, Full(PLENTY)) == 3, "three writes, in three pages"
    once, good = rig.run(Case(history, Full(2, 3))), rig.run(Case(history, Full(2, 3, None)))
    assert [line for line in once.seen.story if "ENOSPC" in line] == ["2 ENOSPC"]
    assert (once.seen.given_up, once.faults) == ([], [])
    assert 2 in good.seen.given_up
    assert good.faults == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts the small file system")
def test_the_small_file_system_is_out_of_sight_and_gone(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with tmpfs(4) as small:
        assert list(tmp_path.iterdir()) == []
        assert str(tmp_path) not in Path("/proc/self/mounts").read_text()
        with pytest.raises(OSError, match="No space left"):
            (small / "file").write_bytes(bytes(5 * 4096))
    assert not small.exists()


@pytest.mark.parametrize("word", ["stall", "hangup", "unanswered", "gone"])
def test_of_a_server_that_comes_back_the_guest_sees_nothing(rig, word):
    history = sweep.prepared(raw())[1]
    requests = rig.occasions(history, Mishap(0))
    assert requests >= 6
    ran = rig.run(Case(history, Mishap(2, word)))
    assert (ran.seen.errors, ran.faults) == (0, [])


def test_control_a_server_that_comes_back_without_its_data_is_found(monkeypatch, planted):
    def forgets(self, request):
        self.data[:] = bytes(len(self.data))

    monkeypatch.setattr("powercut.faults.server._Disk.carry_out", forgets)
    result = sweep.run(raw(below="server", error=["unanswered"]))
    planted("storage server: it comes back empty", result.verdict is Verdict.BROKEN)
    assert result.verdict is Verdict.BROKEN


def test_a_server_whose_requests_fail(rig):
    history = sweep.prepared(raw())[1]
    first = rig.run(Case(history, Mishap(1, "EIO")))
    assert (first.seen.errors, first.seen.repeated, first.faults) == (1, 1, [])
    assert rig.run(Case(history, Mishap(1, "ENOSPC", None))).seen.given_up == [1, 2, 4, 5]


def test_lost_data_that_is_still_in_the_file_is_found_there(tmp_path):
    """What no table leads to: here an image that never held a byte, and a file with the sector in it."""
    with Rig(Target("qcow2", 1 << 20)) as qcow2:
        missing = Fault("acknowledged", "reopened-zeros", Severity.SILENT, "", (3, 5))
        kept = tmp_path / "kept"
        kept.write_bytes(bytes(4096) + stamp.make(3, 0, 5, 1))
        assert qcow2.reopened.lies_at(kept, missing) == 4096
        assert qcow2.reopened.lies_at(kept, missing._replace(missing=(3, 6))) is None
        assert qcow2.reopened.lies_at(kept, missing._replace(missing=None)) is None


def test_a_disk_that_has_become_smaller_is_found(rig, planted):
    short = rig.scratch / "short"
    short.write_bytes(bytes(rig.target.size // 2))
    after = rig.reopened.look(short)
    planted("errors: the disk has become smaller", after.content is None)
    assert after.refused == f"the disk has {rig.target.size // 2} bytes only"


def test_a_disk_that_is_larger_than_one_request():
    work = {"depth": 1, "history": ["write 39M 4k"]}
    result = sweep.run(sweep.scenario_of("qcow2", {}, size="40M", workload=work, errors={"event": "l1_update"}))
    assert result.verdict is Verdict.HOLDS, result.found


def test_a_crash_of_qemu_is_a_finding(rig, monkeypatch, planted):
    history, submit = sweep.prepared(raw())[1], Served.submit

    def killing(self, tag, operation, data):
        if operation.kind is Kind.FLUSH:
            rig._control._process.kill()
        submit(self, tag, operation, data)

    monkeypatch.setattr(Served, "submit", killing)
    ran = rig.run(Case(history))
    planted("errors: QEMU ends by itself", ran.faults != [])
    assert [(fault.rule, fault.kind) for fault in ran.faults] == [("alive", "crash")]
    monkeypatch.undo()
    assert rig.run(Case(history)).faults == [], "the rig goes on"


def test_reopens_and_backing_files(tmp_path):
    history = ["write 0 4k", "reopen", "write 4k 4k", "flush", "write 60k 8k"]
    work = {"depth": 1, "history": history}
    scenario = sweep.scenario_of("qcow2", {}, workload=work, backing="128k", errors={"event": "cow_read"})
    result = sweep.run(scenario)
    assert result.verdict is Verdict.HOLDS, result.found
    assert result.events["cow_read"] > 0


def errors(tmp_path: Path, *arguments: str):
    done = CliRunner().invoke(main, ["errors", *arguments, "--save", str(tmp_path / "found")])
    return done.exit_code, done.output


def test_the_command(tmp_path):
    out = tmp_path / "e.json"
    code, said = errors(tmp_path, "raw", "--event", "flush_to_disk", "--jobs", "1", "--json", str(out))
    assert code == 0, said
    assert said.startswith("HOLDS  raw: errors below the format")
    document = json.loads(out.read_text())
    assert document["schema"] == "powercut.errors/1"
    assert document["results"][0]["events"] == {"flush_to_disk": 4}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["qcow3"], "format 'qcow3' is not one of qcow2, "),
        (["raw", "--event", "l9_update"], "event 'l9_update' is not one of blkdebug's"),
        (["raw", "--error", "stall"], "errors: 'stall' is not one of EIO, ENOSPC"),
        (["raw", "--below", "full", "--event", "pwritev"], "events are blkdebug's"),
        (["vdi", "--below", "server"], "cannot grow"),
        (["raw", "--size", "7"], "size 7: not a positive multiple of 512 bytes"),
        (["qcow2", "--option", "cluster_size=3k"], "qemu-img create"),
    ],
)
def test_bad_input_is_a_sentence(tmp_path, arguments, said):
    code, output = errors(tmp_path, *arguments)
    assert code == 2
    assert said in output


def test_an_event_that_is_not_raised_proves_nothing(tmp_path):
    code, output = errors(tmp_path, "raw", "--event", "l2_load", "--jobs", "1")
    assert (code, output.startswith("UNKNOWN")) == (3, True)


def test_a_qemu_that_does_not_answer_is_a_finding(rig, monkeypatch, planted):
    history, submit = sweep.prepared(raw())[1], Served.submit
    monkeypatch.setattr("powercut.guest.control._PATIENCE", 1.0)
    rig._lose()  # the next daemon is asked with less patience

    def stopping(self, tag, operation, data):
        if operation.kind is Kind.FLUSH:
            rig._control._process.send_signal(signal.SIGSTOP)
        submit(self, tag, operation, data)

    monkeypatch.setattr(Served, "submit", stopping)
    ran = rig.run(Case(history))
    planted("errors: QEMU does not answer", ran.faults != [])
    assert [(fault.rule, fault.kind) for fault in ran.faults] == [("alive", "hang")]


def test_ctrl_c_ends_it_soon_and_leaves_nothing(tmp_path):
    home = tmp_path / "t"
    home.mkdir()
    command = [sys.executable, "-m", "powercut.cli", "errors", "vhdx", "--event", "pwritev"]
    running = subprocess.Popen(
        command,
        cwd=tmp_path,
        env={**os.environ, "TMPDIR": str(home)},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while len(list(home.glob("powercut-*"))) < 5 and time.monotonic() < deadline:  # the workers are at work
        time.sleep(0.1)
    os.killpg(running.pid, signal.SIGINT)
    _, said = running.communicate(timeout=60)
    assert running.returncode == 3, said
    assert said == "powercut: interrupted; nothing was concluded\n"
    assert list(home.iterdir()) == []


def test_nothing_is_left_behind(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    sweep.run(raw(event="pwritev_zero"))
    assert list(tmp_path.iterdir()) == []
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert str(tmp_path) not in listed


def test_the_gate_runs_scenarios_of_errors(tmp_path, planted):
    """What is known of the QEMU that is here, or nothing is expected; a wrong expectation is told."""
    (tmp_path / "wrong.toml").write_text(
        'about = "raw loses nothing"\nexpect = "BROKEN"\nformat = "raw"\nsize = "64k"\n'
        'errors = { event = "pwritev" }\nworkload = { history = ["write 0 4k"] }\n'
    )
    shipped = Path(__file__).parents[1] / "scenarios"
    known = [shipped / f"errors-{name}.toml" for name in ("vdi-lost", "vpc-crossed", "parallels-refused")]
    out = tmp_path / "gate.json"
    command = ["gate", *map(str, known), str(tmp_path / "wrong.toml"), "--save", str(tmp_path / "kept")]
    done = CliRunner().invoke(main, [*command, "--json", str(out)])
    states = {result["name"]: result["state"] for result in json.loads(out.read_text())["results"]}
    planted("errors: a scenario that expects what does not happen", states.pop("wrong") == "unexpected")
    assert done.exit_code == 1
    assert set(states.values()) == {"expected"}, done.output
