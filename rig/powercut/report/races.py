"""What `powercut races` found: bundles that can be run again, a JSON document, and text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from powercut.errors import InputError
from powercut.report.text import count, verdict_word
from powercut.verdict import Verdict

SCHEMA = "powercut.race/1"


class Hold(msgspec.Struct, forbid_unknown_fields=True):
    """Host request number `request` since operation `operation` was issued (both from 1) is held until before
    operation `until` is issued; one more than there are means: until the end. `what`: the request in words."""

    operation: int
    request: int
    until: int
    what: str = ""


class Bundle(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """One case that went wrong, and how. `seen`: in how many of `of` runs. `requests`: all host requests, in the
    order in which they came, as OPERATION.REQUEST and words. `tools`: what QEMU's own say of the image it left."""

    schema: str = SCHEMA
    powercut: str
    qemu: str
    format: str
    options: dict[str, str]
    start: str
    history: list[str]
    holds: list[Hold]
    kind: str
    faults: list[str]
    seen: int
    of: int
    lie: str | None = None
    overlap: bool = False
    requests: list[str] = []
    tools: list[str] = []


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a search concluded. `seen`: in how many cases each kind of fault was seen."""

    verdict: Verdict
    plan: dict[str, Any]
    qemu: str
    coverage: dict[str, int]
    seen: dict[str, int]
    findings: list[Bundle]
    reasons: list[str]
    seconds: float


def load(path: Path) -> Bundle:
    """Read a bundle. Raises InputError."""
    try:
        bundle = msgspec.json.decode(path.read_bytes(), type=Bundle)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: {error}") from None
    if bundle.schema != SCHEMA:
        raise InputError(f"{path}: schema {bundle.schema!r} is not {SCHEMA}")
    return bundle


def save(outcome: Outcome, directory: Path) -> list[Path]:
    """Write each finding into `directory`; what an earlier run left there goes."""
    paths = []
    try:
        for old in directory.glob("*.race.json"):
            old.unlink()
        for number, bundle in enumerate(outcome.findings, 1):
            directory.mkdir(parents=True, exist_ok=True)
            path = directory / f"{bundle.kind}-{number}.race.json"
            path.write_bytes(msgspec.json.format(msgspec.json.encode(bundle), indent=2) + b"\n")
            paths.append(path)
    except OSError as error:
        raise InputError(f"{directory}: findings cannot be saved: {error.strerror}") from None
    return paths


def document(outcome: Outcome, paths: list[Path]) -> dict[str, Any]:
    """The outcome as JSON, schema `powercut.races/1`."""
    return {
        "schema": "powercut.races/1",
        "verdict": str(outcome.verdict),
        "qemu": outcome.qemu,
        "plan": outcome.plan,
        "reasons": outcome.reasons,
        "coverage": outcome.coverage,
        "seconds": round(outcome.seconds, 1),
        "faults": outcome.seen,
        "findings": [
            msgspec.to_builtins(bundle) | {"file": str(path)}
            for bundle, path in zip(outcome.findings, paths, strict=True)
        ],
    }


def _story(bundle: Bundle) -> list[str]:
    """A finding's history, line by line, with what was held."""
    lines = []
    for number, operation in enumerate(bundle.history, 1):
        lines += [f"      let go:  request {h.operation}.{h.request}" for h in bundle.holds if h.until == number]
        lines.append(f"      {number}  {operation}")
        lines += [f"      held:    {h.what} ({h.operation}.{h.request})" for h in bundle.holds if h.operation == number]
    return lines


def text(outcome: Outcome, paths: list[Path]) -> str:
    """The outcome for people."""
    plan, covered = outcome.plan, outcome.coverage
    options = "".join(f", {key}={value}" for key, value in plan["options"].items())
    rate = covered["cases"] / max(outcome.seconds, 0.001)
    lines = [
        f"{verdict_word(str(outcome.verdict))}  {plan['format']}{options}: requests in flight, QEMU {outcome.qemu}",
        f"  covered  {count(covered['histories'], 'history').replace('historys', 'histories')} of up to "
        f"{plan['length']} operations out of {len(plan['alphabet'])} from {len(plan['starts'])} starts, "
        f"{count(plan['holds'], 'request')} held at once; {covered['random']:,} random",
        f"  cases    {covered['cases']:,} in {outcome.seconds:.1f} s ({rate:,.0f} per second); in "
        f"{covered['held']:,} operations were issued past a held request, in {covered['overtaken']:,} of them answered "
        f"(in {covered['driver_waits']:,} the driver waited); {covered['pointless']:,} cut short",
        f"  reads    {covered['reads']:,} of the guest judged, and the whole disk after each case, twice",
    ]
    lines += [f"  because  {reason}" for reason in outcome.reasons]
    lines += [f"  fault    {kind}: in {count(number, 'case')}" for kind, number in sorted(outcome.seen.items())]
    for bundle, path in zip(outcome.findings, paths, strict=True):
        lines += ["", f"  {bundle.kind}, start {bundle.start}, seen in {bundle.seen} of {bundle.of} runs:"]
        lines += [*_story(bundle), *(f"    {fault}" for fault in [*bundle.faults, *bundle.tools])]
        lines.append(f"    powercut races --replay {path}")
    return "\n".join(lines)


def replayed(bundle: Bundle, path: Path, seen: int, tries: int, tools: list[str]) -> str:
    """What running a bundle again showed; `tools`: what QEMU's own say of the image it left."""
    again = "happens again" if seen else "does not happen again"
    lines = [f"{path}: {bundle.kind} {again}: in {seen} of {tries} runs", *_story(bundle)]
    return "\n".join([*lines, *(f"    {line}" for line in tools)])
