"""Fuzzing the real QEMU: nothing in two operations of writes and flushes; lies are found."""

from __future__ import annotations

import json
import shutil
import tomllib
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from powercut.cli import main
from powercut.recording import histories
from powercut.recording.operations import possible
from powercut.scenario import Scenario

pytestmark = pytest.mark.skipif(shutil.which("qemu-storage-daemon") is None, reason="QEMU's tools are not installed")


def test_all_histories_of_two_operations_hold(tmp_path):
    result = CliRunner().invoke(main, ["fuzz", "qcow2", "--systematic", "2", "--with", "", "--save", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "HOLDS" in result.output


def test_a_sample_that_finds_nothing_is_unknown(tmp_path):
    arguments = ["fuzz", "raw", "--with", "", "--examples", "5", "--seed", "3", "--save", str(tmp_path)]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 3, result.output


DRAWN = ("--seed", "5", "--examples", "40")


@pytest.mark.parametrize(
    ("format", "lie", "how"),
    [("qcow2", "flush", ("--systematic", "1")), ("raw", "flush", DRAWN), ("raw", "order", ("--systematic", "2"))],
)
def test_a_lie_is_found_shrunk_and_reproduced_by_the_gate(tmp_path, format, lie, how, planted):
    """The same search without the lie finds nothing (above, and `--systematic 2`)."""
    out = tmp_path / "fuzz.json"
    arguments = ["fuzz", format, "--with", "", "--lie", lie, *how]
    result = CliRunner().invoke(main, [*arguments, "--save", str(tmp_path), "--json", str(out)])
    planted(f"fuzzing {format} with a lie: {lie}", result.exit_code == 1)
    assert result.exit_code == 1, result.output
    for finding in json.loads(out.read_text())["findings"]:
        assert finding["confirmed"] == finding["of"]
        assert finding["operations"] <= 3, finding
        gated = CliRunner().invoke(main, ["gate", finding["scenario"], "--save", str(tmp_path / "gate")])
        assert gated.exit_code == 0, gated.output
        assert "BROKEN  BROKEN" in gated.output
        image = tmp_path / "crash.img"
        replayed = CliRunner().invoke(main, ["replay", finding["replay"].split()[2], "--out", str(image)])
        assert "confirmed on the written state" in replayed.output
        assert "NOT" not in replayed.output
        text = Path(finding["scenario"]).read_text().replace(f'lie = ["{lie}"]', "")
        honest = tmp_path / "honest.toml"
        honest.write_text(text)
        gated = CliRunner().invoke(main, ["gate", str(honest), "--save", str(tmp_path / "gate")])
        assert gated.exit_code == 1, gated.output
        assert "BROKEN  HOLDS" in gated.output


@settings(max_examples=25)
@given(st.data())
def test_histories_that_are_drawn_make_sense_and_are_read_back(data):
    drawn = data.draw(histories.drawn("qcow2", histories.KINDS["qcow2"]))
    assert drawn.workload.history
    assert possible(drawn) == drawn
    again = msgspec.convert(tomllib.loads(histories.toml(drawn)), Scenario)
    assert again == drawn
