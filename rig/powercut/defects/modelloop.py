"""The loop of the thread of 2009, on the model of the driver: a guest writes, the state of the machine is saved and a
snapshot taken, everything is closed; again and again on the same image.

The model is served over NBD. The guest is our own client, or a real one under a real QEMU, which sees a raw disk; the
model takes the snapshot while the guest is stopped, as savevm does. Every write that changes the refcount of cluster 0
or the header is noticed when it is made, and told with the request that it was made for.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from powercut import inspection, stats
from powercut.disk import ImageDisk
from powercut.errors import InputError
from powercut.formats.qcow2.check import check
from powercut.formats.qcow2.defects import find
from powercut.formats.qcow2.driver import snapshots
from powercut.formats.qcow2.driver.host import Ask, File, OpenFile, Running, run
from powercut.formats.qcow2.driver.image import Image
from powercut.formats.qcow2.driver.opening import open_image
from powercut.formats.qcow2.driver.practice import Era, Practice
from powercut.formats.qcow2.layout import MAGIC
from powercut.guest import ledger, start
from powercut.guest.accelerator import choose
from powercut.guest.hardware import Disk, Hardware
from powercut.guest.kernel import kernel
from powercut.guest.ledger import Keeps, Ledger
from powercut.guest.nbd_client import Client
from powercut.guest.workload import COMMANDS, Operation, draw, payload
from powercut.guest.writing import Step, Writing
from powercut.recording import modelled
from powercut.scenario import Scenario, parse_size
from powercut.scratch import scratch
from powercut.trace import SECTOR, Kind
from quire.nbd import Server

_PIECE = 32 << 10  # bytes of a machine's state written at once: QEMU's buffer
_LONGEST = 64 << 10  # bytes of a guest's request
_QEMU = "qemu-system-x86_64"
_MAGIC = MAGIC.to_bytes(4, "big")
Progress = Callable[[int, int], None]


@dataclass(slots=True)
class Outcome:
    """What came of the loops. `story`: what happened, in the order in which it did, each line beginning with the loop.
    `fell`, `gone`: the loop in which the refcount of cluster 0 fell to 0, and the one in which the header went."""

    scenario: Scenario
    loops: int = 0
    failed: int = 0
    story: list[str] = field(default_factory=list)
    fell: int | None = None
    gone: int | None = None
    remains: str = ""  # what `powercut check` says of an image whose header is gone
    seconds: float = 0.0

    @property
    def word(self) -> str:
        return "BROKEN" if self.failed else "CLEAN"

    @property
    def rules(self) -> set[str]:
        """The rules that were broken."""
        return ({"opens"} if self.gone else set()) | ({"structure"} if self.failed else set())

    @property
    def why(self) -> str:
        """In one line."""
        if not self.failed:
            return stats.sentence(0, self.loops)
        told = [f"the refcount of cluster 0 fell in loop {self.fell}"] if self.fell else []
        told += [f"the header went in loop {self.gone}"] if self.gone else []
        return ", ".join(told) or self.story[0]


class Watched:
    """Tells `changed` of every write that changes one of `spans` (offset, length): the span, old and new bytes."""

    def __init__(self, below: File, changed: Callable[[Ask, int, bytes, bytes], None]) -> None:
        self._below, self._changed = below, changed
        self.spans: list[tuple[int, int]] = []

    def begin(self, ask: Ask) -> Any:
        return self._below.begin(ask)

    def finish(self, ask: Ask, begun: Any) -> bytes:
        reached = [s for s in self.spans if s[0] < ask.offset + ask.length and ask.offset < sum(s)]
        if ask.kind != Kind.WRITE or not reached:
            return self._below.finish(ask, begun)
        before = [self._held(span) for span in reached]
        answer = self._below.finish(ask, begun)
        for span, old in zip(reached, before, strict=True):
            if (new := self._held(span)) != old:
                self._changed(ask, span[0], old, new)
        return answer

    def _held(self, span: tuple[int, int]) -> bytes:
        ask = Ask(0, *span)
        return self._below.finish(ask, self._below.begin(ask))


class Served:
    """The guest's disk as an NBD export. `now`: the request that is being served, in words."""

    block_size = SECTOR

    def __init__(self, image: Image, file: File) -> None:
        self.size = image.size
        self.image, self.now = image, ""
        self._file, self._lock = file, threading.Lock()

    def do(self, words: str, work: Running[Any]) -> Any:
        with self._lock:
            self.now = words
            return run(work, self._file)

    def read(self, offset: int, length: int) -> bytes:
        return bytes(self.do("", self.image.read(offset, length)))

    def write(self, offset: int, data: bytes | bytearray | memoryview, fua: bool) -> None:
        self.do(f"the guest's write of {len(data):,} bytes at {offset:#x}", self.image.write(offset, bytes(data)))
        if fua:
            self.flush()

    def zero(self, offset: int, length: int, may_unmap: bool, fua: bool) -> None:
        self.do(f"the guest's zeroing of {length:,} bytes at {offset:#x}", self.image.zero(offset, length))
        if fua:
            self.flush()

    def discard(self, offset: int, length: int) -> None:
        self.do(f"the guest's discard of {length:,} bytes at {offset:#x}", self.image.discard(offset, length))

    def flush(self) -> None:
        self.do("the guest's flush", self.image.flush_all())


