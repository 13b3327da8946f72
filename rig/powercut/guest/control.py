"""A storage daemon that lives on from case to case, and a guest that leaves requests in flight.

QMP here is a socket and lines of JSON, one command at a time.
"""

from __future__ import annotations

import json
import select
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol

from powercut import stamp
from powercut.errors import EnvironmentFault
from powercut.guest.daemon import tool
from powercut.guest.lifetime import with_parent
from powercut.guest.nbd_client import Client, Reply
from powercut.trace import SECTOR
from quire.nbd_protocol import Command, Data

_PATIENCE = 20.0  # seconds for an answer to a command
_HANG = 10.0  # seconds without any answer while nothing is held
_STEP = 0.0003  # how long a guest looks for an answer before it asks whether anything moves
_ROUNDS = 3  # times the daemon must have gone around its loop with nothing moving
_STOCK = 6  # reads in flight that a server may keep
_ROOM = 128 << 10  # bytes of writes that fit into a socket which nobody reads
_STILL = 0.004  # seconds without a move, where a command in progress keeps the daemon from answering another
_BUSY = ("is in use", "Permission conflict")  # while a connection that was closed is not gone yet
SNAPSHOT: Final = {  # what a host does to the disk while its guest goes on
    "create": "blockdev-snapshot-internal-sync",
    "delete": "blockdev-snapshot-delete-internal-sync",
}
COMMANDS: Final = {
    "write": Command.WRITE,
    "zero": Command.WRITE_ZEROES,
    "unmap": Command.WRITE_ZEROES,
    "discard": Command.TRIM,
    "read": Command.READ,
    "flush": Command.FLUSH,
}


def _line(command: str, arguments: dict[str, Any]) -> bytes:
    """A command without any space: QEMU reads QMP byte by byte, one system call each."""
    asked: dict[str, Any] = {"execute": command}
    if arguments:
        asked["arguments"] = arguments
    return json.dumps(asked, separators=(",", ":")).encode() + b"\n"


class Guest(Client):
    """A client that can also look whether an answer has come."""

    def poll(self, seconds: float) -> Reply | None:
        """The next answer, if one comes within `seconds`."""
        deadline = time.monotonic() + seconds
        while not self._replies and not (self._receive() and self._replies):
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._socket], [], [], left)[0]:  # poll() knows whole milliseconds only
                return None
        return self._replies.popleft()


