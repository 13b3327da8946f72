"""The commands end to end, with a real QEMU: what they promise on success, and one sentence where they cannot."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner, Result

from powercut import stamp
from powercut.cli import main
from powercut.crash.promise import Promise
from powercut.explore import run
from powercut.trace import SECTOR, Kind, Trace, TraceWriter
from powercut.verdict import Verdict
from support.qemu import needs_qemu

COMMANDS = ["doctor", "record", "import", "show", "explore", "replay", "check", "rescue", "gate"]
IMPORTED_BY_HELP = "import sys; from click.testing import CliRunner; from powercut.cli import main\n"


def powercut(*arguments: object, expect: int | None = 0) -> Result:
    done = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert done.exception is None or isinstance(done.exception, SystemExit), repr(done.exception)
    if expect is not None:
        assert done.exit_code == expect, done.output
    return done


def recorded(folder: Path, name: str, *options: str) -> Path:
    trace = folder / f"{name}.trace"
    powercut("record", "qcow2", "--out", trace, *options)
    return trace


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    return recorded(tmp_path_factory.mktemp("honest"), "honest", "--ops", "60", "--size", "4M")


@pytest.fixture(scope="module")
def lying(tmp_path_factory):
    return recorded(tmp_path_factory.mktemp("lying"), "lying", "--ops", "100", "--size", "4M", "--lie", "flush")


# ---- what is shown first


@needs_qemu
def test_a_thousand_operations_hold(tmp_path, figure):
    trace = tmp_path / "a.trace"
    done = powercut("record", "qcow2", "--ops", 1000, "--seed", 7, "--out", trace)
    assert "1,000 operations of a guest became" in done.output
    done = powercut("explore", trace, "--json", tmp_path / "v.json")
    assert done.output.startswith("HOLDS")
    document = json.loads((tmp_path / "v.json").read_text())
    assert document["schema"] == "powercut.verdict/1"
    assert (document["verdict"], document["findings"], document["reasons"]) == ("HOLDS", [], [])
    coverage = document["coverage"]
    assert coverage["exhausted"] is True
    assert coverage["epochs"] > 100
    assert coverage["undecided_atoms"] > 10_000
    assert coverage["log2_states"] >= coverage["undecided_atoms"]
    assert coverage["checks"] >= coverage["epochs"]
    figure("1,000 operations on qcow2: crash states", f"2^{coverage['log2_states']:,.0f}, {coverage['checks']} checks")
    assert not Path(f"{trace}.findings").exists()


@needs_qemu
def test_a_lying_flush_is_broken_and_every_finding_replays(tmp_path, lying, planted):
    """Each replay line works as printed, and QEMU's own tools see the fault in the image."""
    done = powercut("explore", lying, "--save", tmp_path / "found", "--json", tmp_path / "v.json", expect=1)
    planted("acknowledged flushes that did nothing", done.output.startswith("BROKEN"))
    findings = json.loads((tmp_path / "v.json").read_text())["findings"]
    lines = [line.strip() for line in done.output.splitlines() if line.strip().startswith("powercut replay")]
    assert len(lines) == len(findings) == len(list((tmp_path / "found").iterdir())) > 1
    rules = set()
    for number, line in enumerate(lines):
        image = tmp_path / f"crash-{number}.img"
        words = [str(image) if word == "crash.img" else word for word in shlex.split(line)[1:]]
        again = powercut(*words, "--json", tmp_path / "r.json")
        document = json.loads((tmp_path / "r.json").read_text())
        assert document["confirmed"], again.output
        finding = json.loads(Path(words[1]).read_text())
        rules.add(finding["rule"])
        (confirm,) = document["confirm"]
        shown = subprocess.run(shlex.split(confirm), capture_output=True, text=True, timeout=60)
        if finding["rule"] == "acknowledged":
            assert shown.returncode == 0, shown.stderr
            assert not promised(lying, finding, sector_of(shown.stdout)), confirm
        else:
            assert shown.returncode in (1, 2), "qemu-img check: 2 is corruption, 1 is that it cannot even check"
            assert "ERROR" in shown.stdout + shown.stderr or "corrupt" in shown.stdout + shown.stderr
    assert rules == {"acknowledged", "structure"}


def sector_of(dump: str) -> bytes:
    """The bytes of qemu-io's `read -v`."""
    rows = re.findall(r"^[0-9a-f]{8}:\s+((?:[0-9a-f]{2}\s)+)", dump, re.M)
    data = bytes.fromhex("".join(rows))
    assert len(data) == SECTOR
    return data


