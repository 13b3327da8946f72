"""One case of host requests held while a guest goes on: run against a real QEMU, and judged.

A case is a start, a short history of guest operations, and the host requests that are held. Each operation is issued
and waited for, until it is answered or nothing moves because the driver waits for what is held; let go; drain; flush;
read everything; close; open again, read everything, check. What a guest read, and what the disk holds, must be what
the operations make it; of operations that overlapped in time either order is legal. A guest issues no change that
overlaps a change in flight, as no file system does, unless the plan says so. The host's snapshots are in the history
too: each must hold what a read of the whole disk might have returned while it was made.
"""

from __future__ import annotations

import subprocess
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import xxhash

from powercut import stamp
from powercut.capture.holding import Arrival, Choice, Gate, HoldingExport, Label
from powercut.disk import Bytes, Variants
from powercut.errors import EnvironmentFault, InputError
from powercut.formats.qcow2.check import check
from powercut.guest.control import COMMANDS, SNAPSHOT, Control, Driver, Guest, Hang, Issued, Operation
from powercut.guest.daemon import create_image, tool
from powercut.guest.tools import opinion
from powercut.oracles.overlapping import Fault, Judge
from powercut.scenario import parse_size
from powercut.stamp import SECTOR, ZERO
from quire.nbd import Server

# What the image is before the history. "warm": written, and the driver's caches are filled; "zeroed": the same, then
# zeroed in a way that keeps the place.
STARTS: Final = {
    "qcow2": ("fresh", "written", "warm", "zeroed", "snapshot", "backed"),
    "raw": ("fresh", "written"),
}
_WARM: Final = ("warm", "zeroed")
_STOCKED: Final = (*_WARM, "snapshot")  # starts where the guest has something allocated to read meanwhile
KINDS: Final = {"qcow2": ("zero", "discard", "snapshot"), "raw": ("zero", "discard")}
_OLD: Final = "s"  # the snapshot that the start of that name has
_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Plan:
    """What to run. `extra`: kinds of operations besides write, flush and read. `lie`: a control. `overlap`: the guest
    may change what it is changing already."""

    format: str
    options: tuple[tuple[str, str], ...] = ()
    extra: tuple[str, ...] = ()
    starts: tuple[str, ...] = ()
    length: int = 3
    holds: int = 1
    seed: int = 7
    lie: str | None = None
    overlap: bool = False

    @property
    def cluster(self) -> int:
        return parse_size(dict(self.options).get("cluster_size", "64k"))

    @property
    def base(self) -> int:
        """Where the clusters lie that the alphabet speaks of: an L2 table ends behind the second, if that is near."""
        entry = 16 if dict(self.options).get("extended_l2") in ("on", "true", "yes") else 8
        table = self.cluster // entry * self.cluster
        return table - 2 * self.cluster if self.format == "qcow2" and table <= 4 * _MIB else self.cluster

    @property
    def size(self) -> int:
        return self.spare + self.cluster

    @property
    def spare(self) -> int:
        """A cluster that no history touches: the last."""
        return self.base + 5 * self.cluster

    def initial(self, start: str, offset: int) -> int:
        """What operation wrote `offset` before the history: 0, or none."""
        written = self.spare <= offset or (start != "zeroed" and self.base <= offset < self.base + 2 * self.cluster)
        return 0 if start == "backed" or (written and start != "fresh") else ZERO


class Case(NamedTuple):
    """`holds`: which host requests are held, each until before a guest operation is issued (len + 1: the end)."""

    start: str
    history: tuple[Operation, ...]
    holds: tuple[tuple[Label, int], ...] = ()

    def letting_go(self, hold: int) -> Case:
        """The case without one of its holds, counted from 1."""
        return self._replace(holds=self.holds[: hold - 1] + self.holds[hold:])

    def without(self, operation: int) -> Case:
        """The case without one of its operations, and without what was held of its requests."""
        holds = tuple(
            (Label(at.operation - (at.operation > operation), at.request), until - (until > operation))
            for at, until in self.holds
            if at.operation != operation
        )
        return Case(self.start, self.history[: operation - 1] + self.history[operation:], holds)


