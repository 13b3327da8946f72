"""The search over cases of requests held in flight (`powercut.faults.inflight`), and what comes of it.

Systematic: all histories over a small alphabet up to a length, from each start, and in each every host request held
until the end. Which requests there are is not known before: each run shows those that came after its last hold, and
each of them is the next to hold, up to as many at once as were asked for. What could not be placed, or was cut short
by a limit of time, makes the verdict UNKNOWN. Random cases, long and with many holds, come on top; they prove nothing.
"""

from __future__ import annotations

import atexit
import itertools
import multiprocessing
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

from powercut import __version__
from powercut.capture.holding import LIES, Label
from powercut.errors import InputError
from powercut.faults.inflight import KINDS, STARTS, Case, Plan, Ran, Rig, alphabet, parse, possible
from powercut.guest.control import SNAPSHOT, Operation
from powercut.guest.daemon import version
from powercut.report.races import Bundle, Hold, Outcome, load
from powercut.verdict import Verdict

_TRIES = 3  # how often a smaller case, or one that missed its hold, is run
_REPEATS = 5  # how often a finding is run again to confirm it
_CHUNK = 16  # histories, or random cases, that a process is given at once
_SHRINK = 60.0  # seconds for making a finding smaller
_LONG = 40  # operations in a random history
_HELD = 0.25  # of these are held: this part
_NEAR = 0.5  # while one is, this part of the others goes to its cluster
_SNAPSHOTS = 0.25  # of random histories, this part makes snapshots: QEMU drains for each, and the rest see more
_MANY = 3  # findings that are kept of each kind
_KNOWN = 400  # kinds of faulty histories that a process shrinks; more are counted only

Progress = Callable[[int, int], None]


@dataclass(slots=True)
class Tally:
    """What was run, and what was found."""

    count: Counter[str] = field(default_factory=Counter)
    seen: Counter[str] = field(default_factory=Counter)  # by the kind of a fault: in how many cases
    findings: list[Bundle] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        self.count.update(other.count)
        self.seen.update(other.seen)
        self.findings += other.findings


def histories(plan: Plan) -> Iterator[Case]:
    """All histories up to the plan's length from each start that can be run, the shortest first."""
    for length in range(1, plan.length + 1):
        for history in itertools.product(alphabet(plan), repeat=length):
            yield from filter(possible, (Case(start, history) for start in plan.starts))


