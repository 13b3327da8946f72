"""A bundle replays where neither the finding nor the trace is."""

from __future__ import annotations

import contextlib
import json
import os
import zipfile
from base64 import b64decode
from pathlib import Path

import pytest

from powercut.errors import InputError
from powercut.explore import bundle
from powercut.explore.replay import replay
from powercut.explore.run import explore_trace
from powercut.explore.session import Plan
from powercut.guest.daemon import version
from powercut.recording.record import record
from powercut.report.outcome import save
from powercut.scenario import from_options
from powercut.trace import Trace
from support.qemu import needs_qemu

SHIPPED = Path(__file__).parents[1] / "scenarios" / "shipped-lying-flush.trace"


@pytest.fixture
def saved(tmp_path):
    outcome = explore_trace(Plan(str(SHIPPED), "qcow2"), jobs=1)
    return save(outcome.findings, tmp_path / "findings")


def test_a_bundle_needs_nothing_else(saved, tmp_path, monkeypatch):
    for item in saved:
        bundle.write(str(item.path), str(tmp_path / "b.zip"))
        (tmp_path / "far").mkdir(exist_ok=True)
        os.replace(tmp_path / "b.zip", tmp_path / "far" / "b.zip")
        monkeypatch.chdir(tmp_path / "far")
        assert replay("b.zip", "crash.img").confirmed


def test_a_flush_that_lied_last_is_replayed_as_such(tmp_path):
    honest = SHIPPED.with_name("shipped-qcow2.trace")
    outcome = explore_trace(Plan(str(honest), "qcow2", lying=1), jobs=1)
    for item in save(outcome.findings, tmp_path / "findings"):
        assert replay(str(item.path), str(tmp_path / "crash.img")).confirmed


def test_damaged_bundles_are_refused(saved, tmp_path):
    path = tmp_path / "b.zip"
    bundle.write(str(saved[0].path), str(path))
    whole = path.read_bytes()
    for cut in range(0, len(whole), len(whole) // 97):
        path.write_bytes(whole[:cut] + b"\xff" * 5 + whole[cut + 5 :])
        with contextlib.suppress(InputError):  # some bytes of an archive do not matter
            replay(str(path), str(tmp_path / "crash.img"))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("else", "x")
    with pytest.raises(InputError, match="not a bundle"):
        replay(str(path), str(tmp_path / "crash.img"))


def test_a_finding_of_another_trace_is_refused(saved, tmp_path):
    other = str(SHIPPED.with_name("shipped-qcow2.trace"))
    with pytest.raises(InputError, match="another trace"):
        bundle.write(str(saved[0].path), str(tmp_path / "b.zip"), other)
    assert not (tmp_path / "b.zip").exists()


@needs_qemu
def test_a_bundle_says_what_was_expected_and_found(tmp_path, monkeypatch):
    """Bytes of a guest's sector: both are stamps, and both are in the trace, where the client wrote them."""
    options = {"about": "", "expect": "BROKEN", "size": "1M", "record": {"lie": ["order"]}}
    history = ["write 0 64k", "flush", "write 0 64k", "flush", "reopen", "write 0 4k", "flush", "write 64k 64k"]
    options["workload"] = {"depth": 1, "history": history}
    trace = tmp_path / "t.trace"
    record(from_options(options | {"format": "raw"}), trace)
    outcome = explore_trace(Plan(str(trace), "raw"), jobs=1)
    stale = [item for item in outcome.findings if item.kind == "stale"]
    assert stale
    rows = {row.tobytes() for row in Trace(trace).rows}
    for item in save(stale, tmp_path / "findings"):
        bundle.write(str(item.path), str(tmp_path / "b.zip"))
        with zipfile.ZipFile(tmp_path / "b.zip") as archive:
            told = json.loads(archive.read("finding.json"))
        found, expected = b64decode(told["found"]), [b64decode(legal["data"]) for legal in told["expected"]]
        assert found not in expected
        assert {found, *expected} <= rows
        assert told["qemu"] == version()
        assert told["powercut"]
