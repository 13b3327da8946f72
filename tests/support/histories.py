"""Random small traces, and what the fault model allows for them, computed straight from its definition.

The oracle here shares nothing with `powercut.crash`: it goes through events one by one, atom by atom, and builds
every state as bytes.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

from hypothesis import strategies as st

from powercut.trace import Flag, Kind, TraceWriter

SECTOR = 512
SECTORS = 4


@dataclass(frozen=True)
class Step:
    """Either issue an event or complete the `which`-th of those in flight."""

    kind: Kind | None
    offset: int = 0
    length: int = 0
    flags: int = 0
    which: int = 0
    result: int = 0


@dataclass
class Event:
    number: int
    kind: Kind
    offset: int
    length: int
    flags: int
    issued: int
    completed: int | None = None
    result: int = 0


def steps(partial: bool = False) -> st.SearchStrategy[list[Step]]:
    grain = 128 if partial else SECTOR
    most = SECTORS * SECTOR // grain

    def place(kind: Kind, flags: int) -> st.SearchStrategy[Step]:
        return st.integers(0, most - 1).flatmap(
            lambda first: st.integers(1, most - first).map(
                lambda count: Step(kind, first * grain, count * grain, flags)
            )
        )

    issue = st.one_of(
        place(Kind.WRITE, 0),
        place(Kind.WRITE, 0),
        place(Kind.WRITE, int(Flag.FUA)),
        place(Kind.ZERO, 0),
        place(Kind.DISCARD, 0),
        st.just(Step(Kind.FLUSH)),
        st.just(Step(Kind.FLUSH)),
        st.just(Step(Kind.FLUSH, flags=int(Flag.LIED))),
    )
    done = st.builds(Step, st.none(), which=st.integers(0, 3), result=st.sampled_from([0, 0, 0, 0, 0, 5]))
    return st.lists(st.one_of(issue, done, done), min_size=1, max_size=14)


def content(number: int, length: int) -> bytes:
    return bytes([number + 1]) * length


def write(path: Path, plan: list[Step]) -> list[Event]:
    """Write the trace of `plan` and return its events as the definition sees them."""
    events: list[Event] = []
    open_events: list[Event] = []
    with TraceWriter(path, {}) as writer:
        file = writer.file("disk", SECTORS * SECTOR, "image")
        writer.base(file, SECTOR, b"\xff" * SECTOR)  # sector 1 held something before
        for step in plan:
            if step.kind is None:
                if open_events:
                    event = open_events.pop(step.which % len(open_events))
                    event.completed, event.result = writer._position, step.result
                    writer.complete(event.issued, step.result)
                continue
            number = len(events)
            data = content(number, step.length) if step.kind is Kind.WRITE else None
            position = writer.issue(step.kind, file, step.offset, step.length, data=data, flags=step.flags)
            events.append(Event(number, step.kind, step.offset, step.length, step.flags, position))
            open_events.append(events[-1])
    return events


def sector_states(events: list[Event], t: int, sector: int, initial: bytes | None = None, lying: int = 0) -> set[bytes]:
    """Everything that `sector` may hold after a crash before position `t`, by definition. Whole sectors only."""
    if initial is None:
        initial = (b"\xff" if sector == 1 else b"\0") * SECTOR
    flushes = [e for e in events if e.kind is Kind.FLUSH and not e.flags & Flag.LIED and not e.result]
    flushes = [e for e in flushes if e.completed is not None and e.completed < t]
    flushes = sorted(flushes, key=lambda e: e.completed)[: max(0, len(flushes) - lying)]
    here = [
        e for e in events
        if e.kind in (Kind.WRITE, Kind.ZERO, Kind.DISCARD)
        and e.issued < t and e.offset < (sector + 1) * SECTOR and e.offset + e.length > sector * SECTOR
    ]  # fmt: skip

    def completed(e: Event) -> float:
        return e.completed if e.completed is not None and e.completed < t else float("inf")

    durable = [
        e for e in here
        if not e.result_at(t) and (
            any(completed(e) < f.issued for f in flushes) or (e.flags & Flag.FUA and completed(e) < t)
        )
    ]  # fmt: skip
    last = [d for d in durable if not any(completed(d) < other.issued for other in durable)]
    in_flight = [e for e in here if e not in durable and not any(completed(e) < d.issued for d in durable)]
    states = {initial} if not last else set()
    for e in last + in_flight:
        states.add(content(e.number, SECTOR) if e.kind is Kind.WRITE else bytes(SECTOR))
    return states


def _result_at(self: Event, t: int) -> int:
    return self.result if self.completed is not None and self.completed < t else 0


Event.result_at = _result_at  # type: ignore[attr-defined]


def states(events: list[Event], t: int, start: bytes | None = None, lying: int = 0) -> set[bytes]:
    """Every state of the whole disk after a crash before position `t`, if it held `start` when recording began and
    the last `lying` flushes did nothing."""
    initial = [None if start is None else start[s * SECTOR : (s + 1) * SECTOR] for s in range(SECTORS)]
    per_sector = [sorted(sector_states(events, t, sector, initial[sector], lying)) for sector in range(SECTORS)]
    return {b"".join(combination) for combination in itertools.product(*per_sector)}