def promised(path: Path, finding: dict[str, object], data: bytes) -> bool:
    """Whether the guest's sector may hold `data` where the crash came."""
    trace = Trace(path)
    promise = Promise(trace, trace.files[1])
    promise.advance(int(str(finding["position"])))
    stamps = stamp.decode(np.frombuffer(data, dtype=np.uint8).reshape(1, -1))
    at = np.array([finding["where"]])
    return bool(promise.legal(at, stamps.op, stamps.sector)[0])


@needs_qemu
def test_control_another_image_is_not_confirmed_by_qemu(tmp_path, lying):
    """The test above sees a difference: before the crash's faults, nothing is wrong with the recorded image."""
    data = stamp.make(10**6, 0, 5, 1)
    assert not promised(lying, {"position": Trace(lying).length, "where": 5}, data)
    assert promised(lying, {"position": 3, "where": 5}, bytes(SECTOR))


@needs_qemu
def test_a_spent_budget_is_unknown(honest):
    done = powercut("explore", honest, "--budget", 1, expect=3)
    assert done.output.startswith("UNKNOWN")
    assert "budget spent" in done.output


@needs_qemu
def test_a_program_ends_by_itself(honest, monkeypatch):
    """Its tree may be too large: without --budget it has one, and says so."""
    monkeypatch.setattr("powercut.commands.explore.PROGRAM_BUDGET", 8)
    done = powercut("explore", honest, "--checker", "qemu-img check", "--jobs", 1, expect=3)
    assert "budget spent" in done.output


@needs_qemu
def test_json_on_standard_output_is_all_there_is(tmp_path, honest, lying):
    assert json.loads(powercut("explore", honest, "--json", "-").stdout)["verdict"] == "HOLDS"
    done = powercut("explore", lying, "--json", "-", "--save", tmp_path / "f", expect=1)
    document = json.loads(done.stdout)
    assert document["verdict"] == "BROKEN"
    assert json.loads(powercut("show", honest, "--json", "-").stdout)["schema"] == "powercut.trace/1"
    assert json.loads(powercut("doctor", "--json", "-").stdout)["schema"] == "powercut.doctor/1"
    made = powercut("record", "raw", "--ops", 5, "--size", "64k", "--out", tmp_path / "r", "--json", "-")
    assert json.loads(made.stdout)["hash"] == Trace(tmp_path / "r").hash


@needs_qemu
def test_show_lists_every_event(honest):
    output = powercut("show", honest, "--events").output
    trace = Trace(honest)
    assert sum(" flush" in line or " write" in line for line in output.splitlines()) >= len(trace.events)
    assert trace.hash in output


@needs_qemu
@pytest.mark.parametrize(
    "options",
    [("--lie", "flush"), (), ("--option", "cluster_size=4k"), ("--with", "zero,discard", "--depth", "1")],
    ids=["lying", "honest", "4k", "zero,discard"],
)
def test_the_verdict_does_not_depend_on_processes_or_sets(tmp_path, options, monkeypatch):
    trace = recorded(tmp_path, "t", "--ops", "60", "--size", "2M", "--seed", "3", *options)
    monkeypatch.setattr(run, "_FEW", 1)  # so that this few epochs are shared out too
    outcomes = []
    for jobs in (1, 2):
        outcome = run.explore_trace(run.Plan(str(trace), "qcow2"), jobs=jobs)
        outcomes.append((outcome.verdict, outcome.coverage, outcome.findings))
    assert outcomes[0] == outcomes[1]
    plain = run.explore_trace(run.Plan(str(trace), "qcow2", sets=False), jobs=1, budget=3000)
    assert plain.verdict in (outcomes[0][0], Verdict.UNKNOWN)


@needs_qemu
@pytest.mark.parametrize("size", ["512", "4608", "1000k", "4097k", "3M"])
@pytest.mark.parametrize("format", ["qcow2", "raw"])
def test_disks_of_odd_sizes(tmp_path, format, size):
    """Whatever the size of the guest's disk, the image's is one that a server can serve."""
    powercut("record", format, "--ops", 20, "--size", size, "--out", tmp_path / "t")
    powercut("explore", tmp_path / "t", "--jobs", 1)


