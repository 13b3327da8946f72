"""The gate: every scenario is run, and what comes out is held against what it expects."""

from __future__ import annotations

import shlex
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import click

from powercut import endings, formats
from powercut.crash.options import atom_of
from powercut.defects import modelloop
from powercut.errors import EnvironmentFault, InputError, PowercutError
from powercut.explore import programmed, run
from powercut.explore.run import Outcome
from powercut.explore.session import Plan
from powercut.faults import sweep
from powercut.formats.quire import prove
from powercut.guest.daemon import version
from powercut.loops import loop as looping
from powercut.recording import operations, record
from powercut.report import errors as errors_report
from powercut.report import loop as loop_reports
from powercut.report import modelloop as model_reports
from powercut.report import outcome as reports
from powercut.report import sets as set_reports
from powercut.report import stores as store_reports
from powercut.report.text import progress, states
from powercut.scenario import Scenario, load
from powercut.verdict import Verdict

SCHEMA = "powercut.gate/1"


class Told(NamedTuple):
    """What a scenario that explores no trace came to: its verdict, what it covered (for the table), as JSON, and lines
    for people: what shows a finding again, or what happened."""

    verdict: str
    covered: str
    document: dict[str, Any]
    lines: str = ""


@dataclass(slots=True)
class Result:
    """One scenario's result. `state`: "expected", "unexpected", "unknown", "skipped"; `why` in words. Either a trace
    was explored (`outcome`), or something else was done (`told`)."""

    name: str
    scenario: Scenario
    state: str
    why: str = ""
    outcome: Outcome | None = None
    saved: list[reports.Saved] | None = None
    looped: looping.Outcome | None = None  # in place of `outcome`, where a scenario is of loops
    seconds: float = 0.0
    told: Told | None = None


def shipped() -> Path:
    """The folder of scenarios: the one in the working directory, else the one that came with powercut."""
    here = Path("scenarios")
    packaged = Path(__file__).parent / "_data" / "scenarios"
    checkout = Path(__file__).parents[2] / "scenarios"
    return next((folder for folder in (here, packaged, checkout) if folder.is_dir()), here)


def collect(paths: Sequence[Path]) -> list[Path]:
    """The scenario files that `paths` (files or folders) name. Raises InputError if there is none."""
    files: list[Path] = []
    for path in paths or [shipped()]:
        files += sorted(path.glob("*.toml")) if path.is_dir() else [path]
    if not files:
        raise InputError(f"no scenarios in {', '.join(map(str, paths or [shipped()]))}: nothing was run")
    return files


def run_all(
    paths: Sequence[Path], jobs: int | None, save: Path, *, full: bool = False, quiet: bool = False
) -> list[Result]:
    """Run every scenario, printing a line for each unless `quiet`. `full`: all the loops that they ask for.

    Raises InputError for a bad scenario file, before any is run.
    """
    scenarios = [(file, _load(file)) for file in collect(paths)]
    width = max(len(scenario.name) for _, scenario in scenarios)
    try:
        qemu: str | None = version()
    except EnvironmentFault as fault:
        qemu = None
        click.echo(f"powercut: {fault}; scenarios that record are skipped", err=True)
    results = []
    if not quiet:
        click.echo(
            f"{'scenario':{width}}  {'expect':7} {'result':7} {'epochs':>6} {'states':>10} {'checks':>7} {'time':>7}"
        )
    for file, scenario in scenarios:
        begin = time.monotonic()
        if qemu is None and scenario.trace is None and not _without_qemu(scenario):
            result = Result(scenario.name, scenario, "skipped", "no QEMU")
        else:
            try:
                result = (
                    _run_loops(scenario, jobs, save, full)
                    if scenario.loop is not None
                    else _run(file, scenario, qemu or "", jobs, save)
                )
            except PowercutError as error:
                result = Result(scenario.name, scenario, "unknown", str(error))
        result.seconds = time.monotonic() - begin
        results.append(result)
        if not quiet:
            click.echo(_line(result, width))
    if not quiet:
        click.echo(summary(results, qemu))
    return results


