"""What a trace holds, for people and as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np

from powercut.trace import NEVER, Flag, Kind, Trace


def document(trace: Trace) -> dict[str, Any]:
    """The trace as JSON, schema `powercut.trace/1`."""
    return {
        "schema": "powercut.trace/1",
        "trace": trace.path,
        "hash": trace.hash,
        "meta": trace.meta,
        "positions": trace.length,
        "truncated": trace.truncated,
        "files": [
            {"id": f.id, "name": f.name, "size": f.size, "role": f.role, "events": _counts(trace, f.id)}
            for f in trace.files
        ],
        "overlapping": overlapping(trace),
    }


def _counts(trace: Trace, file: int) -> dict[str, int]:
    kinds = Counter(trace.events["kind"][trace.events["file"] == file].tolist())
    return {Kind(kind).name.lower(): number for kind, number in sorted(kinds.items())}


def overlapping(trace: Trace) -> int:
    """How many events on the image were issued while another one was in flight."""
    image = trace.file("image")
    if image is None:
        return 0
    mine = trace.events[trace.events["file"] == image.id]
    if len(mine) < 2:
        return 0
    latest = np.maximum.accumulate(mine["completed"])[:-1]
    return int((mine["issued"][1:] < latest).sum())


def summary(trace: Trace) -> str:
    """A few lines about the whole."""
    meta = trace.meta
    lines = [f"{trace.path}: {trace.length:,} positions, hash {trace.hash}"]
    lines += [f"  {key:10} {_plain(value)}" for key, value in meta.items() if value not in ([], {}, None)]
    for file in trace.files:
        events = ", ".join(f"{number:,} {kind}" for kind, number in _counts(trace, file.id).items()) or "no events"
        size = f"{file.size:,} bytes" if file.size or file.role != "guest" else "size not known"
        lines.append(f"  {file.role:10} {size}: {events}")
    lines.append(f"  {overlapping(trace):,} events of the image were issued while others were in flight")
    if trace.truncated:
        lines.append(f"  warning: {trace.truncated}")
    return "\n".join(lines)


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}={_plain(inner)}" for key, inner in value.items() if inner not in ([], {}, None))
    if isinstance(value, list):
        return ",".join(str(inner) for inner in value)
    return str(value)


def lines(trace: Trace) -> Iterator[str]:
    """One line for each event: issued, completed, role, what, where."""
    roles = {file.id: file.role for file in trace.files}
    for event in trace.events:
        done = "in flight" if event["completed"] == NEVER else f"{event['completed']:,}"
        kind = Kind(event["kind"])
        place = "" if kind is Kind.FLUSH else f" {int(event['offset']):#x}+{int(event['length']):#x}"
        flags = "".join(f" {flag.name}" for flag in Flag if event["flags"] & flag)
        failed = f" failed with errno {event['result']}" if event["result"] else ""
        operation = f" (operation {event['ref']})" if roles.get(int(event["file"])) == "guest" else ""
        role = roles.get(int(event["file"]), "-")
        yield f"{event['issued']:>9,} {done:>10} {role:7} {kind.name.lower()}{place}{flags}{failed}{operation}"