@dataclass(slots=True)
class Ran:
    """What one run of a case showed."""

    faults: list[Fault] = field(default_factory=list)
    arrivals: list[Arrival] = field(default_factory=list)
    held: int = 0  # requests that were held
    crossed: int = 0  # operations issued while something was held
    overtook: int = 0  # of these, answered while it was
    reads: int = 0
    pointless: bool = False  # let go before anything crossed it, and so not run to its end


def parse(text: str) -> Operation:
    """An operation from the words that it prints as. Raises InputError."""
    kind, *words = text.split() or [""]
    if kind == "snapshot" and len(words) == 2 and words[0] in SNAPSHOT:
        return Operation(words[0], name=words[1])
    if kind == "zero" and words[-1:] == ["unmap"]:
        kind, words = "unmap", words[:-1]
    if kind not in COMMANDS or len(words) != (0 if kind == "flush" else 2):
        raise InputError(
            f"{text!r} is not one of: write|zero|discard|read OFFSET LENGTH, zero ... unmap, flush, snapshot "
            "create|delete NAME"
        )
    offset, length = map(parse_size, words) if words else (0, 0)
    return Operation(kind, offset, length)


def alphabet(plan: Plan) -> list[Operation]:
    """Three neighbouring clusters a, b, c: whole, in part, across the border of a and b."""
    size, a = plan.cluster, plan.base
    whole, head, across = (a, size), (a, size // 2), (a + size // 2, size)
    operations = [Operation("write", *where) for where in (whole, head, across, (a + 2 * size, size))]
    if "zero" in plan.extra:
        operations += [Operation("zero", *where) for where in (whole, head, across)]
        operations += [Operation("unmap", *where) for where in (whole, across)]
    if "discard" in plan.extra:
        operations += [Operation("discard", *where) for where in (whole, (a, 2 * size))]
    if "snapshot" in plan.extra:
        operations += [Operation("create", name="x"), Operation("delete", name="x"), Operation("delete", name=_OLD)]
    return [*operations, Operation("flush"), Operation("read", a, 3 * size)]


def possible(case: Case) -> bool:
    """Whether each snapshot is made once before it is deleted."""
    there = {_OLD} if case.start == "snapshot" else set()
    for operation in case.history:
        if operation.kind in SNAPSHOT and (operation.name in there) == (operation.kind == "create"):
            return False
        if operation.kind == "create":
            there.add(operation.name)
        elif operation.kind == "delete":
            there.remove(operation.name)
    return True


class _Memory:
    """Bytes as a disk for the checker."""

    def __init__(self, data: bytes) -> None:
        self.size = len(data)
        self._bytes: Bytes = np.frombuffer(data, dtype=np.uint8)

    def read(self, offset: int, length: int) -> Bytes:
        inside = self._bytes[offset : offset + length]
        return inside if len(inside) == length else np.pad(inside, (0, length - len(inside)))

    def variants(self, offset: int, length: int) -> Variants:
        return Variants(self.read(offset, length))


class _Closed(NamedTuple):
    """What QEMU reads from an image that was closed, on the disk and in its snapshots; what the check says."""

    content: bytes
    snapshots: dict[str, bytes]
    fault: Fault | None


class Rig:
    """A storage daemon with the servers below it, used for one case after the other; a context manager."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._stack = ExitStack()
        self._scratch = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="powercut-")))
        self._gate = Gate()
        size = plan.size if plan.format == "raw" else 2 * plan.size + 16 * plan.cluster + _MIB
        self._image = HoldingExport(self._gate, "image", size, plan.lie)
        base = HoldingExport(self._gate, "backing file", plan.size, plan.lie)
        base.load(stamp.make(0, 0, 0, plan.size // SECTOR))
        for name, export in (("image", self._image), ("base", base)):
            self._gate.watch(self._stack.enter_context(Server(export, self._scratch / name)))
        self._control: Control | None = None
        self._starts: dict[str, bytes] = {}
        self._read: dict[bytes, _Closed] = {}  # by digest of the image
        self._case: Any = None

    def __enter__(self) -> Rig:
        return self

    def __exit__(self, *_: object) -> None:
        if self._control is not None:
            self._control.close()
        self._stack.close()

    def _daemon(self) -> Control:
        if self._control is None:
            self._control = Control()
            file = {"driver": "nbd", "server": {"type": "unix", "path": str(self._scratch / "base")}}
            node = {"driver": "raw", "node-name": "base", "read-only": True, "file": file}
            self._control.ask("blockdev-add", **node)
        return self._control

    def _lost(self) -> None:
        if self._control is not None:
            self._control.close()
            self._control = None
        self._gate.disarm()
        self._gate.release()
        self._gate.keep_no_reads()

    def _node(self, start: str) -> dict[str, Any]:
        server = {"type": "unix", "path": str(self._scratch / "image")}
        node = {
            "driver": self.plan.format,
            "discard": "unmap",
            "file": {"driver": "nbd", "discard": "unmap", "server": server},
        }
        return node | ({"backing": "base" if start == "backed" else None} if self.plan.format == "qcow2" else {})

    def _begin(self, start: str) -> bytes:
        """The image that cases with this start begin with."""
        if start not in self._starts:
            plan, path, under = self.plan, self._scratch / start, self._scratch / "under"
            under.write_bytes(stamp.make(0, 0, 0, plan.size // SECTOR))
            backing = under if start == "backed" else None
            create_image(path, plan.format, plan.size, dict(plan.options), backing)
            self._image.load(path.read_bytes())
            if start in ("written", "warm", "zeroed", "snapshot"):
                guest = self._daemon().open(self._node(start))
                self._fill(guest, plan.base, 2 * plan.cluster)
                if start == "zeroed":
                    guest.zero(plan.base, 2 * plan.cluster)
                if start not in _WARM:
                    self._fill(guest, plan.spare, plan.cluster)
                self._daemon().shut(guest)
            if start == "snapshot":
                path.write_bytes(self._image.data)
                subprocess.run([tool("qemu-img"), "snapshot", "-c", _OLD, str(path)], check=True, timeout=60)
                self._image.load(path.read_bytes())
            self._starts[start] = bytes(self._image.data)
        return self._starts[start]

    def _fill(self, guest: Guest, offset: int, length: int) -> None:
        """Write what was there before the history."""
        guest.write(offset, stamp.make(0, 0, offset // SECTOR, length // SECTOR))

    def run(self, case: Case, choose: Choice | None = None) -> Ran:
        """Run a case once. `choose` decides what is held instead of the case.

        Raises EnvironmentFault if there cannot be such an image."""
        if (case.start, case.history) != self._case:
            self._case = (case.start, case.history)
            self._read.clear()
        ran = Ran()
        self._image.load(self._begin(case.start))
        try:
            guest = self._daemon().open(self._node(case.start))
            if case.start in _WARM:
                self._fill(guest, self.plan.spare, self.plan.cluster)
                guest.read(self.plan.base, self.plan.cluster)
            if case.start in _STOCKED:
                guest.read(self.plan.spare, SECTOR)
                self._gate.keep_reads(self.plan.cluster)
            driver = Driver(guest, self._daemon(), self._gate)
            self._gate.arm(choose or dict(case.holds).get)
            self._issue(case, driver, ran, None if choose else len(case.holds))
            self._finish(case, driver, guest, ran)
        except (Hang, EnvironmentFault) as lost:
            ran.faults.append(Fault("hang" if isinstance(lost, Hang) else "lost", str(lost)))
            ran.arrivals = self._gate.arrivals
            self._lost()
        return ran

    def _issue(self, case: Case, driver: Driver, ran: Ran, wanted: int | None) -> None:
        """Issue the history, then let everything go and wait for all answers."""
        gate = self._gate
        crossing: list[Issued] = []
        # a snapshot waits until nothing of the guest's is in flight: reads in stock would be waited for
        stocked = case.start in _STOCKED and not any(operation.kind in SNAPSHOT for operation in case.history)
        for number, operation in enumerate(case.history, 1):
            gate.release(number)
            if self._waits(driver, operation):
                held = [at.label.operation for at in gate.arrivals if at.until is not None]
                ran.pointless = len(held) == wanted and set(held) == {number - 1}
                while self._waits(driver, operation):
                    driver.wait()
                if ran.pointless:
                    break
            if gate.holding and stocked:
                driver.stock(self.plan.spare)
            gate.issuing(number)
            crosses = gate.holding
            driver.issue(operation)
            driver.settle()
            crossing += [driver.log[-1]] if crosses else []
            if gate.holding:
                ran.overtook = sum(entry.completed is not None for entry in crossing)
        ran.crossed = len(crossing)
        gate.disarm()
        gate.release()
        gate.keep_no_reads()
        driver.drain()
        ran.arrivals = gate.arrivals
        ran.held = sum(at.until is not None for at in gate.arrivals)

    def _waits(self, driver: Driver, operation: Operation) -> bool:
        """Whether the operation is not issued while something is in flight."""
        if self.plan.overlap and operation.kind not in SNAPSHOT:
            return driver.full(operation)
        return driver.conflicts(operation)

    def _finish(self, case: Case, driver: Driver, guest: Any, ran: Ran) -> None:
        """Close in an orderly way and judge."""
        if ran.pointless:
            self._daemon().shut(guest)
            return
        guest.flush()
        live = guest.read(0, self.plan.size)
        self._daemon().shut(guest)
        plan, log = self.plan, driver.log
        ends = (plan.base, plan.base + 2 * plan.cluster, plan.spare)
        judge = Judge(plan.size, lambda offset: plan.initial(case.start, offset), ends, log)
        found: list[Fault | None] = []
        made = {_OLD: (0, 0)} if case.start == "snapshot" else {}
        for entry in log:
            operation, done = entry.operation, entry.completed
            if entry.error:
                text = f"operation {entry.number} ({operation}) failed with errno {entry.error}"
                found.append(Fault("error", text))
                continue
            assert done is not None
            if operation.kind == "read":
                ran.reads += 1
                found.append(judge.fault(f"read {entry.number}", operation.offset, entry.data, entry.issued, done))
            elif operation.kind == "create":
                made[operation.name] = entry.issued, done
            elif operation.kind == "delete":
                del made[operation.name]
        now = driver.clock + 1
        found.append(judge.fault("disk", 0, live, now, now))
        closed = self._reopened(case.start, list(made))
        found.append(judge.fault("reopened", 0, closed.content, now, now))
        found += [judge.fault(f"snapshot {name}", 0, closed.snapshots[name], *when) for name, when in made.items()]
        ran.faults += [fault for fault in (*found, closed.fault) if fault]

    def _reopened(self, start: str, snapshots: list[str]) -> _Closed:
        """The image as it is now; asked once for equal images."""
        data = bytes(self._image.data)
        digest = xxhash.xxh3_128_digest(data)
        if digest not in self._read:
            guest = self._daemon().open(self._node(start), writable=False)
            content = bytes(guest.read(0, self.plan.size))
            self._daemon().shut(guest)
            then = {name: self._snapshot(data, name) for name in snapshots}
            self._read[digest] = _Closed(content, then, self._check(data))
        return self._read[digest]

    def _snapshot(self, data: bytes, name: str) -> bytes:
        """What a snapshot holds. Raises EnvironmentFault if QEMU cannot tell."""
        image, out = self._scratch / "closed", self._scratch / "snapshot"
        image.write_bytes(data)
        command = [tool("qemu-img"), "convert", "-f", self.plan.format, "-O", "raw", "-l", name, str(image), str(out)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        if done.returncode:
            raise EnvironmentFault(f"qemu-img convert -l {name}: {done.stderr.strip()}")
        return out.read_bytes()

    @property
    def image(self) -> bytes:
        """The image as the last case left it."""
        return bytes(self._image.data)

    def opinion(self, fault: Fault) -> list[str]:
        """What QEMU's own tools say of the image as the last case, in which `fault` was found, left it."""
        path = self._scratch / "closed"
        path.write_bytes(self._image.data)
        shown = fault.kind.startswith(("disk-", "reopened-"))
        return opinion(path, self.plan.format, fault.sector if shown else -1)

    def _check(self, data: bytes) -> Fault | None:
        if self.plan.format != "qcow2":
            return None
        result = check(_Memory(data), trust_dirty=True)
        for problem in result.problems:
            return Fault(f"structure-{problem.kind}", problem.text)
        if result.corruptions or result.check_errors or result.aborted:
            said = f"{result.corruptions} corruptions, {result.check_errors} errors {result.aborted}"
            return Fault("structure", said.strip())
        return Fault("leak", f"{result.leaks} leaked clusters, and nothing crashed") if result.leaks else None
