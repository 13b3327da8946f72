"""What came of loops, as text and as a document."""

from __future__ import annotations

from collections import Counter
from typing import Any

import msgspec

from powercut.report.text import count, states, verdict_word

_SHOWN = 5


def title(outcome: Any) -> str:
    """Beside the bar: how fast, how many failed, and what that proves so far."""
    return f"{outcome.rate:.1f} loops/s, {count(len(outcome.failures), 'failure')}, rate below {outcome.bound_text}"


def text(outcome: Any) -> str:
    """The result for people."""
    scenario, plan = outcome.scenario, outcome.scenario.loop
    options = [f"{key}={value}" for key, value in scenario.options.items()]
    what = ", ".join([scenario.format, f"ending {plan.ending}", *options])
    lines = [f"{verdict_word(outcome.word)}  {what}: {outcome.proves}"]
    done = outcome.operations
    lines.append(
        f"  covered   {count(outcome.loops, 'loop')}, {done['issued']:,} changes of the guest's issued, "
        f"{done['completed']:,} completed, {done['flushed']:,} flushed, {outcome.seconds:.1f} s, "
        f"{outcome.rate:.1f} loops/s"
    )
    if outcome.checks:
        recordings = count(len(outcome.states) * plan.disks, "recording")
        most = states(max(outcome.states))
        lines.append(
            f"  explored  {recordings} to the end, of up to {most} crash states a loop, in {outcome.checks:,} checks"
        )
    images = "a new image each" if plan.fresh or plan.filesystem or outcome.checks else "images used again"
    disks = f"{count(plan.disks, plan.device + ' disk')} of {scenario.size}"
    if plan.disk is not None:
        disks = f"an overlay on {plan.disk} as {plan.device} disk"
    lines.append(f"  guests    {'boot' if plan.disk else plan.start}, {disks}, cache {plan.cache}, {images}")
    lines.append(f"  machine   QEMU {outcome.qemu}, {_accelerator(outcome)}, kernel {outcome.kernel}")
    if outcome.host:
        lines.append(f"  images    {outcome.host}")
    reasons = Counter(failure.cycled.unknown for failure in outcome.unknown)
    lines += [f"  unknown   {reason} ({count(number, 'loop')})" for reason, number in reasons.most_common(_SHOWN)]
    for failure in outcome.failures[:_SHOWN]:
        lines += ["", f"  loop {failure.cycled.number}"]
        lines += [f"    {problem.severity.label} ({problem.rule}): {problem.text}" for problem in _worst(failure)]
        lines += [f"    {failure.replay}"] if failure.folder else []
    if len(outcome.failures) > _SHOWN:
        lines.append(f"  and {count(len(outcome.failures) - _SHOWN, 'more failing loop')}")
    for failure in outcome.unknown[:1]:
        lines += [f"  {failure.replay}"] if failure.folder else []
    return "\n".join(lines)


def cells(outcome: Any) -> dict[str, str]:
    """Lines for a table that compares."""
    failed = f"{len(outcome.failures):,} of {outcome.loops:,} loops failed, rate below {outcome.bound_text}"
    return {"verdict": outcome.word, f"ending {outcome.scenario.loop.ending}": failed}


def _accelerator(outcome: Any) -> str:
    name, why = outcome.accelerator
    return f"{name} ({why})" if why else str(name)


def _worst(failure: Any) -> list[Any]:
    return sorted(failure.cycled.problems, key=lambda problem: -problem.severity)[:_SHOWN]


def document(outcome: Any, schema: str) -> dict[str, Any]:
    """The result as JSON, schema `powercut.loop/1`."""
    return {
        "schema": schema,
        "verdict": outcome.word,
        "loops": outcome.loops,
        "failures": len(outcome.failures),
        "unknown": len(outcome.unknown),
        "proves": outcome.proves,
        "bound": outcome.bound,
        "seconds": round(outcome.seconds, 2),
        "operations": dict(outcome.operations),
        "log2_states": max(outcome.states, default=0.0),
        "checks": outcome.checks,
        "qemu": outcome.qemu,
        "accelerator": {"name": outcome.accelerator.name, "why": outcome.accelerator.why},
        "kernel": outcome.kernel,
        "host": outcome.host,
        "scenario": msgspec.to_builtins(outcome.scenario),
        "failed": [_failure(failure) for failure in outcome.failures + outcome.unknown],
    }


def _failure(failure: Any) -> dict[str, Any]:
    cycled = failure.cycled
    return {
        "loop": cycled.number,
        "unknown": cycled.unknown,
        "problems": [
            {"rule": p.rule, "kind": p.kind, "where": p.where, "severity": p.severity.label, "text": p.text}
            for p in cycled.problems
        ],
        "folder": str(failure.folder) if failure.folder else None,
        "replay": failure.replay if failure.folder else None,
    }