def _load(file: Path) -> Scenario:
    scenario = load(file)
    try:
        if scenario.model is not None:
            modelloop.Loops(scenario)
        elif scenario.loop is not None:
            endings.find(scenario.loop.ending)
        elif scenario.errors is not None:
            sweep.prepared(scenario)
        elif scenario.quire is not None:
            prove.check(scenario)
        elif scenario.program is not None:
            if not shlex.split(scenario.program.command):
                raise InputError("program.command is empty")
        else:
            formats.find(scenario.format)
            operations.operations(scenario)
    except InputError as error:
        raise InputError(f"{file}: {error}") from None
    return scenario


def _run(file: Path, scenario: Scenario, qemu: str, jobs: int | None, save: Path) -> Result:
    if scenario.errors is not None:
        return _swept(scenario, qemu, jobs, save)
    if scenario.model is not None:
        return _modelled(scenario)
    if scenario.quire is not None:
        return _proved(scenario, qemu, jobs)
    if scenario.program is not None:
        return _programmed(scenario, qemu, jobs, save)
    with tempfile.TemporaryDirectory(prefix="powercut-") as scratch:
        if scenario.trace is not None:
            trace = file.parent / scenario.trace
        else:
            trace = Path(scratch) / f"{scenario.name}.trace"
            with progress(f"recording {scenario.name}") as show:
                record.record(scenario, trace, show)
        plan = plan_of(scenario, trace)
        with progress(f"exploring {scenario.name}") as show:
            outcome = run.explore_trace(plan, budget=scenario.explore.budget, jobs=jobs, progress=show)
        result = _judged(scenario, outcome, qemu)
        if result.state in ("unexpected", "unknown"):  # keep what a person needs to look into it
            save.mkdir(parents=True, exist_ok=True)
            kept = save / f"{scenario.name}.trace"
            shutil.copyfile(trace, kept)
            for i, finding in enumerate(outcome.findings):
                outcome.findings[i] = finding.of_trace(str(kept))
            result.saved = reports.save(outcome.findings, save / f"{scenario.name}.findings")
        return result


def _run_loops(scenario: Scenario, jobs: int | None, save: Path, full: bool) -> Result:
    """Run a scenario of loops: as many as it asks for, or only a few. Without a guest it is skipped."""
    assert scenario.loop is not None
    try:
        loops = looping.Loops(scenario)
    except EnvironmentFault as fault:
        return Result(scenario.name, scenario, "skipped", str(fault))
    number = scenario.loop.loops if full else min(scenario.loop.loops, scenario.loop.quick or scenario.loop.loops)
    with progress(lambda: f"{scenario.name}: {loop_reports.title(loops.outcome)}") as show:
        outcome = loops.run(
            loops=number, jobs=jobs, save=save / scenario.name, progress=lambda so_far, of: show(so_far.loops, of)
        )
    state = "unknown" if outcome.word == "UNKNOWN" else "expected" if outcome.word == scenario.expect else "unexpected"
    why = [outcome.proves, *(failure.replay for failure in outcome.failures[:1] if failure.folder)]
    return Result(scenario.name, scenario, state, "; ".join(why), looped=outcome)


def _swept(scenario: Scenario, qemu: str, jobs: int | None, save: Path) -> Result:
    """Errors below the format, one in each run. Where there can be no guest, or no full disk, it is skipped."""
    try:
        with progress(f"failing {scenario.name}") as show:
            swept = sweep.run(scenario, jobs=jobs or 1, progress=show)
    except EnvironmentFault as fault:
        return Result(scenario.name, scenario, "skipped", str(fault))
    why = ", ".join(sorted({f"{found.fault.severity.label} ({found.way[0]})" for found in swept.found}))
    rules = {found.way[0] for found in swept.found}
    result = _judge(scenario, swept.verdict, rules, why, swept.reasons, qemu)
    saved = sweep.save(swept, save / scenario.name) if result.state != "expected" else []
    replay = f"powercut gate {saved[0]}" if saved else ""
    result.told = Told(str(swept.verdict), f"{swept.runs:,} runs", errors_report.one(swept, saved), replay)
    return result


