"""Scenarios of Quire through the gate: a control that must break, one that holds, and mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from powercut.cli import main

SCENARIO = """
about = "a test"
expect = "{expect}"
format = "quire"
size = "16k"
[quire]
records = "{records}"
[workload]
history = {history}
[explore]
recovery_depth = 0
lying_flushes = {lying}
"""
HISTORY = '["write main 0 512", "flush main"]'


def gate(folder: Path, history: str = HISTORY, expect: str = "HOLDS", records: str = "C", lying: int = 0):
    path = folder / "quire-test.toml"
    path.write_text(SCENARIO.format(expect=expect, records=records, history=history, lying=lying))
    options = ["--save", str(folder / "kept"), "--json", str(folder / "result.json")]
    result = CliRunner().invoke(main, ["gate", str(path), *options])
    document = json.loads((folder / "result.json").read_text()) if (folder / "result.json").exists() else None
    return result, document


@pytest.mark.parametrize("records", ["P", "C"])
def test_a_promise_that_holds(tmp_path, records):
    result, document = gate(tmp_path, records=records)
    assert result.exit_code == 0, result.output
    outcome = document["results"][0]["outcome"]
    assert outcome["schema"] == "powercut.store-verdict/1"
    assert outcome["verdict"] == "HOLDS"
    assert outcome["coverage"]["epochs"] == outcome["coverage"]["epochs_exhausted"] > 0


def test_control_a_flush_that_lied_breaks_it(tmp_path, planted):
    result, document = gate(tmp_path, expect="BROKEN", lying=1)
    assert result.exit_code == 0, result.output
    findings = document["results"][0]["outcome"]["findings"]
    planted("quire scenario: the last flush lied", any(found["rule"] == "acknowledged" for found in findings))
    assert any("content of" in line for found in findings for line in found["state"])
    result, _ = gate(tmp_path, expect="HOLDS", lying=1)
    assert result.exit_code == 1
    assert "UNEXPECTED" in result.output


@pytest.mark.parametrize(
    ("history", "says"),
    [('["sing main"]', "'sing main' is not one of its lines"), ('["write nobody 0 512"]', "nobody")],
)
def test_a_mistake_is_one_sentence(tmp_path, history, says):
    result, _ = gate(tmp_path, history=history)
    assert result.exit_code in (2, 3), result.output
    assert says in result.output
    assert "Traceback" not in result.output
