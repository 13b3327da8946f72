"""What is damaged, missing, full, hanging or killed: a clear sentence, the partial result kept, and never HOLDS.

Everything here goes through the command line. The details of each are tested beside the module: traces in
test_trace.py, checkers in test_external.py, explorations that go on in test_resume.py.
"""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from powercut.cli import main
from powercut.recording.record import record
from powercut.scenario import from_options
from powercut.trace import SECTOR, VERSION, Kind, Trace, TraceWriter
from support.qemu import needs_qemu

SHIPPED = Path(__file__).parents[1] / "scenarios" / "shipped-qcow2.trace"


def said(*arguments: object, code: int) -> str:
    """What a command says that ends with `code`, and is no traceback and no HOLDS."""
    done = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert done.exception is None or isinstance(done.exception, SystemExit), repr(done.exception)
    assert done.exit_code == code, done.output
    assert "HOLDS" not in done.output
    return done.output


@pytest.fixture
def trace(tmp_path) -> Path:
    return Path(shutil.copy(SHIPPED, tmp_path / "t.trace"))


def patched(trace: Path, place: int, content: bytes) -> Path:
    data = bytearray(trace.read_bytes())
    data[place : place + len(content)] = content
    trace.write_bytes(data)
    return trace


# ---- traces


def test_a_damaged_record(trace):
    assert "damaged record at byte 1024" in said("explore", patched(trace, 1030, b"\xff"), code=2)


def test_a_damaged_payload(trace):
    opened = Trace(trace)
    row = int(opened.events["row"].max())
    assert "damaged payload at byte" in said("explore", patched(trace, (row + 1) * SECTOR, b"\xa5" * 8), code=2)


def test_another_version(trace):
    text = said("explore", patched(trace, 16, bytes([VERSION + 1])), code=2)
    assert f"trace version {VERSION + 1}, this powercut reads version {VERSION}" in text


def test_cut_off_in_a_record(trace):
    trace.write_bytes(trace.read_bytes()[:-100])
    assert "read up to there" in said("explore", trace, code=3)


# ---- what belongs together, and a part of it is missing


def test_a_finding_without_its_trace(trace, tmp_path):
    said("explore", trace, "--lying-flushes", 1, code=1)
    finding = next((tmp_path / "t.trace.findings").iterdir())
    trace.unlink()
    assert "No such file" in said("replay", finding, "--out", tmp_path / "x", code=2)


def test_a_scenario_without_its_recording(tmp_path):
    scenario = tmp_path / "s.toml"
    scenario.write_text('about = ""\nexpect = "BROKEN"\ntrace = "gone.trace"\n')
    assert "gone.trace: No such file" in said("gate", scenario, code=3)


