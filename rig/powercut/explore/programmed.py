"""A scenario of programs: files are made, one command is recorded, and all files are explored."""

from __future__ import annotations

import shlex
import subprocess
import tempfile
from pathlib import Path

from powercut.capture import program
from powercut.crash.options import Options, atom_of
from powercut.errors import EnvironmentFault, InputError
from powercut.explore.sets import SetOutcome, SetPlan, explore_set
from powercut.scenario import Exploration, Scenario

_PATIENCE = 120.0  # seconds that a command may take


def run(scenario: Scenario, trace: Path, jobs: int | None) -> SetOutcome:
    """Record the scenario's command into `trace`, and explore it. Raises InputError, EnvironmentFault."""
    assert scenario.program is not None
    with tempfile.TemporaryDirectory(prefix="powercut-") as scratch:
        for line in scenario.program.before:
            _do(line, scratch)
        words = shlex.split(scenario.program.command)
        program.capture(words, [scratch], trace, cwd=scratch, quiet=True)
    plan = SetPlan(
        str(trace),
        options_of(scenario.explore),
        scenario.explore.checker,
        scenario.program.image,
        scenario.explore.recovery_depth,
        scenario.explore.seed,
    )
    return explore_set(plan, budget=scenario.explore.budget, jobs=jobs)


def options_of(explore: Exploration) -> Options:
    """The choices of the fault model."""
    atom, whole = atom_of(str(explore.atom))
    return Options(
        atom, explore.lying_flushes, explore.directory, explore.sizes, whole, explore.order, explore.torn
    )  # fmt: skip


def _do(line: str, folder: str) -> None:
    """Run a command that makes the files."""
    words = shlex.split(line)
    try:
        subprocess.run(
            words, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, timeout=_PATIENCE, check=True, text=True
        )
    except FileNotFoundError:
        raise EnvironmentFault(f"{words[0]} was not found") from None
    except subprocess.TimeoutExpired:
        raise InputError(f"{line}: did not end within {_PATIENCE:.0f} s") from None
    except subprocess.CalledProcessError as error:
        raise InputError(f"{line}: exit status {error.returncode}: {' '.join(error.stderr.split())[:200]}") from None
