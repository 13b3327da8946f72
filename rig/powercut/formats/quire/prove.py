"""A scenario of Quire: its history is done for real on a recorded store, every promise judged on every crash state.

The judge runs Quire's own open, recovery and writing; crashes inside what those write are explored in their turn.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from powercut.crash.options import Options
from powercut.errors import InputError
from powercut.formats.quire.history import parse, record
from powercut.formats.quire.judge import Quire
from powercut.formats.quire.promises import Promises
from powercut.scenario import Scenario, parse_size
from powercut.stores import INTERRUPTED, StoreOutcome, chosen, explore_store, shrunk
from quire.errors import QuireError
from quire.layout import CHECKED_RECORDS


def check(scenario: Scenario) -> None:
    """Raises InputError if the scenario cannot be done."""
    if scenario.format != "quire":
        raise InputError(f"format {scenario.format!r} does not go with the table quire")
    parse(scenario.workload.history)


def prove(scenario: Scenario, jobs: int | None = None) -> StoreOutcome:
    """Record and explore. Raises InputError if the history cannot be done."""
    assert scenario.quire is not None
    lines = parse(scenario.workload.history)
    features = CHECKED_RECORDS if scenario.quire.records == "C" else 0
    with tempfile.TemporaryDirectory(prefix="powercut-") as scratch:
        trace = Path(scratch) / "history.trace"
        try:
            record(lines, parse_size(scenario.size), scenario.quire.slots, trace, features)
        except QuireError as error:
            raise InputError(f"the history cannot be done: {error}") from None
        judge, options = Quire(Promises(trace, lines)), Options(lying=scenario.explore.lying_flushes)
        outcome = explore_store(
            trace,
            judge,
            depth=scenario.explore.recovery_depth,
            options=options,
            budget=scenario.explore.budget,
            seed=scenario.explore.seed,
            jobs=jobs or os.cpu_count() or 1,
        )
        outcome.findings = chosen(outcome.findings)
        if INTERRUPTED not in outcome.reasons:
            outcome.findings = shrunk(trace, judge, outcome.findings, options)
        return outcome
