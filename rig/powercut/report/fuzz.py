"""What fuzzing found, for people and as JSON."""

from __future__ import annotations

from typing import Any

from powercut.report.text import count, verdict_word

SCHEMA = "powercut.fuzz/1"


def text(result: Any) -> str:
    """The result for people."""
    kinds = ", ".join(["writes", "flushes", "reopens", *(f"{kind}s" for kind in result.extra)])
    what = (
        f"{result.examples:,} of all {result.of:,} histories of up to {result.longest} operations"
        if result.of
        else f"{count(result.examples, 'recording')} of random histories, seed {result.seed}"
    )
    lines = [f"{verdict_word(str(result.verdict))}  {result.format}: {what} ({kinds}), {result.seconds:.1f} s"]
    if result.of:
        lines.append(f"  alphabet  {'; '.join(result.alphabet)}")
    unknown, held = sum(result.unknown.values()), f"{result.exhausted:,} exhausted and held"
    broken = result.examples - result.exhausted - unknown
    lines.append(f"  covered   {held}, {broken:,} broken (those of shrinking counted), {unknown:,} unknown")
    lines += [f"  because   {reason} ({number} times)" for reason, number in result.unknown.most_common(5)]
    if not result.of and not result.found:
        lines.append("  because   a sample is no proof: other histories were not tried")
    if result.of and result.examples < result.of:
        lines.append("  because   the time was up")
    for found in result.found:
        lines += ["", *_story(found)]
    return "\n".join(lines)


def _story(found: Any) -> list[str]:
    """A finding, the image and the history that lead to it."""
    scenario = found.scenario
    options = [f"{key}={value}" for key, value in scenario.options.items()]
    options += [f"backing {scenario.backing}"] if scenario.backing else []
    about = ", ".join([*options, f"size {scenario.size}", f"depth {scenario.workload.depth}"])
    lines = [f"  {found.text}", f"    image     {about}"]
    lines.append(f"    history   {'; '.join(scenario.workload.history)}")
    lines.append(f"    powercut gate {found.file}  # BROKEN in {found.confirmed} of {found.runs} runs")
    return [*lines, f"    {found.replay}"] if found.replay else lines


def shrunk(finding: str, result: Any) -> str:
    """What became of a recording that was shrunk (None: it did not break again), for people."""
    if result is None:
        return f"{finding}: what was recorded again did not break this rule in this way"
    left = count(len(result.found.scenario.workload.history), "operation")
    how = "none can be left out" if result.shortest else "the time was up"
    first = f"{finding}: {result.before:,} operations, now {left} ({how}; {count(result.recordings, 'recording')})"
    return "\n".join([first, *_story(result.found)])


def shrunk_document(finding: str, result: Any) -> dict[str, Any]:
    """The same as JSON, schema `powercut.shrink/1`."""
    return {
        "schema": "powercut.shrink/1",
        "finding": finding,
        "again": result is not None,
        "before": result and result.before,
        "history": result and list(result.found.scenario.workload.history),
        "shortest": result and result.shortest,
        "recordings": result and result.recordings,
        "scenario": result and str(result.found.file),
        "confirmed": result and result.found.confirmed,
        "of": result and result.found.runs,
        "replay": result and result.found.replay,
    }


def document(result: Any) -> dict[str, Any]:
    """The result as JSON, schema `powercut.fuzz/1`."""
    return {
        "schema": SCHEMA,
        "verdict": str(result.verdict),
        "format": result.format,
        "mode": "systematic" if result.of else "random",
        "seed": result.seed,
        "with": list(result.extra),
        "alphabet": list(result.alphabet),
        "longest": result.longest or None,
        "histories": result.of or None,
        "examples": result.examples,
        "exhausted": result.exhausted,
        "unknown": dict(result.unknown),
        "seconds": round(result.seconds, 2),
        "findings": [
            {
                "rule": found.way[0],
                "kind": found.way[1],
                "text": found.text,
                "operations": len(found.scenario.workload.history),
                "scenario": str(found.file),
                "confirmed": found.confirmed,
                "of": found.runs,
                "replay": found.replay,
            }
            for found in result.found
        ],
    }
