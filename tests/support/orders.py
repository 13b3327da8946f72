"""Faults of order, planted into honest recordings: flushes dropped or lied about, writes swapped across one."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from powercut.trace import Flag, Kind, Trace, TraceWriter

Step = tuple[str, int]  # "issue" or "complete", and the index of the event


def steps_of(trace: Trace) -> list[Step]:
    """The order in which events were issued and completed."""
    events = trace.events
    steps = [(int(p), "issue", i) for i, p in enumerate(events["issued"])]
    steps += [(int(p), "complete", i) for i, p in enumerate(events["completed"]) if p < trace.length]
    return [(what, i) for _, what, i in sorted(steps)]


def rewritten(trace: Trace, out: Path, steps: list[Step], lied: frozenset[int] = frozenset()) -> Path:
    """A copy of `trace` with its events in the order of `steps`; those that `steps` lacks never happened, and those
    of `lied` were acknowledged and not done."""
    guest = trace.file("guest")
    with TraceWriter(out, trace.meta) as writer:
        for info in trace.files:
            writer.file(info.name, info.size, info.role)
        for file, offset, length, row in trace.bases.tolist():
            writer.base(file, offset, trace.rows[row : row + length // 512].tobytes())
        positions: dict[int, int] = {}
        for what, i in steps:
            event = trace.events[i]
            if what == "complete":
                writer.complete(positions[i], int(event["result"]))
                continue
            kind, file = Kind(event["kind"]), int(event["file"])
            bears = kind is Kind.WRITE and (guest is None or file != guest.id)
            positions[i] = writer.issue(
                kind,
                file,
                int(event["offset"]),
                int(event["length"]),
                data=bytes(trace.payload(event)) if bears else None,
                flags=int(event["flags"]) | (int(Flag.LIED) if i in lied else 0),
                ref=int(event["ref"]),
            )
    return out


def image_events(trace: Trace, kind: Kind) -> list[int]:
    image = trace.file("image")
    assert image is not None
    return np.flatnonzero((trace.events["file"] == image.id) & (trace.events["kind"] == kind)).tolist()


def needed(trace: Trace) -> list[int]:
    """The last flush of the image within each flush of the guest that has writes to cover which no flush before it
    covers: without it, what the guest is told right after it is not true."""
    events, guest = trace.events, trace.file("guest")
    assert guest is not None
    flushes, writes = image_events(trace, Kind.FLUSH), image_events(trace, Kind.WRITE)
    asked = np.flatnonzero((events["file"] == guest.id) & (events["kind"] == Kind.FLUSH))
    found = []
    for begin, end in events[asked][["issued", "completed"]].tolist():
        inside = [f for f in flushes if begin < events["issued"][f] and events["completed"][f] < end]
        if not inside:
            continue
        flush = inside[-1]
        since = max((int(events["issued"][f]) for f in flushes if f < flush), default=-1)
        if any(since < events["completed"][w] < events["issued"][flush] for w in writes):
            found.append(flush)
    return found


def swapped(trace: Trace, flush: int) -> list[Step] | None:
    """The steps of `trace`, the last write before `flush` having taken the place of the first one after it, and that
    one its place; None if there are no two."""
    steps, writes = steps_of(trace), set(image_events(trace, Kind.WRITE))
    at = steps.index(("issue", flush))
    before = next((i for what, i in reversed(steps[:at]) if what == "issue" and i in writes), None)
    after = next((i for what, i in steps[at:] if what == "issue" and i in writes), None)
    if before is None or after is None:
        return None
    swap = {before: after, after: before}
    return [(what, swap.get(i, i)) for what, i in steps]
