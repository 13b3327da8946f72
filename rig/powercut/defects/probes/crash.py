"""Every crash state of a recording (`powercut explore`)."""

from __future__ import annotations

from pathlib import Path

from powercut.defects.probes import Trouble
from powercut.explore import run
from powercut.explore.session import Plan
from powercut.formats.qcow2.driver.practice import Practice
from powercut.recording import modelled
from powercut.recording.histories import MIB
from powercut.scenario import Scenario, parse_size
from powercut.verdict import Verdict

_LARGEST = 64 * MIB  # a larger disk is recorded with all that it may grow to


def judge(scenario: Scenario, practice: Practice, scratch: Path) -> Trouble | None:
    """What breaks at a crash. A scenario that fails without one is not judged here."""
    if parse_size(scenario.size) > _LARGEST:
        return None
    trace = scratch / "probe.trace"
    try:
        modelled.record(scenario, practice, trace)
    except OSError:
        return None
    outcome = run.explore_trace(Plan(str(trace), "qcow2"), jobs=1)
    if outcome.verdict is Verdict.UNKNOWN:
        return Trouble(f"UNKNOWN: {'; '.join(outcome.reasons)}")
    if outcome.verdict is Verdict.HOLDS:
        return None
    fewest = min(outcome.findings, key=lambda finding: len(finding.decisions))
    return Trouble(f"{fewest.rule}: {fewest.text}", len(fewest.decisions))
