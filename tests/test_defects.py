"""Every defect of the catalogue is found, small; and nothing is found where there is none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from powercut.cli import main
from powercut.defects import probes, scoreboard
from powercut.defects.probes import errors
from powercut.defects.scoreboard import QUICK, look
from powercut.formats.qcow2.defects import CATALOGUE, Defect
from powercut.formats.qcow2.driver.practice import Era, Practice
from powercut.recording.histories import Shape, scenario


@pytest.mark.parametrize("defect", CATALOGUE, ids=lambda defect: defect.name)
def test_each_is_found_and_small_and_absent_without_it(defect: Defect, planted: Callable[[str, bool], None]) -> None:
    row = look(defect, QUICK, seed=1)
    planted(f"qcow2 driver: {defect.name}", row.found)
    hit = row.soonest
    assert hit is not None
    assert len(hit.scenario.workload.history) <= 5
    assert (hit.trouble.lost or 0) <= 3
    assert row.alarms == []


@pytest.mark.parametrize("era", Era)
def test_nothing_is_found_where_there_is_no_defect(era: Era, tmp_path: Path) -> None:
    for method in scoreboard.methods_for(era):
        hit, tried = probes.search(method, Practice(era), seed=2, most=12, limit=20.0, scratch=tmp_path)
        assert hit is None
        assert tried


def test_what_a_failed_write_left_may_come_back_with_a_snapshot(tmp_path: Path) -> None:
    """The write fails in the middle; the snapshot holds a part of it, the next write covers it, and it comes back."""
    lines = ["write 32k 128k", "snapshot create s2", "write 130560 133632", "snapshot apply s2"]
    shape = Shape(512, (32 << 10, 128 << 10), (("cluster_size", "512"), ("lazy_refcounts", "on")))
    assert errors.judge(scenario("qcow2", shape, lines, 1), Practice(), tmp_path) is None


def test_the_command_prints_a_table_and_a_document(tmp_path: Path) -> None:
    out = tmp_path / "defects.json"
    words = ["defects", "close-drops-cache", "--quick", "--jobs", "1", "--json", str(out)]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    assert "1/1 found, 0 false alarms" in result.output
    board = json.loads(out.read_text())
    assert board["schema"] == "powercut.defects/1"
    assert board["defects"][0]["methods"]["loops"]["history"]
    assert board["runs_without"] > 0


def test_an_unknown_defect_is_one_sentence_and_exit_code_2() -> None:
    result = CliRunner().invoke(main, ["defects", "gremlins"])
    assert result.exit_code == 2
    assert "'gremlins' is not one of the defects" in result.output


def test_the_page_has_a_row_for_each() -> None:
    page = (Path(__file__).resolve().parent.parent / "docs" / "defects.md").read_text()
    for defect in CATALOGUE:
        assert f"| `{defect.name}` | {defect.when or '-'}" in page
        assert f"| {defect.happened} | {defect.shows} |" in page
