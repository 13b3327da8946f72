"""A finding's recording is shrunk to the shortest history, which the gate and an empty directory confirm."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from powercut import rerecord
from powercut.cli import main
from powercut.crash import finding as findings
from powercut.errors import InputError
from powercut.guest.workload import Operation, Verb
from powercut.recording.operations import line, operations
from powercut.scenario import Recording, from_options
from powercut.trace import SECTOR, Kind, Trace
from support.qemu import needs_qemu

SHIPPED = Path(__file__).parents[1] / "scenarios" / "shipped-qcow2.trace"
_places = st.tuples(st.integers(0, 50), st.integers(1, 50)).map(lambda p: (p[0] * SECTOR, p[1] * SECTOR))
_operations = st.one_of(
    _places.map(lambda p: Operation(Kind.WRITE, *p)),
    _places.map(lambda p: Operation(Kind.DISCARD, *p)),
    st.builds(lambda p, unmap: Operation(Kind.ZERO, *p, unmap), _places, st.booleans()),
    st.just(Operation(Kind.FLUSH)),
    st.just(Operation(Kind.MARK, verb=Verb.REOPEN)),
    st.integers(100, 9999).map(lambda n: Operation(Kind.MARK, length=n * SECTOR, verb=Verb.RESIZE)),
    st.just(Operation(Kind.MARK, verb=Verb.CREATE, name="s")),
)


@given(_operations)
def test_an_operation_is_read_back_from_its_line(operation):
    options = {"about": "", "expect": "HOLDS", "size": "1M", "workload": {"history": [line(operation)]}}
    assert operations(from_options(options)) == [operation]


def shrunk(finding: Path, save: Path, *more: str):
    out = save.with_suffix(".json")
    result = CliRunner().invoke(main, ["shrink", str(finding), "--save", str(save), "--json", str(out), *more])
    return result, json.loads(out.read_text()) if out.exists() else None


@needs_qemu
def test_the_shortest_history_is_found_and_replays_where_nothing_else_is(tmp_path, planted):
    """A flush that lied: a write and a flush are enough, whatever 24 operations there were."""
    trace = tmp_path / "l.trace"
    record = ["record", "qcow2", "--ops", "24", "--seed", "7", "--size", "64M", "--lie", "flush", "--out", str(trace)]
    assert CliRunner().invoke(main, record).exit_code == 0
    CliRunner().invoke(main, ["explore", str(trace), "--jobs", "1"])
    finding = next(Path(f"{trace}.findings").glob("acknowledged-*.finding.json"))
    result, document = shrunk(finding, tmp_path / "small", "--json", str(tmp_path / "small.json"))
    assert result.exit_code == 1, result.output
    kinds = [operation.split()[0] for operation in document["history"]]
    planted("a lying flush, shrunk to the shortest history", kinds == ["write", "flush"])
    assert kinds == ["write", "flush"]
    assert (document["before"], document["shortest"], document["confirmed"]) == (24, True, document["of"])

    empty = tmp_path / "empty"
    empty.mkdir()
    bundle = Path(document["scenario"]).with_suffix(".zip")
    shutil.move(bundle, empty / "b.zip")
    for other in (trace, Path(f"{trace}.findings"), tmp_path / "small"):
        shutil.rmtree(other) if other.is_dir() else other.unlink()
    command = [str(Path(sys.executable).with_name("powercut")), "replay", "b.zip", "--out", "crash.img"]
    bare = {key: value for key, value in os.environ.items() if key != "PATH"}  # no QEMU either
    done = subprocess.run(command, cwd=empty, env=bare, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done
    assert "confirmed on the written state" in done.stdout
    assert "NOT" not in done.stdout


@needs_qemu
def test_what_does_not_break_again_is_said(tmp_path, monkeypatch):
    """The control: recorded again without the lie, it holds."""
    of_trace = rerecord.scenario_of
    honest = Recording()
    monkeypatch.setattr(
        rerecord, "scenario_of", lambda *given: msgspec.structs.replace(of_trace(*given), record=honest)
    )
    trace = tmp_path / "l.trace"
    record = ["record", "qcow2", "--ops", "20", "--size", "64M", "--lie", "flush", "--out", str(trace)]
    assert CliRunner().invoke(main, record).exit_code == 0
    CliRunner().invoke(main, ["explore", str(trace), "--jobs", "1"])
    finding = next(Path(f"{trace}.findings").glob("acknowledged-*.finding.json"))
    result, document = shrunk(finding, tmp_path / "small")
    assert result.exit_code == 3, result.output
    assert document["again"] is False


def test_only_a_recording_of_our_own_can_be_made_again(tmp_path):
    CliRunner().invoke(main, ["explore", str(SHIPPED), "--lying-flushes", "1", "--save", str(tmp_path / "f")])
    finding = next((tmp_path / "f").glob("*.finding.json"))
    other = tmp_path / "other.json"
    other.write_text(json.dumps(json.loads(finding.read_text()) | {"trace_hash": "0"}))
    result, _ = shrunk(other, tmp_path / "small", "--trace", str(SHIPPED))
    assert (result.exit_code, "another trace" in result.output) == (2, True)
    foreign = Trace(SHIPPED)
    foreign.meta["recorder"] = "dm-log-writes"
    with pytest.raises(InputError, match="alone can be made again"):
        rerecord.scenario_of(foreign, findings.load(str(finding)))
