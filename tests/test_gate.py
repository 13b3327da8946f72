"""The gate: what comes out is held against what was expected, and nothing that did not run counts as passed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from powercut import gate
from powercut.cli import main
from powercut.guest.daemon import version
from support.qemu import needs_qemu

SHIPPED = Path(__file__).parents[1] / "scenarios"
SMALL = 'size = "1M"\nworkload = { operations = 20 }\nabout = "small"\n'
LIE = 'record = { lie = ["flush"] }\n'
Write = Callable[[str, str], Path]


@pytest.fixture
def scenario(tmp_path: Path) -> Write:
    def write(name: str, text: str) -> Path:
        (tmp_path / "s").mkdir(exist_ok=True)
        path = tmp_path / "s" / f"{name}.toml"
        path.write_text(SMALL + text)
        return path

    return write


def run_gate(tmp_path: Path, *paths: object) -> tuple[Result, dict[str, str]]:
    """Run the gate; returns what it printed and, for each scenario, its state."""
    command = ["gate", *map(str, paths), "--jobs", "1", "--save", str(tmp_path / "kept")]
    done = CliRunner().invoke(main, [*command, "--json", str(tmp_path / "result.json")])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.output
    if not (tmp_path / "result.json").exists():
        return done, {}
    document = json.loads((tmp_path / "result.json").read_text())
    assert document["schema"] == "powercut.gate/1"
    assert document["exit_code"] == done.exit_code
    return done, {result["name"]: result["state"] for result in document["results"]}


@needs_qemu
def test_expected_results_pass(tmp_path, scenario):
    scenario("good", 'expect = "HOLDS"\n')
    scenario("lying", 'expect = "BROKEN"\n' + LIE)
    scenario("raw", 'expect = "BROKEN"\nrule = "acknowledged"\nformat = "raw"\n' + LIE)
    done, states = run_gate(tmp_path, tmp_path / "s")
    assert states == {"good": "expected", "lying": "expected", "raw": "expected"}
    assert done.exit_code == 0
    assert "3 scenarios: 3 as expected" in done.output
    assert not (tmp_path / "kept").exists(), "only what a person must look into is kept"


@needs_qemu
def test_control_a_control_that_holds_is_unexpected(tmp_path, scenario, planted):
    done, states = run_gate(tmp_path, scenario("good", 'expect = "BROKEN"\n'))
    planted("a control that breaks nothing", done.exit_code == 1)
    assert states == {"good": "unexpected"}
    assert done.exit_code == 1
    assert "UNEXPECTED" in done.output
    assert (tmp_path / "kept" / "good.trace").exists()


@needs_qemu
def test_what_breaks_and_should_hold_is_unexpected_and_replays(tmp_path, scenario):
    done, states = run_gate(tmp_path, scenario("lying", 'expect = "HOLDS"\n' + LIE))
    assert (done.exit_code, states) == (1, {"lying": "unexpected"})
    line = next(line for line in done.output.splitlines() if "powercut replay" in line)
    finding = line.split()[2]
    again = CliRunner().invoke(main, ["replay", finding, "--out", str(tmp_path / "crash.img")])
    assert again.exit_code == 0, again.output
    assert "confirmed" in again.output


@needs_qemu
def test_another_broken_rule_than_the_expected_one_is_unexpected(tmp_path, scenario):
    done, states = run_gate(tmp_path, scenario("raw", 'expect = "BROKEN"\nrule = "structure"\nformat = "raw"\n' + LIE))
    assert (done.exit_code, states) == (1, {"raw": "unexpected"})


@needs_qemu
@pytest.mark.parametrize("expect", ["HOLDS", "BROKEN"])
def test_a_spent_budget_is_unknown_whatever_was_expected(tmp_path, scenario, expect):
    done, states = run_gate(tmp_path, scenario("tight", f'expect = "{expect}"\nexplore = {{ budget = 1 }}\n'))
    assert (done.exit_code, states) == (3, {"tight": "unknown"})
    assert "budget" in done.output


@needs_qemu
def test_an_unexpected_result_outweighs_an_unknown_one(tmp_path, scenario):
    scenario("tight", 'expect = "HOLDS"\nexplore = { budget = 1 }\n')
    scenario("wrong", 'expect = "BROKEN"\n')
    assert run_gate(tmp_path, tmp_path / "s")[0].exit_code == 1


@needs_qemu
def test_for_a_version_that_is_not_listed_nothing_is_expected(tmp_path, scenario):
    """A defect known of some versions, gone in this one: no failure. With this version listed it is one (control)."""
    known = 'expect = "BROKEN"\nqemu = [{}]\n'
    done, states = run_gate(tmp_path, scenario("known", known.format('"0.1"')))
    assert (done.exit_code, states) == (0, {"known": "expected"})
    major = version().split(".")[0]
    done, states = run_gate(tmp_path, scenario("known", known.format(f'"0.1", "{major}"')))
    assert (done.exit_code, states) == (1, {"known": "unexpected"})
    done, states = run_gate(tmp_path, scenario("known", known.format(f'"{major[:-1]}"')))
    assert (done.exit_code, states) == (0, {"known": "expected"}), "a version is not any that begins with its digits"


def test_without_qemu_what_records_is_skipped_and_says_so(tmp_path, scenario, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    done, states = run_gate(tmp_path, scenario("good", 'expect = "HOLDS"\n'))
    assert (done.exit_code, states) == (3, {"good": "skipped"})
    assert "SKIPPED  no QEMU" in done.output
    assert "QEMU not found" in done.output
    assert "were not found" in done.output or "was not found" in done.output


def test_shipped_traces_need_no_qemu(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    shipped = sorted(SHIPPED.glob("shipped-*.toml"))
    assert len(shipped) >= 2
    done, states = run_gate(tmp_path, *shipped)
    assert done.exit_code == 0, done.output
    assert set(states.values()) == {"expected"}


def test_nothing_run_is_no_success(tmp_path):
    (tmp_path / "empty").mkdir()
    done, states = run_gate(tmp_path, tmp_path / "empty")
    assert (done.exit_code, states) == (2, {})
    assert "nothing was run" in done.output
    done, states = run_gate(tmp_path, tmp_path / "missing.toml")
    assert (done.exit_code, states) == (2, {})


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ("expect = 5\n", "expect"),
        ('expect = "HOLDS"\ncolour = 1\n', "colour"),
        ('expect = "HOLDS"\nformat = "vdi"\n', "vdi"),
        ('expect = "HOLDS"\n[workload.history]\n', "workload"),
    ],
)
def test_a_bad_scenario_stops_everything_before_anything_runs(tmp_path, scenario, bad, says):
    scenario("a-good-one", 'expect = "HOLDS"\n')
    path = scenario("bad", "")
    path.write_text('about = "bad"\n' + bad)
    done, states = run_gate(tmp_path, tmp_path / "s")
    assert (done.exit_code, states) == (2, {})
    assert says in done.output
    assert str(path) in done.output
    assert len(done.output.strip().splitlines()) == 1, done.output


def test_a_bad_history_stops_everything_too(tmp_path, scenario):
    scenario("a-good-one", 'expect = "HOLDS"\n')
    path = scenario("bad", "")
    path.write_text('about = "bad"\nexpect = "HOLDS"\nworkload = { history = ["write 0 4k", "erase 0 4k"] }\n')
    done, states = run_gate(tmp_path, tmp_path / "s")
    assert (done.exit_code, states) == (2, {})
    assert f"{path}: history: 'erase 0 4k'" in done.output


def test_exit_codes_are_those_of_the_states():
    """Each combination, without running anything."""
    from powercut.scenario import Scenario

    def code(*states: str) -> int:
        nothing = Scenario(about="", expect="HOLDS")
        return gate.exit_code([gate.Result(state, nothing, state) for state in states])

    assert code("expected", "expected") == 0
    assert code("expected", "unknown") == code("expected", "skipped") == 3
    assert code("unexpected", "unknown", "skipped", "expected") == 1
