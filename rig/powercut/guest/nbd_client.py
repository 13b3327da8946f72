"""A small NBD client over a unix socket: many requests on the way, one thread.

Speaks what `quire.nbd` speaks (the protocol is doc/proto.md of the NetworkBlockDevice project), and so to
any server that offers the fixed newstyle: simple replies, no TLS. Requests are sent as given: whoever calls
keeps to `block_size` and to `max_length` (for reads and writes), or hears EINVAL, or loses the connection.

Nothing waits for ever: a server that is silent for `timeout` seconds counts as lost.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
from collections import deque
from types import TracebackType
from typing import Any, NamedTuple, Self

from powercut.errors import EnvironmentFault
from quire import nbd_protocol as nbd
from quire.nbd_protocol import Command, CommandFlag, Data, Info, Option, OptionReply, TransmissionFlag

_BUFFER = 256 << 10
_COOKIE = struct.Struct(">Q")


class Reply(NamedTuple):
    """The answer to one request: `error` is 0 or an errno, `data` what a read returned."""

    tag: Any
    error: int
    data: Data


class Client:
    """A connection to the export `export` at the unix socket `path`; a context manager.

    Raises EnvironmentFault when the server cannot be reached, breaks the protocol, or is lost.
    """

    def __init__(self, path: str | os.PathLike[str], export: str = "", timeout: float = 60.0) -> None:
        self.path = os.fspath(path)
        self.size = 0
        self.flags = TransmissionFlag(0)
        self.block_size = 1  # what the protocol assumes of a server that does not say
        self.preferred_block = 4096
        self.max_length = nbd.MAX_REQUEST
        self._timeout = timeout
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(timeout)
        self._poll = select.poll()
        self._asked: dict[int, tuple[Any, int]] = {}  # cookie: tag, bytes that its reply brings
        self._cookie = 0
        self._replies: deque[Reply] = deque()
        self._buffer = bytearray(_BUFFER)
        self._view = memoryview(self._buffer)
        self._start = self._end = 0
        self._answer: tuple[Any, bytearray] | None = None  # a read whose data is on its way
        self._rest = memoryview(b"")
        try:
            self._socket.connect(self.path)
            self._negotiate(export.encode())
            self._socket.setblocking(False)
            self._poll.register(self._socket, select.POLLIN)
        except OSError as error:
            self._socket.close()
            raise self._lost(str(error)) from None
        except EnvironmentFault:
            self._socket.close()
            raise

    # ---- negotiation

    def _lost(self, why: str) -> EnvironmentFault:
        return EnvironmentFault(
            f"{self.path}: NBD connection lost, {self.pending - len(self._replies)} requests unanswered: {why}"
        )

    def _exactly(self, length: int) -> bytes:
        received = b""
        while len(received) < length:
            part = self._socket.recv(length - len(received))
            if not part:
                raise self._lost("the server hung up during negotiation")
            received += part
        return received

    def _negotiate(self, name: bytes) -> None:
        magic, option_magic, flags = nbd.GREETING.unpack(self._exactly(nbd.GREETING.size))
        if magic != nbd.INIT_MAGIC or option_magic != nbd.OPTION_MAGIC or not flags & nbd.FIXED_NEWSTYLE:
            raise self._lost(f"not a newstyle NBD server: it begins with {magic + option_magic!r}")
        data = struct.pack(f">I{len(name)}sHH", len(name), name, 1, Info.BLOCK_SIZE)
        client = (flags & (nbd.FIXED_NEWSTYLE | nbd.NO_ZEROES)).to_bytes(4, "big")
        self._socket.sendall(client + nbd.OPTION.pack(nbd.OPTION_MAGIC, Option.GO, len(data)) + data)
        while True:
            magic, option, reply, length = nbd.OPTION_REPLY.unpack(self._exactly(nbd.OPTION_REPLY.size))
            if magic != nbd.OPTION_REPLY_MAGIC or option != Option.GO or length > _BUFFER:
                raise self._lost(f"malformed option reply: magic {magic:#x}, option {option}, length {length}")
            data = self._exactly(length)
            if reply == OptionReply.ACK:
                return
            if reply != OptionReply.INFO:
                raise self._lost(f"export {name.decode()!r} refused with {reply:#x} {data.decode(errors='replace')!r}")
            kind = int.from_bytes(data[:2], "big")
            if kind == Info.EXPORT and length == nbd.EXPORT_INFO.size:
                _, self.size, flags = nbd.EXPORT_INFO.unpack(data)
                self.flags = TransmissionFlag(flags)
            elif kind == Info.BLOCK_SIZE and length == nbd.BLOCK_SIZE_INFO.size:
                _, self.block_size, self.preferred_block, self.max_length = nbd.BLOCK_SIZE_INFO.unpack(data)

    # ---- many requests

    @property
    def pending(self) -> int:
        """How many requests are not answered, or answered and not yet waited for."""
        return len(self._asked) + len(self._replies) + (self._answer is not None)

    def submit(
        self,
        kind: Command,
        offset: int = 0,
        length: int = 0,
        data: Data = b"",
        fua: bool = False,
        may_unmap: bool = False,
        tag: Any = None,
    ) -> None:
        """Send one request; `wait` returns its answer under `tag`. The length of a write is that of its data."""
        length = len(data) if kind is Command.WRITE else length
        flags = CommandFlag.FUA if fua else 0
        if kind is Command.WRITE_ZEROES and not may_unmap:
            flags |= CommandFlag.NO_HOLE
        self._cookie += 1
        self._asked[self._cookie] = tag, length if kind is Command.READ else 0
        cookie = _COOKIE.pack(self._cookie)
        head = nbd.REQUEST.pack(nbd.REQUEST_MAGIC, flags, kind, cookie, offset, length)
        self._send([head, data] if data else [head])

    def wait(self) -> Reply:
        """The next answer, in whatever order the server gives them."""
        while not self._replies:
            if not self._asked and self._answer is None:
                raise ValueError(f"{self.path}: nothing was asked, so no answer will come")
            if not self._receive():
                self._pause(select.POLLIN)
        return self._replies.popleft()

    def _send(self, parts: list[Data]) -> None:
        """Send all of it. While the server takes nothing more, take its answers: it may wait for that."""
        total = sum(map(len, parts))
        try:
            sent = self._socket.sendmsg(parts)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            raise self._lost(str(error)) from None
        if sent == total:
            return
        rest = memoryview(b"".join(parts))[sent:]
        while rest:
            if self._pause(select.POLLIN | select.POLLOUT) & select.POLLIN:
                self._receive()
            try:
                rest = rest[self._socket.send(rest) :]
            except BlockingIOError:
                pass
            except OSError as error:
                raise self._lost(str(error)) from None

    def _pause(self, events: int) -> int:
        self._poll.modify(self._socket, events)
        ready = self._poll.poll(self._timeout * 1000)
        if not ready:
            raise self._lost(f"silent for {self._timeout} s")
        return ready[0][1]

    def _receive(self) -> bool:
        """Take what has arrived. False if that was nothing."""
        try:
            count = self._socket.recv_into(self._rest if self._answer else self._view[self._end :])
        except BlockingIOError:
            return False
        except OSError as error:
            raise self._lost(str(error)) from None
        if not count:
            raise self._lost("the server hung up")
        if self._answer is not None:
            self._rest = self._rest[count:]
            if not self._rest:
                tag, data = self._answer
                self._answer = None
                self._replies.append(Reply(tag, 0, data))
        else:
            self._end += count
            self._parse()
        return True

    def _parse(self) -> None:
        """Turn the whole replies in the buffer into `_replies`."""
        start, end, head = self._start, self._end, nbd.SIMPLE_REPLY.size
        while end - start >= head:
            magic, error, cookie = nbd.SIMPLE_REPLY.unpack_from(self._buffer, start)
            asked = self._asked.pop(_COOKIE.unpack(cookie)[0], None)
            if magic != nbd.SIMPLE_REPLY_MAGIC or asked is None:
                raise self._lost(f"malformed reply: magic {magic:#x}, cookie {cookie.hex()}")
            tag, length = asked
            start += head
            if error or not length:
                self._replies.append(Reply(tag, error, b""))
                continue
            data = bytearray(length)
            have = min(length, end - start)
            data[:have] = self._view[start : start + have]
            start += have
            if have == length:
                self._replies.append(Reply(tag, 0, data))
            else:
                self._answer, self._rest = (tag, data), memoryview(data)[have:]
        kept = end - start
        self._view[:kept] = self._view[start:end]
        self._start, self._end = 0, kept

    # ---- one request

    def _do(self, kind: Command, offset: int = 0, length: int = 0, **more: Any) -> Data:
        """Submit one request and wait for its answer; others stay for `wait`. Raises OSError."""
        mine = object()
        self.submit(kind, offset, length, tag=mine, **more)
        others = []
        while (reply := self.wait()).tag is not mine:
            others.append(reply)
        self._replies.extendleft(reversed(others))
        if reply.error:
            raise OSError(reply.error, f"{os.strerror(reply.error)}: {kind.name} at {offset}, length {length}")
        return reply.data

    def read(self, offset: int, length: int) -> Data:
        return self._do(Command.READ, offset, length)

    def write(self, offset: int, data: Data, fua: bool = False) -> None:
        self._do(Command.WRITE, offset, len(data), data=data, fua=fua)

    def zero(self, offset: int, length: int, may_unmap: bool = False, fua: bool = False) -> None:
        self._do(Command.WRITE_ZEROES, offset, length, may_unmap=may_unmap, fua=fua)

    def discard(self, offset: int, length: int) -> None:
        self._do(Command.TRIM, offset, length)

    def flush(self) -> None:
        self._do(Command.FLUSH)

    def close(self) -> None:
        """Say goodbye and hang up. Answers nobody waited for are lost."""
        if self._socket.fileno() < 0:
            return
        with contextlib.suppress(EnvironmentFault):  # it is gone already
            self._send([nbd.REQUEST.pack(nbd.REQUEST_MAGIC, 0, Command.DISC, bytes(8), 0, 0)])
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