@needs_qemu
def test_an_overlay_without_its_backing_file(tmp_path):
    """The same recording holds with it."""
    about = {"about": "", "expect": "HOLDS", "size": "1M", "backing": "1M"}
    record(from_options(about | {"workload": {"operations": 20}}), tmp_path / "whole")
    assert CliRunner().invoke(main, ["explore", str(tmp_path / "whole")]).exit_code == 0
    whole = Trace(tmp_path / "whole")
    ids: dict[int, int] = {}
    with TraceWriter(tmp_path / "t.trace", whole.meta) as writer:
        for info in whole.files:
            if info.role != "backing":
                ids[info.id] = writer.file(info.name, info.size, info.role)
        for file, offset, length, row in whole.bases.tolist():
            if file in ids:
                writer.base(ids[file], offset, whole.rows[row : row + length // SECTOR].tobytes())
        order = [(int(p), True, i) for i, p in enumerate(whole.events["issued"])]
        order += [(int(p), False, i) for i, p in enumerate(whole.events["completed"]) if p < whole.length]
        at: dict[int, int] = {}
        for _, issue, i in sorted(order):
            event = whole.events[i]
            data = bytes(whole.payload(event)) if event["kind"] == Kind.WRITE and event["row"] else None
            place = (int(event["offset"]), int(event["length"]))
            if issue:
                at[i] = writer.issue(
                    Kind(event["kind"]), ids[int(event["file"])], *place, data=data, ref=int(event["ref"])
                )
            else:
                writer.complete(at[i], int(event["result"]))
    assert np.array_equal(Trace(tmp_path / "t.trace").events["kind"], whole.events["kind"])
    assert "has a backing file, which is not in the trace" in said("explore", tmp_path / "t.trace", code=3)


# ---- checkers


def checker(folder: Path, text: str) -> str:
    path = folder / "checker.py"
    path.write_text(f"import os, sys, time\n{text}\n")
    return f"{sys.executable} {path}"


@pytest.mark.parametrize(
    ("does", "says"),
    [
        ("os.kill(os.getpid(), 11)", "the checker ended with signal 11"),
        ("print('\\x00\\x1b[31m' * 999); sys.exit(99)", "the checker ended with exit code 99"),
        ("time.sleep(60)", "the checker did not end within 0 s"),
    ],
    ids=["crashes", "prints garbage", "hangs"],
)
def test_a_checker_without_an_opinion(trace, tmp_path, monkeypatch, does, says):
    if says.endswith("0 s"):
        monkeypatch.setattr("powercut.explore.external.TIMEOUT", 0.4)
    assert says in said("explore", trace, "--checker", checker(tmp_path, does), "--jobs", 1, "--budget", 16, code=3)


def test_a_missing_checker(trace):
    assert "checker 'no-such-program' was not found" in said("explore", trace, "--checker", "no-such-program", code=2)


# ---- a full disk


@pytest.fixture
def tiny(tmp_path) -> Iterator[Path]:
    """A file system of two megabytes."""
    place = tmp_path / "tiny"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", place], capture_output=True).returncode:
        pytest.skip("a small tmpfs cannot be mounted here")
    yield place
    subprocess.run(["umount", "-l", place], check=True)  # a trace there may still be mapped


@needs_qemu
def test_a_full_disk_under_the_recorder(tiny):
    """What was recorded until then is kept, and is explored; it cannot hold."""
    text = said("record", "qcow2", "--ops", 300, "--size", "4M", "--out", tiny / "t.trace", code=2)
    assert "recording stopped at byte" in text
    assert "No space left on device" in text
    assert "read up to there" in said("explore", tiny / "t.trace", "--save", tiny.parent / "f", code=3)


def test_a_full_disk_under_the_results(tiny, tmp_path):
    (tiny / "filler").write_bytes(bytes(2 << 20))
    copy = Path(shutil.copy(SHIPPED, tmp_path / "t.trace"))
    text = said("explore", copy, "--lying-flushes", 1, "--save", tiny / "findings", code=2)
    assert "findings cannot be saved: No space left on device" in text


# ---- signals


def test_nothing_outlives_a_killed_exploration(trace, tmp_path):
    """Its worker processes end with it, and what it kept can be resumed."""
    slow = checker(tmp_path, "time.sleep(0.3)")
    code = "from powercut.explore import journal; journal.AFTER = 0; from powercut.cli import main; main()"
    command = [sys.executable, "-c", code, "explore", str(trace), "--checker", slow, "--jobs", "2"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    progress = tmp_path / "t.trace.progress"
    deadline = time.monotonic() + 180
    while not progress.exists() or progress.read_bytes().count(b"\n") < 3:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    workers = children(process.pid)
    assert len(workers) >= 2
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 20
    while any(alive(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in workers if alive(pid)]
    done = CliRunner().invoke(main, ["explore", str(trace), "--checker", slow, "--jobs", "1", "--resume"])
    assert done.exit_code == 0, done.output
    assert not progress.exists()


@pytest.mark.parametrize("after", [0.0, 1.0], ids=["while they start", "at work"])
def test_ctrl_c_ends_the_workers_too_and_is_no_traceback(trace, tmp_path, after):
    """A terminal sends it to all processes of the command."""
    slow = checker(tmp_path, f"open({str(tmp_path / 'running')!r}, 'a').write(f'{{os.getpid()}} '); time.sleep(30)")
    command = [sys.executable, "-m", "powercut.cli", "explore", str(trace), "--checker", slow, "--jobs", "2"]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True)
    deadline = time.monotonic() + 180
    while len(workers := children(process.pid)) < 2:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(after)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 3, out + err
    assert "interrupted after" in out
    assert err == ""
    running = tmp_path / "running"
    programs = [int(pid) for pid in running.read_text().split()] if running.exists() else []
    deadline = time.monotonic() + 20  # what multiprocessing keeps beside its workers ends when it sees them gone
    while left := [pid for pid in workers + programs if alive(pid)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@needs_qemu
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL], ids=["Ctrl-C", "SIGKILL"])
def test_a_recording_that_is_cut_short_is_kept_and_cannot_hold(tmp_path, how):
    """What is there is explored; the end is missing, and that is said."""
    out = tmp_path / "t.trace"
    command = [sys.executable, "-m", "powercut.cli", "record", "qcow2", "--ops", "200000", "--size", "16M"]
    process = subprocess.Popen([*command, "--out", str(out)], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 180
    while not out.exists() or os.stat(out).st_size < 2 << 20:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(how)
    _, err = process.communicate(timeout=180)
    assert "Traceback" not in err
    if how == signal.SIGINT:
        assert process.returncode in (2, 3)
        assert "interrupted" in err
    done = CliRunner().invoke(main, ["explore", str(out), "--budget", "200"])
    assert done.exit_code in (2, 3), done.output
    assert "HOLDS" not in done.output


@needs_qemu
@pytest.mark.skipif(os.geteuid() != 0, reason="making a device needs root")
@pytest.mark.parametrize(
    "words", ["bundle {finding} --out {null}", "capture --out {null} -- true", "explore {trace} --json {null}"]
)
def test_a_device_is_never_replaced_by_a_file(tmp_path, monkeypatch, words):
    """As root, whoever renames a file onto /dev/null takes it from everybody."""
    null, trace = tmp_path / "null", tmp_path / "t.trace"
    os.mknod(null, stat.S_IFCHR | 0o666, os.makedev(1, 3))
    monkeypatch.chdir(tmp_path)
    main_ = CliRunner()
    assert main_.invoke(main, ["record", "qcow2", "--ops", "20", "--lie", "flush", "--out", str(trace)]).exit_code == 0
    main_.invoke(main, ["explore", str(trace)])
    finding = next(Path(f"{trace}.findings").glob("*.json"))
    result = main_.invoke(main, words.format(finding=finding, null=null, trace=trace).split())
    assert result.exit_code == (1 if words.startswith("explore") else 2), result.output
    assert null.is_char_device()