def _programmed(scenario: Scenario, qemu: str, jobs: int | None, save: Path) -> Result:
    """A program recorded, and all its files explored. Without FUSE or a recorder it is skipped."""
    with tempfile.TemporaryDirectory(prefix="powercut-") as scratch:
        trace = Path(scratch) / f"{scenario.name}.trace"
        try:
            with progress(f"exploring {scenario.name}"):
                outcome = programmed.run(scenario, trace, jobs)
        except EnvironmentFault as fault:
            return Result(scenario.name, scenario, "skipped", str(fault))
        why = ", ".join(sorted({f"{finding.severity} ({finding.rule})" for finding in outcome.findings}))
        rules = {finding.rule for finding in outcome.findings}
        result = _judge(scenario, outcome.verdict, rules, why, outcome.reasons, qemu)
        saved: list[reports.Saved] = []
        if result.state != "expected":
            save.mkdir(parents=True, exist_ok=True)
            kept = shutil.copy(trace, save)
            findings = [finding.of_trace(str(kept)) for finding in outcome.findings]
            saved = reports.save(findings, save / f"{scenario.name}.findings")
    found = outcome.found
    numbers = f"{found.epochs:>6,} {states(found.log2_states):>10} {found.checks:>7,}"
    more = "".join(set_reports.replay(one) for one in saved[:1])
    result.told = Told(str(outcome.verdict), numbers, set_reports.document(outcome, saved), more)
    return result


def _without_qemu(scenario: Scenario) -> bool:
    """Whether everything in it is ours: the guest, the driver and the disk."""
    return scenario.quire is not None or (scenario.model is not None and scenario.model.guest == "client")


def _modelled(scenario: Scenario) -> Result:
    """Loops on the model of the driver. Where a real guest is wanted and there is none it is skipped."""
    try:
        with progress(scenario.name) as show:
            outcome = modelloop.Loops(scenario).run(show)
    except EnvironmentFault as fault:
        return Result(scenario.name, scenario, "skipped", str(fault))
    as_expected = outcome.word == scenario.expect and scenario.rule in (None, *outcome.rules)
    told = Told(outcome.word, f"{outcome.loops} loops", model_reports.document(outcome), model_reports.text(outcome))
    state = "expected" if as_expected else "unexpected"
    return Result(scenario.name, scenario, state, outcome.why, told=told)


def _proved(scenario: Scenario, qemu: str, jobs: int | None) -> Result:
    """Our own format, judged by its promises."""
    with progress(f"exploring {scenario.name}"):
        proof = prove.prove(scenario, jobs)
    why = ", ".join(sorted({f"{found.problem.severity.label} ({found.problem.rule})" for found in proof.findings}))
    result = _judge(scenario, proof.verdict, {found.problem.rule for found in proof.findings}, why, proof.reasons, qemu)
    found = [(one.problem, str(one)) for one in proof.findings]
    covered = f"{proof.epochs:>6,} {states(proof.log2_states):>10} {proof.checks:>7,}"
    document = store_reports.document(str(proof.verdict), proof.coverage, found, proof.reasons)
    lines = str(proof.findings[0]) if proof.findings and result.state != "expected" else ""
    result.told = Told(str(proof.verdict), covered, document, lines)
    return result


def plan_of(scenario: Scenario, trace: Path) -> Plan:
    """How a scenario wants its trace explored."""
    explore = scenario.explore
    atom, whole = atom_of(str(explore.atom))
    plan = Plan(
        str(trace),
        scenario.format,
        atom,
        explore.rules,
        checker=explore.checker,
        recovery_depth=explore.recovery_depth,
        lying=explore.lying_flushes,
        seed=explore.seed,
        whole=whole,
        order=explore.order,
        torn=explore.torn,
    )
    return run.with_faults(plan, explore.media, explore.faults, explore.seed)


