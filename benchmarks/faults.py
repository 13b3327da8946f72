"""How long it takes to find a planted order fault, beside three rivals on the same trace.

Each fault is a flush of an honest recording that is dropped, or two writes swapped across one. The rivals:

    prefixes   the state at each flush, everything before it done, judged by `qemu-img check`
    random     10,000 states: a random crash, each write in flight there or not
    two lost   every state in which at most two of the writes in flight are lost

The last two are judged by our own checker on the one state, content included, which is more than their authors have.
"""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from rows import record, row

from powercut.crash.explore import Task
from powercut.crash.finding import write_image
from powercut.crash.model import epochs
from powercut.explore.session import Plan, Session
from powercut.guest.daemon import tool
from powercut.trace import Kind, Trace

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from support.orders import image_events, needed, rewritten, steps_of, swapped

STATES = 10_000
LONGEST = 120.0  # seconds that a rival gets for one fault

Survivors = Callable[[list[int]], Iterator[set[int]]]  # which of the events in flight survive, state after state


def faults(honest: Trace) -> Iterator[tuple[str, list[tuple[str, int]]]]:
    """Names, and the steps of a recording with that fault."""
    steps = steps_of(honest)
    for number, flush in enumerate(needed(honest)):
        yield f"flush {number + 1} dropped", [step for step in steps if step[1] != flush]
        late = swapped(honest, flush)
        if late is not None:
            yield f"writes swapped across flush {number + 1}", late


def ours(path: Path) -> tuple[bool, float, int]:
    """Whether the search finds it, after how many seconds and checks."""
    session = Session(Plan(str(path), "qcow2"))
    begin, checks = time.perf_counter(), 0
    tasks = (Task(i, p, None) for i, p in enumerate(epochs(session.trace, session.image.file)))
    for result in session.explore(tasks):
        checks += result.checks
        if result.found:
            return True, time.perf_counter() - begin, checks
    return False, time.perf_counter() - begin, checks


def prefixes(path: Path, scratch: Path) -> tuple[bool, float, int]:
    """Everything done up to each flush, and `qemu-img check` on it."""
    session = Session(Plan(str(path), "qcow2"))
    image = scratch / "prefix.qcow2"
    begin, states = time.perf_counter(), 0
    flushes = session.trace.events["issued"][image_events(session.trace, Kind.FLUSH)].tolist()
    for position in flushes:
        session.image.advance(position)
        flight = session.image.in_flight_atoms()
        with session.image.settled_as(*_surviving(flight, set(flight.event.tolist()))):
            write_image(session.image, str(image))
        states += 1
        command = [tool("qemu-img"), "check", "-q", "-f", "qcow2", str(image)]
        if subprocess.run(command, capture_output=True).returncode == 2:
            return True, time.perf_counter() - begin, states
    return False, time.perf_counter() - begin, states


def _surviving(flight, events: set[int]):
    """The atoms that have something of `events`, and the rows of the newest of it."""
    live = np.isin(flight.event, list(events))
    atoms, rows = flight.atom[live], flight.rows[live]
    last = np.append(np.flatnonzero(np.diff(atoms)), len(atoms) - 1) if len(atoms) else np.zeros(0, dtype=np.int64)
    return atoms[last], rows[last]


def states(path: Path, positions: list[int], survivors: Survivors) -> tuple[bool, float, int]:
    """Judge single states, at each of `positions` those that `survivors` draws."""
    session = Session(Plan(str(path), "qcow2"))
    begin, count = time.perf_counter(), 0
    for position in positions:
        session.advance(position)
        flight = session.image.in_flight_atoms()
        for kept in survivors(np.unique(flight.event).tolist()):
            with session.image.settled_as(*_surviving(flight, kept)):
                found = session.problems(1)
            count += 1
            if found or time.perf_counter() - begin > LONGEST:
                return bool(found), time.perf_counter() - begin, count
    return False, time.perf_counter() - begin, count


def at_random(path: Path) -> tuple[bool, float, int]:
    rnd = random.Random(1)
    trace = Trace(path)
    crashes = sorted(rnd.choices(epochs(trace, 0), k=STATES))

    def one(events: list[int]) -> Iterator[set[int]]:
        yield {event for event in events if rnd.random() < 0.5}

    return states(path, crashes, one)


def two_lost(path: Path) -> tuple[bool, float, int]:
    def few(events: list[int]) -> Iterator[set[int]]:
        whole = set(events)
        for lost in range(3):
            for gone in itertools.combinations(events, lost):
                yield whole - set(gone)

    return states(path, epochs(Trace(path), 0), few)


def planted(scratch: Path) -> None:
    """Find each of them, four ways."""
    honest, broken = scratch / "honest.trace", scratch / "broken.trace"
    record(honest, 60, "--size", "4M", "--depth", "1", "--option", "cluster_size=4k")
    ways: dict[str, Callable[[], tuple[bool, float, int]]] = {
        "every state": lambda: ours(broken),
        "prefixes at flushes, qemu-img check": lambda: prefixes(broken, scratch),
        "random states": lambda: at_random(broken),
        "at most two writes lost": lambda: two_lost(broken),
    }
    found: dict[str, list[float]] = {way: [] for way in ways}
    count = 0
    for name, steps in faults(Trace(honest)):
        rewritten(Trace(honest), broken, steps)
        count += 1
        for way, look in ways.items():
            seen, seconds, number = look()
            row(
                f"{name}: {way}", f"{'found' if seen else 'not found'}, {seconds:.2f} s", f"{number:,} states or checks"
            )
            if seen:
                found[way].append(seconds)
    for way, times in found.items():
        mean = f", {sum(times) / len(times):.2f} s each" if times else ""
        row(f"order faults found by {way}", f"{len(times)} of {count}{mean}")