class Control:
    """A storage daemon without images. Raises EnvironmentFault when a command fails, or the daemon is lost."""

    def __init__(self) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="powercut-")
        self._path = str(Path(self._directory.name) / "disk.sock")
        mine, its = socket.socketpair()
        command = [tool("qemu-storage-daemon"), "--nbd-server", f"addr.type=unix,addr.path={self._path}"]
        command += ["--chardev", f"socket,id=qmp,fd={its.fileno()}", "--monitor", "chardev=qmp"]
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 (as long as the daemon)
        self._process = subprocess.Popen(
            with_parent(command),
            pass_fds=[its.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._said,
        )
        its.close()
        self._socket, self._received = mine, b""
        try:
            if self._line() is None:
                raise EnvironmentFault(f"qemu-storage-daemon said nothing for {_PATIENCE:.0f} s")
            self.ask("qmp_capabilities")
        except EnvironmentFault:
            self.close()
            raise

    def _line(self, patience: float = _PATIENCE) -> dict[str, Any] | None:
        """The next line, None if none comes within `patience` seconds."""
        try:
            while b"\n" not in self._received:
                if not select.select([self._socket], [], [], patience)[0]:
                    return None
                part = self._socket.recv(1 << 16)
                if not part:
                    raise ValueError("it ended")
                self._received += part
            line, _, self._received = self._received.partition(b"\n")
            answer: dict[str, Any] = json.loads(line)
            return answer
        except (OSError, ValueError) as error:
            raise EnvironmentFault(f"qemu-storage-daemon was lost: {error} {self.said}") from None

    def begin(self, command: str, **arguments: Any) -> None:
        """Have a command executed; underscores in the names of arguments stand for hyphens."""
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        try:
            self._socket.sendall(_line(command, named))
        except OSError as error:
            raise EnvironmentFault(f"qemu-storage-daemon was lost: {error}") from None

    def answer(self, patience: float = _PATIENCE) -> Any:
        """What came of the command that was begun, None if that takes more than `patience` seconds."""
        while (answer := self._line(patience)) and "event" in answer:
            pass
        if answer and "error" in answer:
            raise EnvironmentFault(f"qemu-storage-daemon: {answer['error']['desc']}")
        return answer and answer["return"]

    def ask(self, command: str, **arguments: Any) -> Any:
        """Execute a command, and wait for what comes of it."""
        self.begin(command, **arguments)
        try:
            answer = self.answer()
        except EnvironmentFault as fault:
            raise EnvironmentFault(str(fault).replace(": ", f": {command}: ", 1)) from None
        if answer is None:
            raise EnvironmentFault(f"qemu-storage-daemon: {command}: no answer in {_PATIENCE:.0f} s")
        return answer

    def ping(self) -> None:
        """Return when the daemon went once around its loop."""
        self.ask("query-jobs")

    def open(self, node: dict[str, Any], *, writable: bool = True) -> Guest:
        """Open an image as node "disk" and return a client of it."""
        self.ask("blockdev-add", **{**node, "node-name": "disk", "read-only": not writable})
        return self.export("disk", writable=writable)

    def export(self, name: str, *, writable: bool = False) -> Guest:
        """Export the node of this name and return a client of it."""
        self.ask("block-export-add", type="nbd", id=name, name=name, node_name=name, writable=writable)
        return Guest(self._path, name, _PATIENCE)

    def withdraw(self, guest: Guest, name: str) -> None:
        """Take the node of this name from its client."""
        guest.close()
        self.ask("block-export-del", id=name, mode="hard")

    def when_free(self, then: str, **arguments: Any) -> None:
        """Execute a command that needs nobody to use a node."""
        deadline = time.monotonic() + _PATIENCE
        while True:
            try:
                self.ask(then, **arguments)
                return
            except EnvironmentFault as fault:  # the connection may take a moment to go
                if not any(busy in str(fault) for busy in _BUSY) or time.monotonic() > deadline:
                    raise

    def shut(self, guest: Guest) -> None:
        """Close the image in an orderly way: when this returns, its format driver has written everything."""
        self.withdraw(guest, "disk")
        self.when_free("blockdev-del", node_name="disk")

    def resize(self, guest: Guest, size: int) -> Guest:
        """Change the size of the disk, which stays open, while no guest has it; return a new client of it."""
        self.withdraw(guest, "disk")
        self.when_free("block_resize", node_name="disk", size=size)
        return self.export("disk", writable=True)

    @property
    def ended(self) -> bool:
        """Whether the daemon is gone, by itself."""
        try:
            self._process.wait(0.2)  # its sockets close a moment before it can be waited for
        except subprocess.TimeoutExpired:
            return False
        return True

    @property
    def said(self) -> str:
        """What the daemon has printed so far."""
        self._said.seek(0)
        return self._said.read().decode(errors="replace").strip()

    def close(self) -> None:
        """End the daemon, whatever it is doing."""
        self._process.kill()
        self._process.wait()
        self._socket.close()
        self._said.close()
        self._directory.cleanup()


class Operation(NamedTuple):
    """What a guest asks. `kind`: write, zero, unmap (a zero that may deallocate), discard, read, flush; or what its
    host does to the snapshot `name`: create, delete."""

    kind: str
    offset: int = 0
    length: int = 0
    name: str = ""

    def __str__(self) -> str:
        if self.kind == "flush":
            return "flush"
        if self.kind in SNAPSHOT:
            return f"snapshot {self.kind} {self.name}"
        where = " ".join(f"{n >> 10}k" if n and n % 1024 == 0 else str(n) for n in (self.offset, self.length))
        return f"zero {where} unmap" if self.kind == "unmap" else f"{self.kind} {where}"

    def waits_for(self, other: Operation) -> bool:
        """Whether this is not begun while `other` is in flight: both change a sector, or are the host's."""
        if self.kind in SNAPSHOT or other.kind in SNAPSHOT:
            return self.kind in SNAPSHOT and other.kind in SNAPSHOT
        met = self.offset < other.offset + other.length and other.offset < self.offset + self.length
        return met and "read" not in (self.kind, other.kind)


class Issued:
    """An operation of a history. `issued` and `completed` (None: not yet) are times of the guest's own clock."""

    def __init__(self, number: int, operation: Operation, issued: int) -> None:
        self.number = number
        self.operation = operation
        self.issued = issued
        self.completed: int | None = None
        self.data: Data = b""  # what a read returned
        self.error = 0


class Held(Protocol):
    """What a driver must know of the server below QEMU: `powercut.capture.holding.Gate`."""

    moves: int

    @property
    def idle(self) -> bool: ...

    @property
    def holding(self) -> int: ...

    def release(self) -> None: ...

    def nudge(self) -> None: ...


class Hang(Exception):
    """An operation was not answered although nothing was held."""


class Driver:
    """Issues operations and knows when the next may be issued."""

    def __init__(self, guest: Guest, control: Control, server: Held) -> None:
        self._guest, self._control, self._server = guest, control, server
        self.clock = 0
        self.log: list[Issued] = []
        self.pending: dict[int, Issued] = {}
        self._stocked = 0
        self._managed: Issued | None = None  # what the host began and the daemon has not done

    def conflicts(self, operation: Operation) -> bool:
        """Whether the guest waits with this until something is answered."""
        return self.full(operation) or any(operation.waits_for(other.operation) for other in self.pending.values())

    def full(self, operation: Operation) -> bool:
        """Whether there is no room for this: until a snapshot is done, the daemon reads nothing from its guest."""
        asked = [operation, *(other.operation for other in self.pending.values())]
        return self._managed is not None and sum(o.length for o in asked if o.kind == "write") > _ROOM

    def issue(self, operation: Operation) -> None:
        """Issue an operation; a write bears stamps of its number."""
        self.clock += 1
        issued = Issued(len(self.log) + 1, operation, self.clock)
        self.log.append(issued)
        self.pending[issued.number] = issued
        kind, offset, length, name = operation
        if kind in SNAPSHOT:
            self._managed = issued
            self._control.begin(SNAPSHOT[kind], device="disk", name=name)
            return
        data = stamp.make(issued.number, 0, offset // SECTOR, length // SECTOR) if kind == "write" else b""
        self._guest.submit(COMMANDS[kind], offset, length, data, may_unmap=kind == "unmap", tag=issued.number)

    def stock(self, offset: int) -> None:
        """Read at `offset` until enough of such reads are in flight: the server keeps them (`Gate.nudge`)."""
        while self._stocked < _STOCK:
            self._stocked += 1
            self._guest.submit(Command.READ, offset, SECTOR)

    def _take(self) -> bool:
        """Take one answer if it comes soon."""
        if self._managed is not None and self._control.answer(0) is not None:
            self.clock += 1
            self._managed.completed = self.clock
            del self.pending[self._managed.number]
            self._managed = None
            return True
        reply = self._guest.poll(_STEP)
        if reply is None:
            return False
        if reply.tag is None:
            self._stocked -= 1
            return False
        self.clock += 1
        done = self.pending.pop(reply.tag)
        done.completed, done.data, done.error = self.clock, reply.data, reply.error
        return True

    def wait(self) -> None:
        """Wait for one answer. What the server holds, now or while this waits, it lets go: it may be waited for."""
        deadline = time.monotonic() + _HANG
        while not self._take():
            self._server.release()
            self._server.nudge()
            self._late(deadline)

    def _late(self, deadline: float) -> None:
        if time.monotonic() > deadline:
            numbers = ", ".join(map(str, self.pending))
            raise Hang(f"operation {numbers} was not answered for {_HANG:.0f} s, and nothing was held")

    def settle(self) -> None:
        """Wait until everything is answered, or nothing moves because the format driver waits for what is held."""
        quiet, moves = 0, -1
        deadline = time.monotonic() + _HANG
        while self.pending and quiet < _ROUNDS:
            if self._take():
                quiet = 0
            elif self._server.idle and self._server.moves == moves:
                if not quiet:
                    self._server.nudge()
                if self._server.holding:
                    self._wait_a_turn()
                    quiet += 1
                else:
                    self._late(deadline)
            else:
                quiet, moves = 0, self._server.moves
                self._late(deadline)

    def _wait_a_turn(self) -> None:
        """Return when the daemon went around its loop, as far as that can be known."""
        if self._managed is None:
            self._control.ping()
        else:
            time.sleep(_STILL)

    def drain(self) -> None:
        """Wait until everything is answered. The server keeps no more, but what was on its way may still get there."""
        while self.pending:
            self.wait()
        deadline = time.monotonic() + _HANG
        while self._stocked:
            if not self._take():
                self._server.nudge()
            self._late(deadline)