def _judged(scenario: Scenario, outcome: Outcome, qemu: str) -> Result:
    """Whether a trace's outcome is what the scenario expects."""
    rules = {finding.rule for finding in outcome.findings}
    why = ", ".join(sorted({f"{finding.severity} ({finding.rule})" for finding in outcome.findings}))
    result = _judge(scenario, outcome.verdict, rules, why, outcome.reasons, qemu)
    result.outcome = outcome
    return result


def _judge(
    scenario: Scenario, verdict: Verdict, rules: set[str], why: str, reasons: Sequence[str], qemu: str
) -> Result:
    """Whether a verdict, and the rules that were broken, are what the scenario expects."""
    if verdict is Verdict.UNKNOWN:
        return Result(scenario.name, scenario, "unknown", "; ".join(reasons))
    if scenario.qemu and not any(qemu == known or qemu.startswith(f"{known}.") for known in scenario.qemu):
        return Result(scenario.name, scenario, "expected", f"first seen with QEMU {qemu}; {why}".rstrip("; "))
    as_expected = verdict == scenario.expect and (scenario.rule is None or scenario.rule in rules)
    return Result(scenario.name, scenario, "expected" if as_expected else "unexpected", why)


def _line(result: Result, width: int) -> str:
    got, numbers, more = _got(result), "", [saved.replay for saved in (result.saved or [])[:1]]
    if result.outcome:
        coverage = result.outcome.coverage
        numbers = f"{coverage.epochs:>6,} {states(coverage.log2_states):>10} {coverage.checks:>7,}"
    elif result.told:
        numbers, more = result.told.covered, result.told.lines.splitlines()
    elif result.looped:
        numbers = f"{result.looped.loops:,} loops"
    line = f"{result.name:{width}}  {result.scenario.expect:7} {got:7} {numbers:>25} {result.seconds:>5.1f} s"
    if result.state != "expected":
        line += f"  {result.state.upper()}"
    if result.why:
        line += f"  {result.why}"
    return "\n    ".join([line, *more])


def summary(results: list[Result], qemu: str | None) -> str:
    """The closing line."""
    counts = {
        state: sum(result.state == state for result in results)
        for state in ("expected", "unexpected", "unknown", "skipped")
    }
    said = ", ".join(
        f"{number} {'as expected' if state == 'expected' else state}" for state, number in counts.items() if number
    )
    return f"{len(results)} scenarios: {said} (QEMU {qemu or 'not found'})"


def exit_code(results: list[Result]) -> int:
    """1 if any result was unexpected, else 3 if any was UNKNOWN or skipped, else 0."""
    if any(result.state == "unexpected" for result in results):
        return 1
    return 3 if any(result.state in ("unknown", "skipped") for result in results) else 0


def _got(result: Result) -> str:
    """The verdict, or that there is none."""
    if result.outcome:
        return str(result.outcome.verdict)
    return result.looped.word if result.looped else result.told.verdict if result.told else result.state


def verdict_code(results: list[Result]) -> int:
    """Whatever was expected: 1 if anything is BROKEN, else 3 if anything is not known, else 0."""
    words = {_got(result) for result in results}
    return 1 if Verdict.BROKEN in words else 0 if words <= {Verdict.HOLDS, "CLEAN"} else 3


def cells(results: list[Result]) -> dict[str, str]:
    """Lines for a table that compares: each scenario's verdict, and what is wrong."""
    return {result.name: f"{_got(result)}{' ' * bool(result.why)}{result.why}" for result in results}


def document(results: list[Result]) -> dict[str, Any]:
    """The results as JSON, schema `powercut.gate/1`."""
    return {
        "schema": SCHEMA,
        "exit_code": exit_code(results),
        "results": [
            {
                "name": result.name,
                "state": result.state,
                "expect": result.scenario.expect,
                "why": result.why,
                "seconds": round(result.seconds, 2),
                "outcome": _outcome(result),
                "loops": loop_reports.document(result.looped, looping.SCHEMA) if result.looped else None,
            }
            for result in results
        ],
    }


def _outcome(result: Result) -> dict[str, Any] | None:
    if result.outcome:
        return reports.document(result.outcome, result.saved or [])
    return result.told.document if result.told else None
