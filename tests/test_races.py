"""Requests held in flight on a real QEMU: raw holds, and a server that spoils what it held is found out."""

from __future__ import annotations

import json
import shutil
import threading
import time

import msgspec
import pytest
from click.testing import CliRunner

from powercut.capture.holding import Gate
from powercut.cli import main
from powercut.faults.inflight import KINDS, STARTS, Case, Plan, Rig, parse
from powercut.faults.races import Search, Tally, draw
from powercut.guest.control import SNAPSHOT, Driver
from powercut.guest.daemon import version
from powercut.trace import SECTOR

pytestmark = pytest.mark.skipif(shutil.which("qemu-storage-daemon") is None, reason="QEMU's tools are not installed")


def raced(tmp_path, *arguments: str, format: str = "raw"):
    out = tmp_path / "races.json"
    command = ["races", format, "--with", "", "--random", "0", "--json", str(out), "--save", str(tmp_path / "found")]
    command += arguments
    result = CliRunner().invoke(main, command)
    return result.exit_code, json.loads(out.read_text()), result.output


def test_raw_holds(tmp_path, figure):
    code, document, said = raced(tmp_path)
    assert (code, document["verdict"]) == (0, "HOLDS"), said
    figure("races on raw, cases", str(document["coverage"]["cases"]))


@pytest.mark.parametrize(("lie", "length"), [("drop", 2), ("misplace", 2), ("stale", 3)])
def test_a_server_that_spoils_what_it_held_is_found(tmp_path, lie, length, planted):
    """A stale read needs an operation past it to be held at all, so histories of three."""
    code, document, said = raced(tmp_path, "--lie", lie, "--length", str(length), "--start", "written")
    planted(f"held requests: {lie}", code == 1)
    assert (code, document["verdict"]) == (1, "BROKEN"), said


def test_a_random_history_changes_nothing_that_it_is_changing_already(figure):
    """The guest would wait with it, and all that is held be let go."""
    plan, held = Plan("qcow2", extra=KINDS["qcow2"], starts=STARTS["qcow2"]), 0
    for number in range(200):
        case, until = draw(plan, number)
        changing = {at: one for at, one in enumerate(case.history, 1) if one.kind not in ("read", "flush")}
        for first, end in until.items():
            held += 1
            assert first < end
            for other in (one for at, one in changing.items() if first < at < end):
                assert other.kind not in SNAPSHOT
                one = changing.get(first, other._replace(length=0))
                assert one.offset + one.length <= other.offset or other.offset + other.length <= one.offset
    figure("operations held in 200 random histories", held)


def test_random_histories_find_a_server_that_loses_what_it_held(tmp_path, planted):
    code, document, said = raced(tmp_path, "--lie", "drop", "--length", "0", "--random", "4", "--seed", "1")
    planted("held requests, random: drop", code == 1)
    assert (code, document["verdict"]) == (1, "BROKEN"), said


def test_a_read_that_gets_into_stock_late_is_answered(monkeypatch):
    """A server may put a read into stock when the stock was emptied for the last time: that is no hang of QEMU's."""
    held, asked = Gate.held, threading.Event()

    def late(gate, request):
        asked.set()
        time.sleep(0.05)
        return held(gate, request)

    monkeypatch.setattr("powercut.guest.control._HANG", 2.0)
    with Rig(Plan("qcow2")) as rig:
        rig._image.load(rig._begin("warm"))
        guest = rig._daemon().open(rig._node("warm"))
        guest.read(rig.plan.base, SECTOR)
        rig._gate.keep_reads(rig.plan.cluster)
        driver = Driver(guest, rig._daemon(), rig._gate)
        monkeypatch.setattr(Gate, "held", late)
        driver.stock(rig.plan.base)
        assert asked.wait(5)
        rig._gate.keep_no_reads()
        driver.drain()
        rig._daemon().shut(guest)


def seen(plan, start, history, tries=1):
    """The first case of a history, with one request held, that goes wrong; shrunk, and as it would be saved. Where the
    machine is busy, QEMU may be slower than the guest, and the case takes several `tries`."""
    with Rig(plan) as rig:
        search, tally = Search(rig), Tally()
        for _ in range(tries):
            search.exhaust(Case(start, tuple(map(parse, history))), tally)
            if tally.findings:
                break
    return tally.findings