@needs_qemu
def test_a_recording_that_was_cut_off_is_unknown_at_best(tmp_path, honest):
    whole = honest.read_bytes()
    cut = tmp_path / "cut.trace"
    cut.write_bytes(whole[: len(whole) * 2 // 3 + 7])
    done = powercut("explore", cut, expect=3)
    assert done.output.startswith("UNKNOWN")
    assert "ends within" in done.output


def test_a_recording_that_died_before_its_first_event(tmp_path):
    """Files declared, and nothing asked of them: that much can be judged."""
    with TraceWriter(tmp_path / "t", {"format": "raw"}) as writer:
        writer.file("image", 1 << 20, "image")
        writer.file("guest", 1 << 20, "guest")
    assert powercut("explore", tmp_path / "t").output.startswith("HOLDS")


# ---- check


@needs_qemu
def test_check_says_what_an_image_is(tmp_path):
    image = tmp_path / "x.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, "4M"], check=True)
    subprocess.run(["qemu-io", "-c", "write 0 1M", image], check=True, capture_output=True)
    done = powercut("check", image, "--json", tmp_path / "c.json")
    assert "clean" in done.output
    assert json.loads((tmp_path / "c.json").read_text())["damaged"] is False

    whole = bytearray(image.read_bytes())
    whole[131072:131074] = b"\0\0"  # the refcount of cluster 0, with the default layout of qemu-img
    (tmp_path / "refcount.qcow2").write_bytes(whole)
    done = powercut("check", tmp_path / "refcount.qcow2", "--json", tmp_path / "c.json", expect=1)
    assert json.loads((tmp_path / "c.json").read_text())["problems"]

    (tmp_path / "gone.qcow2").write_bytes(bytes(512) + whole[512:])
    assert "DAMAGED" in powercut("check", tmp_path / "gone.qcow2", expect=1).output
    (tmp_path / "gone.img").write_bytes(bytes(512) + whole[512:])
    powercut("check", tmp_path / "gone.img", expect=2)
    powercut("check", tmp_path / "gone.img", "--format", "qcow2", expect=1)
    (tmp_path / "empty.qcow2").touch()
    assert powercut("check", tmp_path / "empty.qcow2", expect=1).output.count("\n") <= 3
    (tmp_path / "empty.img").touch()
    powercut("check", tmp_path / "empty.img", expect=2)


# ---- where it cannot


def refused(*arguments: object) -> str:
    """What it says: exit code 2, and one line on standard error that is no traceback, after click's usage if any."""
    done = powercut(*arguments, expect=2)
    lines = [line for line in done.stderr.splitlines() if line and not line.startswith(("Usage:", "Try "))]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.output
    assert lines[0].startswith(("powercut: ", "Error: "))
    return lines[0]


def test_bad_inputs_are_one_sentence(tmp_path):
    (tmp_path / "foreign").write_bytes(b"\x7fELF" + bytes(5000))
    missing, foreign, out = tmp_path / "missing", tmp_path / "foreign", tmp_path / "out"
    for command in ("explore", "show"):
        assert str(missing) in refused(command, missing)
        assert "not a powercut trace" in refused(command, foreign)
        refused(command, tmp_path)
        refused(command)
    assert "format" in refused("explore", foreign, "--format", "vdi") or "trace" in refused("explore", foreign)
    assert "not a finding" in refused("replay", foreign, "--out", out)
    assert str(missing) in refused("replay", missing, "--out", out)
    assert "--out" in refused("replay", foreign)
    assert "--out" in refused("record", "qcow2")
    assert "--out" in refused("record", "qcow2", "--out")
    assert "--budget" in refused("explore", foreign, "--budget", "0")
    assert "--budget" in refused("explore", foreign, "--budget", "many")
    assert "--jobs" in refused("explore", foreign, "--jobs", "0")
    assert "--atom" in refused("explore", foreign, "--atom", "1024")
    assert "--base" in refused("import", foreign, "--out", out)
    assert "dm-log-writes" in refused("import", foreign, "--base", foreign, "--out", out)
    assert str(missing) in refused("import", missing, "--base", foreign, "--out", out)
    assert str(missing) in refused("import", foreign, "--base", missing, "--out", out)
    assert str(missing) in refused("check", missing)
    assert "known format" in refused("check", foreign)
    refused("check", tmp_path)
    refused("nonsense")
    refused("explore", foreign, "--nonsense")
    assert not out.exists()


@needs_qemu
@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("vdi",), "vdi"),
        (("qcow2", "--size", "0"), "size"),
        (("qcow2", "--size", "1000"), "size"),
        (("qcow2", "--size", "big"), "big"),
        (("qcow2", "--backing", "100"), "backing"),
        (("qcow2", "--with", "erase"), "erase"),
        (("qcow2", "--option", "cluster_size"), "NAME=VALUE"),
        (("qcow2", "--option", "cluster_size=3"), "qemu-img"),
        (("qcow2", "--option", "no_such=3"), "no_such"),
        (("qcow2", "--lie", "read"), "--lie"),
        (("qcow2", "--via", "blklogwrites", "--lie", "flush"), "blklogwrites"),
        (("qcow2", "--via", "blklogwrites", "--with", "zero"), "blklogwrites"),
        (("qcow2", "--no-flush"), "no_flush"),
        (("raw", "--backing", "1M"), "backing"),
    ],
)
def test_recordings_that_make_no_sense_are_one_sentence(tmp_path, options, says):
    format, *rest = options
    size = [] if "--size" in rest else ["--size", "1M"]
    said = refused("record", format, "--ops", 5, *size, *rest, "--out", tmp_path / "t")
    assert says.lower() in said.lower()
    assert not (tmp_path / "t").exists(), "nothing that looks like a recording is left"


