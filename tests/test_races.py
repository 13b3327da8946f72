"""Requests held in flight on a real QEMU: raw holds, and a server that spoils what it held is found out."""

from __future__ import annotations

import json
import shutil
import threading
import time

import pytest
from click.testing import CliRunner

from powercut.capture.holding import Gate
from powercut.cli import main
from powercut.guest.control import Driver
from powercut.inflight import Plan, Rig
from powercut.trace import SECTOR

pytestmark = pytest.mark.skipif(shutil.which("qemu-storage-daemon") is None, reason="QEMU's tools are not installed")


def raced(tmp_path, *arguments: str):
    out = tmp_path / "races.json"
    command = ["races", "raw", "--length", "2", "--json", str(out), "--save", str(tmp_path / "found"), *arguments]
    result = CliRunner().invoke(main, command)
    return result.exit_code, json.loads(out.read_text()), result.output


def test_raw_holds(tmp_path, figure):
    code, document, said = raced(tmp_path)
    assert (code, document["verdict"]) == (0, "HOLDS"), said
    figure("races on raw, cases", str(document["coverage"]["cases"]))


@pytest.mark.parametrize(("lie", "length"), [("drop", 2), ("misplace", 2), ("stale", 3)])
def test_a_server_that_spoils_what_it_held_is_found(tmp_path, lie, length, planted):
    """A stale read needs an operation past it to be held at all, so histories of three."""
    code, document, said = raced(tmp_path, "--lie", lie, "--length", str(length))
    planted(f"held requests: {lie}", code == 1)
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