stock = pytest.mark.skipif(not version().startswith("7.2"), reason="what is known of QEMU 7.2")


@stock
@pytest.mark.parametrize(
    ("start", "overlap", "history", "kind"),
    [
        ("zeroed", False, ["write 64k 32k", "zero 96k 64k unmap"], "structure-refcount"),
        ("zeroed", False, ["write 64k 32k", "zero 128k 64k unmap"], None),
        ("warm", False, ["read 64k 192k", "discard 64k 64k", "write 192k 64k"], "read-foreign"),
        ("warm", False, ["read 64k 192k", "discard 64k 64k", "write 64k 64k"], None),
        ("warm", True, ["write 64k 64k", "discard 64k 64k", "write 192k 64k"], "disk-foreign"),
        ("warm", False, ["zero 64k 64k", "write 64k 32k", "zero 96k 64k unmap"], "structure-refcount"),
        ("warm", False, ["zero 64k 64k", "write 64k 32k", "zero 128k 64k unmap"], None),
    ],
)
def test_what_stock_qemu_does(tmp_path, start, overlap, history, kind):
    """docs/races.md tells of these; a control that differs in the place, or waits for what overlaps, holds."""
    plan = Plan("qcow2", extra=("zero", "discard"), starts=(start,), overlap=overlap)
    found = seen(plan, start, history, 3 if kind else 1)
    assert {bundle.kind for bundle in found} == ({kind} if kind else set()), found
    for bundle in found:
        assert bundle.seen
        saved = tmp_path / "one.race.json"
        saved.write_bytes(msgspec.json.encode(bundle))
        image = tmp_path / "left.qcow2"
        again = CliRunner().invoke(main, ["races", "--replay", str(saved), "--out", str(image), "--tries", "5"])
        assert again.exit_code == 1, again.output
        assert image.stat().st_size
        if kind == "structure-refcount":
            assert "qemu-img check: ERROR cluster 5 refcount=0 reference=1" in again.output


@pytest.mark.parametrize("history", [["snapshot create x", "write 64k 64k"], ["snapshot delete s", "read 64k 64k"]])
def test_snapshots_hold_what_the_disk_held(history, planted, monkeypatch):
    """Every request of a snapshot is held until the guest's next operation was issued; and, as a control, dropped."""
    monkeypatch.setattr(Search, "shrink", lambda search, case, kind: case)
    for lie in (None, "drop"):
        found = seen(Plan("qcow2", extra=("snapshot",), starts=("snapshot",), lie=lie), "snapshot", history)
        if lie:
            planted(f"dropped requests of {history[0]}", bool(found))
        assert bool(found) == bool(lie), found


def test_a_request_that_is_held_while_another_is_waited_for_is_no_hang():
    """Each request is held when it comes, and the second comes while the guest waits for the first."""
    history = tuple(map(parse, ("write 64k 64k", "write 64k 64k", "write 192k 64k")))
    with Rig(Plan("qcow2", starts=("fresh",))) as rig:
        ran = rig.run(Case("fresh", history), lambda label: 9)
    assert not ran.faults
    assert sum(at.label.operation == 1 for at in ran.arrivals) > 1


def test_an_image_that_cannot_be_made_is_no_finding(tmp_path):
    command = ["races", "qcow2", "--option", "colour=red", "--save", str(tmp_path / "found")]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 2, result.output
    assert "colour" in result.output


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"history": ["jump 0 512"]}, "jump"),
        ({"history": ["write 0 100"]}, "whole sectors"),
        ({"history": ["snapshot delete x"]}, "cannot be made or deleted"),
        ({"start": "hot"}, "'hot' is not one of"),
        ({"schema": "powercut.race/9"}, "powercut.race/9"),
    ],
)
def test_bad_bundles_are_refused(tmp_path, change, says):
    good = {"powercut": "0", "qemu": "0", "format": "qcow2", "options": {}, "start": "fresh", "history": ["flush"]}
    good |= {"schema": "powercut.race/1", "holds": [], "kind": "k", "faults": [], "seen": 1, "of": 1}
    file = tmp_path / "b.json"
    file.write_text(json.dumps(good | change))
    result = CliRunner().invoke(main, ["races", "--replay", str(file)])
    assert result.exit_code == 2, result.output
    assert says in result.output
