"""Exports that hold requests: the disk of `powercut races`.

A `Gate` numbers every request by the guest operation that was issued last and its place behind it, and asks which
of them wait. They wait in the server; what comes after them goes on, until `release` lets them go, in the order
in which they came. Several exports (an image, its backing file) may share a gate.

Reads of one place may be kept in stock, to be answered when nothing else moves: see `Gate.nudge`.

As a control an export can be made wrong on purpose: `lie` says what happens to held requests when they are let go.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Final, NamedTuple

from powercut.trace import SECTOR
from quire.nbd import Server
from quire.nbd_protocol import Command, Data, Request

LIES: Final = ("drop", "misplace", "stale")
_STOCK: Final = -1  # the note of a read that is kept in stock
_WORDS = {
    Command.READ: "read",
    Command.WRITE: "write",
    Command.WRITE_ZEROES: "zero",
    Command.TRIM: "discard",
    Command.FLUSH: "flush",
}


class Label(NamedTuple):
    """A host request: the `request`-th since guest operation `operation` was issued, both counted from 1."""

    operation: int
    request: int


class Arrival(NamedTuple):
    """A host request that came: `what` in words. `until` as the gate was told, None if it was not held."""

    label: Label
    what: str
    until: int | None


Choice = Callable[[Label], int | None]  # before which guest operation a request is let go; None: it is not held


class Gate:
    """Decides which host requests wait, and knows whether anything moves."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._servers: list[Server] = []
        self._releasing = 0  # the thread that lets requests go
        self.moves = 0  # grows with every request that comes and every one that is answered
        self.arrivals: list[Arrival] = []
        self._open = 0
        self._held: list[tuple[int, Request]] = []
        self._choose: Choice | None = None
        self._stock: list[Request] = []
        self._stocked: range | None = None  # where what is read goes into stock
        self._last_read = 0
        self._operation = self._request = 0

    def arm(self, choose: Choice) -> None:
        """Count anew, and hold what `choose` says."""
        with self._lock:
            self.arrivals = []
            self._operation = self._request = 0
            self._choose = choose

    def disarm(self) -> None:
        """Number and hold nothing from now on."""
        with self._lock:
            self._choose = None

    def issuing(self, operation: int) -> None:
        """Guest operation `operation` is about to be issued: requests count from 1 again."""
        with self._lock:
            self._operation, self._request = operation, 0

    @property
    def holding(self) -> int:
        """How many requests wait."""
        return len(self._held)

    def watch(self, server: Server) -> None:
        """`server` serves an export behind this gate."""
        self._servers.append(server)

    @property
    def idle(self) -> bool:
        """Whether no request is being worked on, or has arrived and is not looked at yet: those that wait are not."""
        if any(server.unread for server in self._servers):
            return False
        with self._lock:
            return self._open == len(self._held)

    def release(self, before: int | None = None) -> None:
        """Let go what was held until operation `before`, or everything."""
        with self._lock:
            due = [request for until, request in self._held if before is None or until <= before]
            self._held = [entry for entry in self._held if entry[1] not in due]
            self._releasing = threading.get_ident()
        try:
            for request in due:
                request.finish()
        finally:
            self._releasing = 0

    @property
    def releases(self) -> bool:
        """Whether the caller is executing a request that was held."""
        return self._releasing == threading.get_ident()

    def keep_reads(self, length: int) -> None:
        """Put reads into stock from now on that lie where the last read was, or up to `length` bytes behind."""
        with self._lock:
            self._stocked = range(self._last_read, self._last_read + length)

    def keep_no_reads(self) -> None:
        """Answer all that is in stock."""
        self._stocked = None
        while self._stock:
            self.nudge()

    def nudge(self) -> None:
        """Answer one read that is in stock. QEMU's NBD client sometimes goes on with an answer that it has only when
        the next one arrives: before it wakes who waited for the answer, it takes the lock that whoever reads from the
        socket holds (block/nbd.c, `nbd_co_receive_one_chunk`). What is held would then seem to be waited for."""
        with self._lock:
            kept, self._stock = self._stock[:1], self._stock[1:]
        for request in kept:
            request.finish()

    # What the exports report

    def received(self, request: Request, name: str) -> None:
        with self._lock:
            if request.kind is Command.READ:
                if self._stocked is not None and request.offset in self._stocked:
                    request.note = _STOCK
                    return
                self._last_read = request.offset
            self.moves += 1
            self._open += 1
            request.note = None
            if self._choose is None:
                return
            self._request += 1
            label = Label(self._operation, self._request)
            until = self._choose(label)
            what = _WORDS[request.kind]
            if request.kind is not Command.FLUSH:
                what += f" of {request.length:,} bytes at {request.offset:#x}"
            self.arrivals.append(Arrival(label, f"{what} of the {name}", until))
            request.note = until

    def finishing(self, request: Request) -> None:
        if request.note != _STOCK:
            with self._lock:
                self.moves += 1
                self._open -= 1

    def held(self, request: Request) -> bool:
        with self._lock:
            if request.note == _STOCK:
                self._stock.append(request)
                return True
            if request.note is None or self._choose is None:
                return False
            self.moves += 1
            self._held.append((request.note, request))
            return True


class HoldingExport:
    """A disk in memory, called `name`, whose requests go through `gate`.

    A read is answered with what the disk holds when it is executed, as one piece: a held one when it is let go.
    """

    block_size = SECTOR

    def __init__(self, gate: Gate, name: str, size: int, lie: str | None = None) -> None:
        self.size = size
        self.data = bytearray(size)
        self._before = bytes(size)
        self._gate = gate
        self._name = name
        self._lie = lie

    def load(self, content: bytes) -> None:
        """Begin anew with `content`, and zeros behind it."""
        self._before = content.ljust(self.size, b"\0")
        self.data[:] = self._before

    # What the server observes

    def received(self, request: Request) -> None:
        self._gate.received(request, self._name)

    def finishing(self, request: Request, error_number: int) -> None:
        self._gate.finishing(request)

    def held(self, request: Request) -> bool:
        return self._gate.held(request)

    # The disk

    def _lies(self, how: str) -> bool:
        return self._lie == how and self._gate.releases

    def read(self, offset: int, length: int) -> Data:
        source = self._before if self._lies("stale") else self.data
        return bytes(source[offset : offset + length])  # not a view: another thread may write before it is sent

    def write(self, offset: int, data: Data, fua: bool) -> None:
        if self._lies("drop"):
            return
        if self._lies("misplace"):
            offset += SECTOR if offset + len(data) < self.size else -SECTOR
        self.data[offset : offset + len(data)] = data

    def zero(self, offset: int, length: int, may_unmap: bool, fua: bool) -> None:
        self.write(offset, bytes(length), fua)

    def discard(self, offset: int, length: int) -> None:
        self.zero(offset, length, True, False)

    def flush(self) -> None:
        """Nothing: memory is all there is."""
