"""What `powercut errors` found: scenarios and images, a JSON document, and text."""

from __future__ import annotations

from itertools import zip_longest
from pathlib import Path
from typing import Any

from powercut.report.text import count, verdict_word

SCHEMA = "powercut.errors/1"
_SHOWN = 3  # injections named in a line of text


def _lasting(way: tuple[str, str, str, str]) -> str:
    _, _, error, lasting = way
    return {"": "without any error", "once": f"{error} once", "good": f"{error} for good"}[lasting]


def _image(target: Any) -> str:
    options = "".join(f", {key}={value}" for key, value in target.all_options.items())
    return f"{target.format}{options}{', with a backing file' if target.backing else ''}"


def text(result: Any, saved: list[Path]) -> str:
    """One format's result for people."""
    events = ", ".join(f"{name} {number}" for name, number in result.events.items())
    werror = result.scenario.errors and result.scenario.errors.werror
    stopped = f" (in {result.stopped:,} its machine was stopped; werror={werror})" if werror else ""
    lines = [
        f"{verdict_word(str(result.verdict))}  {_image(result.target)}: errors below the format, QEMU {result.qemu}",
        f"  history  {'; '.join(result.lines)}",
        f"  covered  {count(result.runs, 'run')}, one error in each, {result.seconds:.1f} s: {events}",
        f"  seen     in {result.absorbed:,} runs the guest saw no error{stopped}; {result.leaking:,} leaked clusters",
    ]
    lines += [f"  because  {reason}" for reason in result.reasons]
    for found, path in zip(result.found, saved, strict=True):
        shown = ", ".join(point.partition(" at ")[2] for point in found.points[:_SHOWN])
        more = f" and {len(found.points) - _SHOWN} more" if len(found.points) > _SHOWN else ""
        lines += ["", f"  {found.fault.severity.label} ({found.way[0]}): {found.fault.text}"]
        lines.append(f"    {_lasting(found.way)}, {count(len(found.points) or 1, 'run')}: at {shown}{more}")
        lines += [f"    {line}" for line in story(found)]
        if found.lies_at is not None:
            lines.append(f"    its data is in the file, at {found.lies_at:#x}, and nothing leads there")
        witness = f"; {found.witness} agrees" if found.witness else ""
        lines.append(f"    powercut gate {path}  # BROKEN in {found.confirmed} of {found.of} runs{witness}")
    return "\n".join(lines)


def story(found: Any) -> list[str]:
    """The shortest case, operation by operation, and how each ended, repetitions in the order in which they came."""
    ends: dict[int, list[str]] = {}
    for word in found.ran.seen.story:
        number, _, end = word.partition(" ")
        ends.setdefault(int(number), []).append(end)
    lines = [f"{number}  {line}: {', '.join(ends.get(number, []))}" for number, line in enumerate(found.lines, 1)]
    last = len(found.lines) + 1
    if last in ends:
        lines.append(f"{last}  flush: {', '.join(ends[last])}")
    return [f"{found.case.failure}", *lines] if found.case.failure else lines


def cells(results: list[Any]) -> dict[str, str]:
    """Lines for a table that compares: each format's verdict, and each way in which things went wrong."""
    lines = {}
    for result in results:
        lines[result.target.format] = str(result.verdict)
        for found in result.found:
            name = f"{result.target.format}: {found.way[0]} {found.way[1]}, {_lasting(found.way)}"
            lines[name] = count(len(found.points) or 1, "run")
    return lines


def document(results: list[tuple[Any, list[Path]]]) -> dict[str, Any]:
    """The results as JSON, schema `powercut.errors/1`."""
    return {"schema": SCHEMA, "results": [one(result, saved) for result, saved in results]}


def one(result: Any, saved: list[Path]) -> dict[str, Any]:
    """One format's result. Findings that were not saved name no scenario."""
    return {
        "verdict": str(result.verdict),
        "qemu": result.qemu,
        "format": result.target.format,
        "options": result.target.all_options,
        "size": result.target.size,
        "backing": result.target.backing or None,
        "history": result.lines,
        "events": result.events,
        "runs": result.runs,
        "absorbed": result.absorbed,
        "stopped": result.stopped,
        "leaking": result.leaking,
        "reasons": result.reasons,
        "seconds": round(result.seconds, 1),
        "findings": [
            {
                "rule": found.way[0],
                "kind": found.way[1],
                "error": found.way[2],
                "lasting": found.way[3],
                "severity": found.fault.severity.label,
                "text": found.fault.text,
                "points": found.points,
                "injection": str(found.case.failure or ""),
                "story": story(found),
                "confirmed": found.confirmed,
                "of": found.of,
                "witness": found.witness,
                "lies_at": found.lies_at,
                "scenario": str(path) if path else None,
            }
            for found, path in zip_longest(result.found, saved)
        ],
    }