@needs_qemu
def test_places_that_cannot_be_written(tmp_path, honest, lying):
    nowhere = tmp_path / "missing" / "file"
    assert str(nowhere) in refused("record", "qcow2", "--ops", 5, "--size", "1M", "--out", nowhere)
    assert str(nowhere) in refused("explore", honest, "--json", nowhere)
    (tmp_path / "file").touch()
    assert str(tmp_path / "file") in refused("explore", lying, "--save", tmp_path / "file")
    powercut("explore", lying, "--save", tmp_path / "found", expect=1)
    finding = next((tmp_path / "found").iterdir())
    assert str(nowhere) in refused("replay", finding, "--out", nowhere)
    assert str(tmp_path) in refused("replay", finding, "--out", tmp_path)


@needs_qemu
def test_a_finding_goes_with_its_trace_and_no_other(tmp_path, honest, lying):
    trace = tmp_path / "t.trace"
    trace.write_bytes(lying.read_bytes())
    powercut("explore", trace, "--save", tmp_path / "found", expect=1)
    finding = next((tmp_path / "found").iterdir())
    powercut("replay", finding, "--out", tmp_path / "x.img")
    trace.write_bytes(honest.read_bytes())
    assert "another trace" in refused("replay", finding, "--out", tmp_path / "y.img")
    trace.unlink()
    assert str(trace) in refused("replay", finding, "--out", tmp_path / "y.img")
    powercut("replay", finding, "--out", tmp_path / "x.img", "--trace", lying)
    assert not (tmp_path / "y.img").exists()
    document = json.loads(finding.read_text())
    for key, value in (("schema", "powercut.finding/9"), ("position", "x"), ("atom", 0), ("format", "vdi")):
        finding.write_text(json.dumps(document | {key: value}))
        refused("replay", finding, "--out", tmp_path / "y.img", "--trace", lying)
    decision = document["decisions"][0]
    for key, value in (("event", 10**6), ("offset", 1 << 60), ("offset", 3), ("offset", -512)):
        changed = [decision | {"lost": False} | {key: value}]
        finding.write_text(json.dumps(document | {"decisions": changed}))
        refused("replay", finding, "--out", tmp_path / "y.img", "--trace", lying)


# ---- help


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)], ids=lambda words: " ".join(words) or "main")
def test_help_works_and_loads_nothing_heavy(command: Sequence[str]):
    """In a process of its own, as a user starts it; the same for a command that works loads numpy (the control)."""
    heavy = "numpy", "msgspec", "rich", "xxhash", "qemu", "mmap"
    code = (
        f"{IMPORTED_BY_HELP}r = CliRunner().invoke(main, {[*command, '--help']!r}); assert r.exit_code == 0, r.output\n"
    )
    code += f"print(r.output); print([m for m in {heavy!r} if m in sys.modules], file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert "Usage:" in done.stdout
    assert done.stderr.strip() == "[]"


def test_control_a_command_that_works_does_load_numpy(tmp_path):
    code = (
        f"{IMPORTED_BY_HELP}CliRunner().invoke(main, ['show', {str(tmp_path)!r}]); sys.exit('numpy' not in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], timeout=60, check=True)


def test_every_command_has_help_and_no_other_is_there():
    context = click.Context(main)
    assert set(COMMANDS) <= set(main.list_commands(context))
    for name in main.list_commands(context):
        command = main.get_command(context, name)
        assert command is not None
        assert command.help


def test_events_of_a_hand_made_trace_are_told(tmp_path):
    with TraceWriter(tmp_path / "t", {"format": "raw"}) as writer:
        file = writer.file("image", 1 << 20, "image")
        writer.complete(writer.issue(Kind.WRITE, file, 4096, SECTOR, data=bytes(SECTOR)), 5)
        writer.issue(Kind.FLUSH, file)
    output = powercut("show", tmp_path / "t", "--events").output
    assert "write 0x1000+0x200 failed with errno 5" in output
    assert "in flight image   flush" in output
    assert os.linesep.join(output.splitlines()[-2:]).count("image") == 2