def draw(plan: Plan, number: int) -> tuple[Case, dict[int, int]]:
    """Random history `number`: anywhere near the alphabet's clusters, of all lengths. And of which operations, counted
    from 1, some requests are to be held, and before which operation they are let go: until then nothing is drawn that
    the guest would have to wait with."""
    rnd = random.Random(f"{plan.seed}/{number}")
    low, unit = max(0, plan.base - plan.cluster), min(plan.cluster // 4, 4096)
    high = plan.spare if plan.format == "qcow2" else plan.size  # the spare cluster keeps what it was given
    kinds = ["write"] * 4 + ["read"] * 2 + ["flush"]
    kinds += ["zero", "unmap"] * ("zero" in plan.extra) + ["discard"] * 2 * ("discard" in plan.extra)
    if "snapshot" in plan.extra and rnd.random() < _SNAPSHOTS:
        kinds.append("snapshot")
    operations: list[Operation] = []
    until: dict[int, int] = {}
    there = False

    def drawn(held: list[Operation]) -> Operation:
        kind = rnd.choice(kinds)
        if kind in ("flush", "snapshot"):
            return Operation("flush") if kind == "flush" else Operation("delete" if there else "create", name="x")
        length = rnd.choice((unit, plan.cluster // 2, plan.cluster, plan.cluster, 2 * plan.cluster))
        grain = rnd.choice((unit, plan.cluster))
        first, last = low, high
        near = [other.offset // plan.cluster * plan.cluster for other in held if other.length]
        if near and rnd.random() < _NEAR:
            first, last = (begin := rnd.choice(near)), min(high, begin + plan.cluster)
        offset = first + rnd.randrange((last - first) // grain) * grain
        return Operation(kind, offset, min(length, high - offset))

    for now in range(1, _LONG + 1):
        held = [operations[other - 1] for other, end in until.items() if end > now]
        one = next(
            (one for one in (drawn(held) for _ in range(_LONG)) if not any(_waits(one, other, plan) for other in held)),
            Operation("flush"),
        )
        there ^= one.kind in SNAPSHOT
        operations.append(one)
        if one.kind not in SNAPSHOT and rnd.random() < _HELD:
            until[now] = now + rnd.randrange(2, 8)
    return Case(rnd.choice(plan.starts), tuple(operations)), until


def _waits(one: Operation, held: Operation, plan: Plan) -> bool:
    """Whether the guest waits with `one` while `held` is under way."""
    if one.kind in SNAPSHOT:
        return True
    changes = {one.kind, held.kind}.isdisjoint(("read", "flush")) and not plan.overlap
    return changes and one.offset < held.offset + held.length and held.offset < one.offset + one.length


class Search:
    """Goes through histories on one rig, and keeps what it finds."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self._known: set[tuple[str, ...]] = set()

    def exhaust(self, case: Case, tally: Tally) -> None:
        """Run a history with nothing held, and with every choice of what is."""
        end = len(case.history) + 1
        tally.count["histories"] += 1
        frontier = [(case, self._run(case, tally))]
        while frontier:
            known, ran = frontier.pop()
            if len(known.holds) == self.rig.plan.holds or ran.pointless:
                continue
            after = [at.label for at in ran.arrivals]
            if known.holds:
                last = known.holds[-1][0]
                after = after[after.index(last) + 1 :] if last in after else []
            for label in after:
                if label.operation < len(case.history):
                    child = case._replace(holds=(*known.holds, (label, end)))
                    frontier.append((child, self._run(child, tally)))

    def wander(self, number: int, tally: Tally) -> None:
        """Run a random history with random holds."""
        case, until = draw(self.rig.plan, number)
        seed = f"{self.rig.plan.seed}/{number}"

        def choose(label: Label) -> int | None:
            rnd = random.Random(f"{seed}/{label.operation}/{label.request}")
            return until.get(label.operation) if rnd.random() < 0.5 else None

        ran = self.rig.run(case, choose)
        holds = tuple((at.label, at.until) for at in ran.arrivals if at.until is not None)
        tally.count["random"] += 1
        self._account(case._replace(holds=holds), ran, tally)

    def _run(self, case: Case, tally: Tally) -> Ran:
        for _ in range(_TRIES):
            ran = self.rig.run(case)
            if ran.held == len(case.holds) or ran.faults:
                break
        else:
            tally.count["missed"] += 1
        self._account(case, ran, tally)
        return ran

    def _account(self, case: Case, ran: Ran, tally: Tally) -> None:
        count = tally.count
        count["cases"] += 1
        count["reads"] += ran.reads
        if ran.held:
            count["pointless"] += ran.pointless
            count["held"] += ran.crossed > 0
            count["overtaken"] += ran.overtook > 0
            count["driver_waits"] += ran.crossed > 0 and not ran.overtook
        for kind in sorted({fault.kind for fault in ran.faults}):
            tally.seen[kind] += 1
        if ran.faults:
            kind = ran.faults[0].kind
            group = (kind, case.start, *sorted(operation.kind for operation in case.history))
            if group not in self._known and len(self._known) < _KNOWN:
                self._known.add(group)
                tally.findings.append(self._found(case, kind))

    # A finding

    def _fails(self, case: Case, kind: str) -> bool:
        return any(fault.kind == kind for _ in range(_TRIES) for fault in self.rig.run(case).faults)

    def shrink(self, case: Case, kind: str) -> Case:
        """Leave out holds and operations, as many as possible in time, while the fault stays."""
        until = time.monotonic() + _SHRINK
        while True:
            before = case
            for parts, without in (("holds", Case.letting_go), ("history", Case.without)):
                size = max(1, len(getattr(case, parts)) // 2)
                while size:
                    for last in range(len(getattr(case, parts)), 0, -size):
                        smaller = case
                        for number in range(last, max(0, last - size), -1):
                            smaller = without(smaller, number)
                        if time.monotonic() > until:
                            return case
                        if smaller.history and possible(smaller) and self._fails(smaller, kind):
                            case = smaller
                    size //= 2
            if case == before:
                return case

    def _found(self, case: Case, kind: str) -> Bundle:
        case = self.shrink(case, kind)
        plan, what, seen, tools = self.rig.plan, Ran(), 0, list[str]()
        for _ in range(_REPEATS):
            ran = self.rig.run(case)
            mine = [fault for fault in ran.faults if fault.kind == kind]
            if mine or not seen:
                what = ran
            if mine:
                seen, tools = seen + 1, self.rig.opinion(mine[0])
        words = {at.label: at.what for at in what.arrivals}
        return Bundle(
            powercut=__version__,
            qemu=version(),
            format=plan.format,
            options=dict(plan.options),
            start=case.start,
            history=[str(operation) for operation in case.history],
            holds=[Hold(*label, until, words.get(label, "")) for label, until in case.holds],
            kind=kind,
            faults=[fault.text for fault in what.faults],
            seen=seen,
            of=_REPEATS,
            lie=plan.lie,
            overlap=plan.overlap,
            tools=tools,
            requests=[f"{at.label.operation}.{at.label.request} {at.what}" for at in what.arrivals],
        )


# Several processes

_search: Search | None = None


def _start(plan: Plan) -> None:
    """In a worker: begin, and end with the process."""
    global _search
    rig = Rig(plan)
    atexit.register(rig.__exit__)
    _search = Search(rig)


def _work(cases: list[Case] | range) -> Tally:
    assert _search is not None
    tally = Tally()
    for case in cases:
        if isinstance(case, Case):
            _search.exhaust(case, tally)
        else:
            _search.wander(case, tally)
    return tally


def _chunks(plan: Plan, samples: int) -> Iterator[list[Case] | range]:
    every = histories(plan)
    while chunk := list(itertools.islice(every, _CHUNK)):
        yield chunk
    for first in range(0, samples, _CHUNK):
        yield range(first, min(first + _CHUNK, samples))


def run(
    plan: Plan,
    *,
    samples: int = 0,
    jobs: int = 2,
    limit: float | None = None,
    progress: Progress = lambda done, of: None,
) -> Outcome:
    """Run all that `plan` names and `samples` random cases, for `limit` seconds at most. Raises EnvironmentFault."""
    plan = checked(plan)
    begin = time.monotonic()
    of = sum(1 for _ in histories(plan)) + samples
    tally, chunks, pending, stopped = Tally(), _chunks(plan, samples), set[Future[Tally]](), False
    with Rig(plan) as rig:  # what is missing here is missing everywhere: say so before processes start
        rig.run(Case(plan.starts[0], ()))
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _start, (plan,)) as pool:
        while True:
            while not stopped and len(pending) < 2 * jobs and (chunk := next(chunks, None)) is not None:
                pending.add(pool.submit(_work, chunk))
            if not pending:
                break
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            for future in done:
                tally.add(future.result())
            progress(tally.count["histories"] + tally.count["random"], of)
            stopped = stopped or (limit is not None and time.monotonic() - begin > limit)
    return _conclude(plan, tally, of, samples, time.monotonic() - begin)


def _conclude(plan: Plan, tally: Tally, of: int, samples: int, seconds: float) -> Outcome:
    reasons = []
    if (done := tally.count["histories"] + tally.count["random"]) < of:
        reasons.append(f"time was up after {done:,} of {of:,} histories")
    if tally.count["missed"]:
        reasons.append(f"{tally.count['missed']:,} holds did not find their request: QEMU did not repeat itself")
    if not plan.length:
        reasons.append("only random cases were run")
    again = any(item.seen for item in tally.findings)
    if tally.seen and not again:
        reasons.append("what was seen once was not seen again when the case was repeated")
    verdict = Verdict.BROKEN if again else Verdict.UNKNOWN if reasons else Verdict.HOLDS
    kept: dict[tuple[str, ...], Bundle] = {}
    for item in sorted(tally.findings, key=lambda item: (len(item.history), len(item.holds), item.start)):
        kept.setdefault((item.kind, *(text.split()[0] for text in item.history)), item)
    several = Counter[str]()
    findings = []
    for item in kept.values():
        several[item.kind] += 1
        if several[item.kind] <= _MANY:
            findings.append(item)
    names = ("histories", "cases", "pointless", "held", "overtaken", "driver_waits", "reads", "random", "missed")
    coverage = {name: tally.count[name] for name in names}
    described = {
        "format": plan.format,
        "options": dict(plan.options),
        "starts": list(plan.starts),
        "alphabet": [str(operation) for operation in alphabet(plan)],
        "length": plan.length,
        "holds": plan.holds,
        "random": samples,
        "seed": plan.seed,
        "lie": plan.lie,
        "overlap": plan.overlap,
    }
    return Outcome(verdict, described, version(), coverage, dict(tally.seen), findings, reasons, seconds)


def checked(plan: Plan) -> Plan:
    """The plan with its starts filled in. Raises InputError."""
    if plan.format not in STARTS:
        raise InputError(f"format {plan.format!r} is not one of {', '.join(STARTS)}")
    for given, known, what in (
        (plan.extra, KINDS[plan.format], "kind"),
        (plan.starts, STARTS[plan.format], "start"),
        ((plan.lie,) if plan.lie else (), LIES, "lie"),
    ):
        for name in given:
            if name not in known:
                raise InputError(f"{what} {name!r} is not one of {', '.join(known)}")
    if not 512 <= plan.cluster <= 64 << 10:
        raise InputError(f"cluster_size={plan.cluster}: only clusters of 512 bytes to 64k are raced")
    return Plan(
        plan.format, plan.options, plan.extra, plan.starts or STARTS[plan.format], plan.length, plan.holds, plan.seed,
        plan.lie, plan.overlap,
    )  # fmt: skip


def replay(path: Path, tries: int, out: Path | None = None) -> tuple[Bundle, int, list[str]]:
    """Run the case of a bundle `tries` times: in how many of them its fault was seen again, and what QEMU's own tools
    say of the image then; that is written to `out`. Raises InputError."""
    bundle = load(path)
    try:
        history = tuple(map(parse, bundle.history))
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    plan = checked(
        Plan(
            bundle.format,
            tuple(bundle.options.items()),
            lie=bundle.lie,
            starts=(bundle.start,),
            overlap=bundle.overlap,
        )
    )
    holds = tuple((Label(hold.operation, hold.request), hold.until) for hold in bundle.holds)
    case = Case(bundle.start, history, holds)
    for operation in case.history:
        if (operation.offset | operation.length) % 512 or operation.offset + operation.length > plan.size:
            raise InputError(f"{path}: {operation}: not a range of whole sectors within {plan.size} bytes")
    if not possible(case):
        raise InputError(f"{path}: the history makes or deletes a snapshot that cannot be made or deleted there")
    seen, tools = 0, []
    with Rig(plan) as rig:
        for _ in range(tries):
            again = [fault for fault in rig.run(case).faults if fault.kind == bundle.kind]
            if again:
                seen += 1
                tools, image = rig.opinion(again[0]), rig.image
        if out is not None and seen:
            try:
                out.write_bytes(image)
            except OSError as error:
                raise InputError(f"{out}: cannot be written: {error.strerror}") from None
    return bundle, seen, tools