class Loops:
    """The loops of `scenario`, which has a model."""

    def __init__(self, scenario: Scenario) -> None:
        assert scenario.model is not None
        self._scenario, self._plan = scenario, scenario.model
        for name in self._plan.defects:
            find(name)
        self._practice = Practice(Era(self._plan.era), frozenset(self._plan.defects))
        self._size = parse_size(scenario.size)
        self._ledger = Ledger(self._size // SECTOR)
        self._operation = 1  # number of the guest's next one
        self.outcome = Outcome(scenario)

    def run(self, progress: Progress = lambda done, of: None) -> Outcome:
        """Go on until the header is gone, or there were as many loops as there should be. Raises EnvironmentFault."""
        begin = time.monotonic()
        if self._scenario.backing is not None:
            raise InputError("loops on the model have no backing file")
        with scratch() as folder:
            path = folder / "image.qcow2"
            path.write_bytes(modelled.new_image(self._scenario))
            for number in range(1, self._plan.loops + 1):
                self.outcome.loops = number
                self.outcome.failed += self._loop(number, path, folder)
                progress(number, self._plan.loops)
                if self.outcome.gone:
                    self.outcome.remains = _remains(path)
                    break
        self.outcome.seconds = time.monotonic() - begin
        return self.outcome

    def _loop(self, number: int, path: Path, folder: Path) -> bool:
        """Returns whether anything was wrong."""
        lines = len(self.outcome.story)
        opened = OpenFile(path)
        try:
            with self._served(number, opened, path) as served:
                chance = random.Random(f"{self._scenario.workload.seed} {number}")
                self._guest(served, chance, folder)
                run(served.image.close(), served._file)
            self._look(number, path, opened, folder)
        except (OSError, InputError) as error:
            self._tell(number, f"the driver fails: {error}")
        finally:
            opened.close()
        return len(self.outcome.story) > lines

    def _tell(self, number: int, text: str) -> None:
        self.outcome.story.append(f"loop {number}: {text}")

    @contextmanager
    def _served(self, number: int, opened: OpenFile, path: Path) -> Iterator[Served]:
        freed = 0  # the offset that was freed last, as the driver had it

        def gone(offset: int) -> None:
            nonlocal freed
            freed = offset
            forget(offset)

        def changed(ask: Ask, offset: int, old: bytes, new: bytes) -> None:
            where = f"a write of {ask.length:,} bytes at {ask.offset:#x}, made for {served.now}"
            if offset == 0:
                if old == _MAGIC:
                    self.outcome.gone = number
                    self._tell(number, f"the header is overwritten by {where}")
            elif not any(new):
                self.outcome.fell = self.outcome.fell or number
                self._tell(number, f"the refcount of cluster 0, the header's, falls to 0 by {where}")
                self._tell(number, f"what was freed is {_offset(freed, os.stat(path).st_size)}")

        watched = Watched(opened, changed)
        image = run(open_image(self._practice), watched)
        forget, image.refcounts.gone = image.refcounts.gone, gone
        watched.spans = [(0, len(_MAGIC)), (image.refcounts.table[0], 2)]
        served = Served(image, watched)
        yield served

    def _guest(self, served: Served, chance: random.Random, folder: Path) -> None:
        socket = folder / "disk.sock"
        socket.unlink(missing_ok=True)
        steps = self._steps(chance)
        with Server(served, socket):
            if self._plan.guest == "client":
                self._client(socket, steps)
                self._savevm(served)
            else:
                self._machine(socket, steps, chance, folder, served)

    def _steps(self, chance: random.Random) -> list[Operation]:
        workload = self._scenario.workload
        drawn = draw(chance.randrange(1 << 62), workload.operations, self._size, workload.extra)
        return [replace(operation, length=min(operation.length, _LONGEST)) for operation in drawn]

    def _client(self, socket: Path, steps: list[Operation]) -> None:
        with Client(socket) as client:
            for operation in steps:
                number, self._operation = self._operation, self._operation + 1
                self._ledger.issue(number, operation)
                data = payload(number, self._ledger.epoch, operation)
                client.submit(COMMANDS[operation.kind], operation.offset, operation.length, data, tag=number)
                self._ledger.complete(number, client.wait().error)

    def _machine(
        self, socket: Path, steps: list[Operation], chance: random.Random, folder: Path, served: Served
    ) -> None:
        guest = kernel()
        hardware = Hardware(choose(_QEMU, guest).name, guest, _QEMU)
        node = {"driver": "nbd", "server": {"type": "unix", "path": str(socket)}, "discard": "unmap"}
        home = folder / "machine"
        home.mkdir(exist_ok=True)
        work: list[Step] = [(0, operation) for operation in steps]
        with start.restore(hardware, [Disk(node, self._size)], home) as machine:
            writing = Writing(machine.agent, [self._ledger], work, self._scenario.workload.depth, self._operation)
            writing.run(chance.randint(len(work) // 4, len(work) * 3 // 4))
            machine.ask("stop")
            self._savevm(served)
            machine.ask("quit")
            machine.wait_end()
            writing.hear_the_rest()
            self._operation = writing.number

    def _savevm(self, served: Served) -> None:
        """Save the state of the machine and take a snapshot of that name, which replaces the last."""
        image, size, name = served.image, parse_size(self._plan.state), "loop"
        state = os.urandom(size)
        for at in range(0, size, _PIECE):
            piece = state[at : at + _PIECE]
            words = f"the machine's state ({len(piece):,} bytes at {at:,} of it)"
            served.do(words, image.write_vmstate(at, piece))
        table = image.snapshot_table
        if table is not None and any(snapshot.name == name for snapshot in table.snapshots):
            served.do("the deletion of the last snapshot", snapshots.delete(image, name))
        served.do("the snapshot", snapshots.create(image, name, size))

    def _look(self, number: int, path: Path, opened: OpenFile, folder: Path) -> None:
        found = check(ImageDisk(path), trust_dirty=True)
        for problem in found.problems[:3]:
            self._tell(number, f"check: {problem.text}")
        if found.leaks:
            self._tell(number, f"check: {found.leaks:,} leaked clusters after an orderly end")
        if found.header is None:
            return
        image = run(open_image(self._practice), opened)
        raw = folder / "raw"
        raw.write_bytes(run(image.read(0, self._size), opened))
        held = ledger.read(raw, self._size // SECTOR)
        for problem in self._ledger.judge(held, Keeps.COMPLETED)[:3]:
            self._tell(number, f"the guest reads: {problem.text}")
        self._ledger.settle(held)


def _offset(offset: int, size: int) -> str:
    """An offset in words, for a file of `size` bytes."""
    swapped = int.from_bytes(offset.to_bytes(8, "big"), "little")
    if size <= offset and swapped < size:
        return f"offset {offset:#x}, far behind the end of the file: {swapped:#x} with its bytes in reverse"
    return f"offset {offset:#x}"


def _remains(path: Path) -> str:
    """What `powercut check` says of the image, which is about to go: without its name, and without commands."""
    lines = inspection.inspect(str(path), "qcow2").text.replace(f"{path}: ", "").splitlines()
    return "\n".join(line for line in lines if str(path) not in line)
