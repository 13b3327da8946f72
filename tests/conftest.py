"""What all tests share: the hypothesis profiles, and fixtures whose figures are printed when the run ends.

`planted(name, found)` records whether a fault that was put there on purpose was found, `figure(name, value)`
records a number worth reading. Both travel in the report's user properties, so that they also arrive from the
worker processes of pytest-xdist.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.database import DirectoryBasedExampleDatabase

# Every field set: what a profile leaves out it takes from hypothesis's own, which differs where CI=true.
_COMMON: dict[str, Any] = {
    "deadline": None,
    "derandomize": False,
    "database": DirectoryBasedExampleDatabase(".hypothesis/examples"),
    "print_blob": True,
    "suppress_health_check": [HealthCheck.too_slow],
}
settings.register_profile("powercut", max_examples=60, **_COMMON)
settings.register_profile("soak", max_examples=5000, **_COMMON)
settings.load_profile("powercut")

PLANTED, FIGURE = "powercut planted", "powercut figure"
_ROWS = pytest.StashKey[list[tuple[str, Any]]]()


@pytest.fixture
def planted(request: pytest.FixtureRequest) -> Callable[[str, bool], None]:
    """Record that the planted fault `name` was `found`, or not. Nothing is asserted: that is the test's business."""

    def record(name: str, found: bool) -> None:
        request.node.user_properties.append((PLANTED, [name, bool(found)]))

    return record


@pytest.fixture
def figure(request: pytest.FixtureRequest) -> Callable[[str, object], None]:
    """Record a named figure, to be printed when the run ends."""

    def record(name: str, value: object) -> None:
        request.node.user_properties.append((FIGURE, [name, str(value)]))

    return record


class _Collector:
    """Takes what the reports carry, in the process that prints them."""

    def __init__(self, config: pytest.Config) -> None:
        self.rows = config.stash.setdefault(_ROWS, [])

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "teardown":  # the last report of a test: nothing is added after it
            self.rows += [(key, value) for key, value in report.user_properties if key in (PLANTED, FIGURE)]


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(_Collector(config), "powercut figures")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows = config.stash[_ROWS]
    faults: dict[str, bool] = {}
    for name, found in (value for key, value in rows if key == PLANTED):
        faults[name] = found and faults.get(name, True)  # one miss is a miss
    figures = sorted({(name, value) for key, (name, value) in rows if key == FIGURE})
    terminalreporter.section("figures")
    for name, value in figures:
        terminalreporter.line(f"{name}: {value}")
    if faults:
        terminalreporter.line(f"planted faults found: {sum(faults.values())}/{len(faults)}")
    for name in sorted(name for name, found in faults.items() if not found):
        terminalreporter.line(f"planted fault missed: {name}", red=True)
    terminalreporter.line(f"tests skipped: {len(terminalreporter.stats.get('skipped', []))}")
