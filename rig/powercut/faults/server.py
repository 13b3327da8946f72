"""A storage server, over NBD, that fails its n-th request, stalls, hangs up, or goes away and comes back.

QEMU's client is told to wait and to connect again (`reconnect-delay`), so of a server that hangs up or is away for a
moment the guest should see nothing. The disk behind the server is memory that survives it, and it cannot grow.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from powercut.faults import Armed
from powercut.faults.blkdebug import ERRNOS
from powercut.trace import SECTOR
from quire.nbd import Connection, Server
from quire.nbd_protocol import Command, Data, Request

PATIENCE: Final = 10  # seconds for which QEMU tries to connect again
AWAY: Final = 0.2  # seconds for which a server is gone
STALL: Final = 0.2
ROOM: Final = 4 << 20  # bytes that an image may grow by
WORDS: Final = {  # what may happen at a request, besides an error; the server does not answer it
    "stall": "it is answered late",
    "hangup": "the server hangs up and has not carried it out",
    "unanswered": "the server carries it out and hangs up",
    "gone": "the server ends, and comes back after a moment",
}


class _Disk:
    """The export. `strike` is asked before each request is carried out, and may keep it from that."""

    block_size = SECTOR

    def __init__(self, content: bytes, strike: Callable[[Request], bool]) -> None:
        self.size = (len(content) + ROOM) // SECTOR * SECTOR
        self.data = bytearray(content.ljust(self.size, b"\0"))
        self._strike = strike

    def received(self, request: Request) -> None:
        request.note = None

    def finishing(self, request: Request, error_number: int) -> None:
        request.note = None

    def held(self, request: Request) -> bool:
        return self._strike(request)

    def read(self, offset: int, length: int) -> Data:
        return self.data[offset : offset + length]

    def write(self, offset: int, data: Data, fua: bool) -> None:
        self.data[offset : offset + len(data)] = data

    def zero(self, offset: int, length: int, may_unmap: bool, fua: bool) -> None:
        self.data[offset : offset + length] = bytes(length)

    def discard(self, offset: int, length: int) -> None:
        return

    def flush(self) -> None:
        return

    def carry_out(self, request: Request) -> None:
        """Do what a request asks that nobody is going to hear of."""
        if request.kind is Command.WRITE:
            self.write(request.offset, request.data, request.fua)
        elif request.kind is Command.WRITE_ZEROES:
            self.zero(request.offset, request.length, request.may_unmap, request.fua)


@dataclass(slots=True)
class _Host:
    """Where the server runs. `back` is set as long as it is there."""

    path: Path
    disk: _Disk | None = None
    server: Server | None = None
    back: threading.Event = field(default_factory=threading.Event)
    threads: list[threading.Thread] = field(default_factory=list)

    def start(self) -> None:
        assert self.disk is not None
        self.server = Server(self.disk, self.path)
        self.server.start()
        self.back.set()

    def stop(self) -> None:
        assert self.server is not None
        self.server.stop()

    def leave(self) -> None:
        """Go away, and come back later: in a thread of its own, as the caller serves a request."""

        def away() -> None:
            self.stop()
            threading.Event().wait(AWAY)
            self.start()

        self.back.clear()
        self.threads.append(threading.Thread(target=away))
        self.threads[-1].start()

    def close(self) -> None:
        for thread in self.threads:
            thread.join()
        self.stop()


@contextmanager
def _served(template: Path, out: Path, strike: Callable[[_Host, Request], bool]) -> Iterator[dict[str, Any]]:
    """Serve a copy of `template`; give its node, and in the end put it into `out`."""
    with tempfile.TemporaryDirectory(prefix="powercut-") as folder:
        host = _Host(Path(folder) / "disk.sock")
        disk = host.disk = _Disk(template.read_bytes(), lambda request: strike(host, request))
        host.start()
        try:
            address = {"type": "unix", "path": str(host.path)}
            yield {"driver": "nbd", "server": address, "discard": "unmap", "reconnect-delay": PATIENCE}
        finally:
            host.close()
            out.write_bytes(disk.data)


@dataclass(frozen=True, slots=True)
class Mishap:
    """At request number `nth` (from 1; 0: never) the server does what `error` says: EIO, ENOSPC, or a word of WORDS.
    `times`: 1, or None: an error, at all requests from there on (ENOSPC: all that write)."""

    nth: int
    error: str = "EIO"
    times: int | None = 1

    def __str__(self) -> str:
        return f"{self.error} {'once' if self.times else 'for good'} at request {self.nth}"

    @property
    def lasting(self) -> str:
        return "once" if self.times else "good"

    @property
    def table(self) -> dict[str, Any]:
        return {"below": "server", "nth": self.nth}

    def earlier(self) -> Iterator[Mishap]:
        yield from (replace(self, nth=nth) for nth in range(self.nth, 0, -1))

    @contextmanager
    def armed(self, template: Path, out: Path) -> Iterator[Armed]:
        lock, came = threading.Lock(), 0

        def strike(host: _Host, request: Request) -> bool:
            nonlocal came
            with lock:
                came += 1
                due = came == self.nth or (self.times is None and came > self.nth)
            return due and self._strike(host, request)

        with _served(template, out, strike) as node:
            yield Armed(node, occasions=lambda: came)

    def _strike(self, host: _Host, request: Request) -> bool:
        """Let it happen. True: the request is never answered."""
        writes = request.kind in (Command.WRITE, Command.WRITE_ZEROES)
        if self.error in ERRNOS:
            if self.error == "EIO" or writes or (request.kind is Command.FLUSH and self.times):
                raise OSError(ERRNOS[self.error], "injected")
            return False
        if self.error == "stall":
            threading.Event().wait(STALL)
            return False
        assert host.disk is not None
        if self.error == "unanswered":
            host.disk.carry_out(request)
        if self.error == "gone":
            host.leave()
        else:
            assert isinstance(request.connection, Connection)
            request.connection.hang_up()
        return True
