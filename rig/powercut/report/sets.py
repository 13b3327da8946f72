"""An exploration of several files: a JSON document, and text."""

from __future__ import annotations

from typing import Any

import msgspec

from powercut.report.outcome import Saved, sampled, sampled_document
from powercut.report.text import count, states, verdict_word

SCHEMA = "powercut.set-verdict/1"


def document(outcome: Any, saved: list[Saved]) -> dict[str, Any]:
    """The outcome as JSON, schema `powercut.set-verdict/1`."""
    plan, found = outcome.plan, outcome.found
    return {
        "schema": SCHEMA,
        "verdict": str(outcome.verdict),
        "trace": plan.trace,
        "options": msgspec.to_builtins(plan.options),
        "checker": plan.checker,
        "recovery_depth": plan.recovery_depth,
        "judged": outcome.judged,
        "scope": outcome.scope,
        "reasons": outcome.reasons,
        "coverage": {
            "epochs": found.epochs,
            "epochs_exhausted": found.exhausted,
            "epochs_without_promise": outcome.unjudged,
            "undecided": found.undecided,
            "log2_states": round(found.log2_states, 1),
            "checks": found.checks,
            "runs": outcome.runs,
            "sampled": sampled_document(found.sampled),
        },
        "findings": [
            msgspec.to_builtins(item.finding, builtin_types=(bytes,))
            | {"patches": len(item.finding.patches), "file": str(item.path), "replay": replay(item)}  # type: ignore[attr-defined]
            for item in saved
        ],
    }


def replay(item: Saved) -> str:
    """The command that brings the state back."""
    return f"powercut replay {item.path} --out crashed/"


def text(outcome: Any, saved: list[Saved], seconds: float) -> str:
    """The outcome for people."""
    plan, found = outcome.plan, outcome.found
    lines = [f"{verdict_word(str(outcome.verdict))}  {plan.trace}: all files, {plan.options}"]
    if not found.epochs:
        how = "none to judge"
    else:
        how = "exhausted" if found.epochs == found.exhausted else f"{found.exhausted:,} exhausted"
    lines.append(
        f"  covered  {count(found.epochs, 'epoch')} ({how}), {found.undecided:,} undecided names, sizes and atoms, "
        f"{states(found.log2_states)} crash states, {count(found.checks, 'check')}, {seconds:.1f} s"
    )
    if outcome.unjudged:
        lines.append(f"           {count(outcome.unjudged, 'earlier epoch')} at which nothing is promised yet")
    lines += [f"  judged   {what}" for what in outcome.judged]
    lines.append(
        f"  programs run {count(outcome.runs, 'time')}, crashes inside what they write {plan.recovery_depth} deep"
    )
    if found.sampled is not None:
        lines.append(f"  sampled  {sampled(found.sampled)}")
    if outcome.scope != "overlap":
        lines.append(f"  scope    {outcome.scope}: requests in flight at the same time were not recorded as such")
    lines += [f"  because  {reason}" for reason in outcome.reasons]
    for item in saved:
        finding: Any = item.finding
        lines += ["", f"  {finding.severity} ({finding.rule}): {finding.text}"]
        lines.append(f"    crash before position {finding.position:,} of the trace, where")
        for decided, end in finding.stretches:
            fate = "lost    " if decided.lost else "survived"
            where = f" at {decided.offset:#x}" if decided.what == "content" else ""
            to = f" to {end:#x}" if end > decided.offset else ""
            level = f", in recovery {decided.level}" if decided.level else ""
            later = ", nothing later" if finding.others == "survived" and not (decided.lost or decided.level) else ""
            lines.append(f"    {fate}  {decided.what} of {decided.file}{where}{to}: {decided.write}{level}{later}")
        lines.append(f"    {finding.others:8}  everything else in flight")
        if finding.order:
            lines.append(f"    so: {finding.order}")
        lines.append(f"    {replay(item)}")
    return "\n".join(lines)
