"""An exploration's outcome: saved findings, a JSON document, and text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import msgspec

from powercut.errors import InputError
from powercut.report.text import count, states, verdict_word

SCHEMA = "powercut.verdict/1"


class Finding(Protocol):
    """What is told of a finding (`powercut.crash.finding`)."""

    rule: str
    kind: str
    severity: str
    text: str
    seen: int
    position: int
    decisions: list[Any]
    others: str
    order: str
    fault: Any

    def save(self, path: Path) -> None: ...


@dataclass(frozen=True, slots=True)
class Saved:
    """A finding and the file it was saved in."""

    finding: Finding
    path: Path

    @property
    def replay(self) -> str:
        return f"powercut replay {self.path} --out crash.img"


def save(findings: list[Any], directory: Path) -> list[Saved]:
    """Save findings into `directory`, grouped by rule in their names; what an earlier run left there goes."""
    saved: list[Saved] = []
    try:
        for old in directory.glob("*.finding.json"):
            old.unlink()
        for finding in findings:
            directory.mkdir(parents=True, exist_ok=True)
            number = 1 + sum(s.finding.rule == finding.rule and s.finding.kind == finding.kind for s in saved)
            path = directory / f"{finding.rule}-{finding.kind}-{number}.finding.json"
            finding.save(path)
            saved.append(Saved(finding, path))
    except OSError as error:
        raise InputError(f"{directory}: findings cannot be saved: {error.strerror}") from None
    return saved


def document(outcome: Any, saved: list[Saved]) -> dict[str, Any]:
    """The outcome as JSON, schema `powercut.verdict/1`."""
    coverage = outcome.coverage
    return {
        "schema": SCHEMA,
        "verdict": str(outcome.verdict),
        "trace": outcome.plan.trace,
        "format": outcome.plan.format,
        "atom": outcome.plan.atom,
        "options": msgspec.to_builtins(outcome.plan.options),
        "rules": ["checker", "repairs"] if outcome.plan.checker else list(outcome.plan.rules),
        "checker": outcome.plan.checker,
        "recovery_depth": outcome.plan.recovery_depth if outcome.plan.checker else None,
        "scope": outcome.scope,
        "reasons": outcome.reasons,
        "coverage": {
            "epochs": coverage.epochs,
            "epochs_exhausted": coverage.epochs_exhausted,
            "undecided_atoms": coverage.undecided_atoms,
            "log2_states": round(coverage.log2_states, 1),
            "checks": coverage.checks,
            "runs": coverage.runs if outcome.plan.checker else None,
            "exhausted": coverage.exhausted,
            "sampled": sampled_document(coverage.sampled),
            "faults": {
                kind: {"laid": s.laid, "silent": s.silent, "noticed": s.noticed, "harmless": s.harmless}
                for kind, s in coverage.faults.items()
            },
        },
        "findings": [
            {
                "severity": item.finding.severity,
                "rule": item.finding.rule,
                "kind": item.finding.kind,
                "text": item.finding.text,
                "seen": item.finding.seen,
                "position": item.finding.position,
                "others": item.finding.others,
                "order": item.finding.order,
                "fault": msgspec.to_builtins(item.finding.fault),
                "decisions": msgspec.to_builtins(item.finding.decisions),
                "file": str(item.path),
                "replay": item.replay,
            }
            for item in saved
        ],
    }


def sampled_document(sample: Any) -> dict[str, Any] | None:
    """What was looked at where the budget did not suffice, as JSON."""
    if sample is None:
        return None
    ways = {way: {"done": done, "of": sample.of[way] or None} for way, done in sample.done.items()}
    return {"epochs": sample.epochs, "seed": sample.seed, "ways": ways}


def covered(coverage: Any) -> str:
    """One line of coverage."""
    how = "exhausted" if coverage.exhausted else f"{coverage.epochs_exhausted:,} exhausted"
    return (
        f"{count(coverage.epochs, 'epoch')} ({how}), {count(coverage.undecided_atoms, 'undecided atom')}, "
        f"{states(coverage.log2_states)} crash states, {count(coverage.checks, 'check')}"
    )


def sampled(sample: Any) -> str:
    """What was looked at where the budget did not suffice."""
    ways = [f"{way} {done:,}{f' of {sample.of[way]:,}' if sample.of[way] else ''}" for way, done in sample.done.items()]
    return f"{count(sample.epochs, 'epoch')} that the budget did not exhaust: {', '.join(ways)} (seed {sample.seed})"


def text(outcome: Any, saved: list[Saved], seconds: float) -> str:
    """The outcome for people."""
    plan = outcome.plan
    lines = [f"{verdict_word(str(outcome.verdict))}  {plan.trace}: {plan.format}, {plan.options}"]
    lines.append(f"  covered  {covered(outcome.coverage)}, {seconds:.1f} s")
    if plan.checker:
        runs = count(outcome.coverage.runs, "time")
        lines.append(f"  checker  {plan.checker}, run {runs}, crashes inside what it writes {plan.recovery_depth} deep")
    else:
        lines.append(f"  rules    {', '.join(plan.rules)}")
    if outcome.coverage.sampled is not None:
        lines.append(f"  sampled  {sampled(outcome.coverage.sampled)}")
    for kind, s in outcome.coverage.faults.items():
        fates = f"{s.silent} silent, {s.noticed} noticed, {s.harmless} harmless"
        lines.append(f"  media    {kind}: {s.laid} laid, {fates}")
    if outcome.scope != "overlap":
        lines.append(f"  scope    {outcome.scope}: requests in flight at the same time were not recorded as such")
    lines += [f"  because  {reason}" for reason in outcome.reasons]
    for item in saved:
        finding = item.finding
        also = f" (and {finding.seen - 1:,} more like it)" if finding.seen > 1 else ""
        lines += ["", f"  {finding.severity} ({finding.rule}): {finding.text}{also}"]
        if finding.fault is not None:
            lines.append(f"    {finding.fault}")
        lines.append(f"    crash before position {finding.position:,} of the trace, where")
        for decision in finding.decisions:
            fate = "lost    " if decision.lost else "survived"
            lines.append(f"    {fate}  {decision.role}, at {decision.offset:#x}: {decision.write}")
        lines.append(f"    {finding.others:8}  everything else in flight")
        if finding.order:
            lines.append(f"    so: {finding.order}")
        lines.append(f"    {item.replay}")
    return "\n".join(lines)
