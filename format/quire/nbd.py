"""The NBD server: an export on a unix socket, under any hypervisor.

The protocol is the NetworkBlockDevice project's doc/proto.md; names in capitals are its names without the
prefix. Spoken here: fixed newstyle negotiation (GO, INFO, LIST, EXPORT_NAME, ABORT), simple replies, one
export under any name. Structured replies, metadata contexts and TLS are declined.

What happens first. A client such as QEMU puts many requests on one connection. A server that finishes each
before it reads the next would make a disk on which nothing ever overlaps, and a recorder behind it would
miss most of what a power cut can do. So everything that can be read is read, and shown to the observer,
before anything is executed:

    read all that has arrived -> received(each) -> execute -> finishing(each) -> one send for all replies

A request of which only a part has arrived was issued too: its rest is waited for, for PATIENCE seconds. Only
BATCH and BATCH_BYTES end a batch earlier. Flushes are executed last, after the replies of the others went out.

Who is at fault. A request that makes no sense is answered with an errno of the protocol; observers do not
see it. A client whose bytes cannot be framed loses its connection. An OSError from the export is the disk's
answer. Any other exception is a bug: its request is answered with EIO, the first one is raised by `stop`.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Final, Self

from quire.nbd_handshake import Handshake, Unframeable
from quire.nbd_protocol import (
    MAX_MINIMUM_BLOCK,
    MAX_REQUEST,
    REQUEST,
    REQUEST_MAGIC,
    SIMPLE_REPLY,
    SIMPLE_REPLY_MAGIC,
    Command,
    CommandFlag,
    Data,
    Export,
    Holder,
    Observer,
    Request,
)

PATIENCE: Final = 0.1
BATCH: Final = 256  # two buffers each in one sendmsg: stays below IOV_MAX
BATCH_BYTES: Final = 64 << 20
_BUFFER = 4 << 20
_LARGE = 256 << 10  # a payload of this size that is still on its way is received straight into its own memory
_REPLY_BYTES = 512 << 10  # replies to reads wait for each other up to here; malloc gives more back to the kernel


# Plain names: looking a member up in its class costs more than the rest of a request's checks.
_READ, _WRITE, _DISC, _FLUSH = Command.READ, Command.WRITE, Command.DISC, Command.FLUSH
_TRIM, _WRITE_ZEROES = Command.TRIM, Command.WRITE_ZEROES
_FUA, _NO_HOLE = int(CommandFlag.FUA), int(CommandFlag.NO_HOLE)
_COMMANDS = {int(command): command for command in Command}
_DONE = struct.pack(">II", SIMPLE_REPLY_MAGIC, 0)

_ERRNOS = {  # the errors that the protocol can carry; everything else is EIO
    number: number
    for number in (
        errno.EPERM,
        errno.EIO,
        errno.ENOMEM,
        errno.EINVAL,
        errno.ENOSPC,
        errno.EOVERFLOW,
        errno.ENOTSUP,
        errno.ESHUTDOWN,
    )
} | {errno.EDQUOT: errno.ENOSPC, errno.EFBIG: errno.ENOSPC, errno.EROFS: errno.EPERM, errno.EACCES: errno.EPERM}


class Connection:
    """One client: its socket, its thread, and the requests it waits for."""

    def __init__(self, server: Server, number: int, connected: socket.socket) -> None:
        self.number = number
        self.thread = threading.Thread(target=self._serve, name=f"nbd-{number}", daemon=True)
        self._server = server
        self._export = server.export
        self._socket = connected
        self._size = self._export.size
        self._misaligned = self._export.block_size - 1
        self._read_only = bool(getattr(self._export, "read_only", False))
        self._observer = self._export if isinstance(self._export, Observer) else None
        self._holder = self._export if isinstance(self._export, Holder) else None
        self._lock = threading.Lock()  # sending, and the three below
        self._held: set[Request] = set()
        self._waiting = 0  # held requests that have not been answered
        self._reading = True

        self._ended = False
        self._buffer = mmap.mmap(-1, _BUFFER)  # unlike a bytearray, not touched before it is used
        self._view = memoryview(self._buffer)
        self._start = self._end = 0  # what was received and not yet understood
        self._large: Request | None = None  # a write whose payload is on its way
        self._rest = memoryview(b"")  # the part of its memory that is still empty

    # ---- the thread

    def _serve(self) -> None:
        try:
            if Handshake(self._socket, self._export).negotiate():
                while not self._ended:
                    self._execute(self._read_batch())
        except (Unframeable, OSError):  # hung up, hostile or half dead: the connection is all it loses
            pass
        except Exception as error:
            self._server.failed(error)
        finally:
            with self._lock:
                self._reading = False
                over = not self._waiting
            if over:
                self.close()

    def hang_up(self) -> None:
        """Wake whoever waits on the socket."""
        with contextlib.suppress(OSError):  # it is closed already
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._socket.close()
        self._server.forget(self)

    @property
    def unread(self) -> bool:
        """Whether something has arrived that was not read yet."""
        waiting = select.poll()
        with contextlib.suppress(OSError, ValueError):  # it was closed meanwhile
            waiting.register(self._socket, select.POLLIN)
        return bool(waiting.poll(0))

    # ---- reading

    def _read_batch(self) -> list[Request]:
        """Wait for one request; then take all that have arrived. Sets `_ended` when there will be no more."""
        if self._start:  # nobody looks at the payloads of the last batch any more
            kept = self._end - self._start
            self._view[:kept] = self._view[self._start : self._end]
            self._start, self._end = 0, kept
        batch: list[Request] = []
        weight, drained = 0, False
        while True:
            weight += self._parse(batch)
            if self._ended or len(batch) >= BATCH or weight >= BATCH_BYTES:
                return batch
            if drained and batch and not self._large and self._start == self._end:
                return batch  # asking once more would cost as much as a request, only to hear that there is nothing
            room = self._rest if self._large else self._view[self._end :]
            if not room:
                return batch
            try:
                count = self._socket.recv_into(room, 0, socket.MSG_DONTWAIT if batch else 0)
            except BlockingIOError:
                if (self._large or self._start < self._end) and self._more():
                    continue
                return batch
            except ConnectionError:
                count = 0
            if not count:
                self._ended = True  # what was read before counts: it was issued
                return batch
            drained = count < len(room)
            if self._large:
                self._rest = self._rest[count:]
            else:
                self._end += count

    def _more(self) -> bool:
        """Whether the rest of a request comes soon."""
        waiting = select.poll()
        waiting.register(self._socket, select.POLLIN)
        return bool(waiting.poll(PATIENCE * 1000))

    def _parse(self, batch: list[Request]) -> int:
        """Move every whole request from the buffer to `batch`. Returns the bytes of payload."""
        buffer, view, start, end = self._buffer, self._view, self._start, self._end
        unpack, head = REQUEST.unpack_from, REQUEST.size
        weight = 0
        if self._large is not None:
            if self._rest:
                return 0
            weight += self._large.length
            self._admit(self._large, batch)
            self._large = None
        while end - start >= head and len(batch) < BATCH:
            magic, flags, kind, cookie, offset, length = unpack(buffer, start)
            if magic != REQUEST_MAGIC:
                self._ended = True  # what was read before counts, as when a client hangs up
                break
            command = _COMMANDS.get(kind)
            after = start + head
            data: Data = b""
            if command is _WRITE:
                if length > MAX_REQUEST:
                    self._ended = True
                    break
                after += length
                if after <= end:
                    data = view[start + head : after]
                elif length < _LARGE and after <= _BUFFER:
                    break
                else:
                    have = end - start - head
                    data = bytearray(length)
                    data[:have] = view[start + head : end]
                    self._rest = memoryview(data)[have:]
            elif command is _DISC:
                self._ended = True
                break
            known, may_unmap = _FUA, False
            if command is _WRITE_ZEROES:
                known, may_unmap = _FUA | _NO_HOLE, not flags & _NO_HOLE
            fua = flags & _FUA != 0
            request = Request(
                self, cookie, _FLUSH if command is None else command, offset, length, data, fua, may_unmap
            )
            if command is None or flags & ~known:
                request.error = errno.EINVAL
            elif command is _FLUSH:
                if offset or length:
                    request.error = errno.EINVAL
            elif self._read_only and command is not _READ:
                request.error = errno.EPERM
            elif not length or (offset | length) & self._misaligned or (command is _READ and length > MAX_REQUEST):
                request.error = errno.EINVAL
            elif offset + length > self._size:
                request.error = errno.ENOSPC if command in (_WRITE, _WRITE_ZEROES) else errno.EINVAL
            if after > end:
                self._large = request
                start = end
                break
            start = after
            weight += len(data)
            self._admit(request, batch)
        self._start, self._end = start, end
        return weight

    def _admit(self, request: Request, batch: list[Request]) -> None:
        if self._observer is not None and not request.error:
            try:
                self._observer.received(request)
            except Exception as error:
                request.error = self._server.errno(error)
        batch.append(request)

    # ---- executing

    def _execute(self, batch: list[Request]) -> None:
        refused: list[Request] = []
        done: list[Request] = []
        flushes: list[Request] = []
        size = 0
        for request in batch:
            if request.error:
                refused.append(request)
            elif self._holder is not None and self._hold(self._holder, request):
                continue
            elif request.kind is _FLUSH:
                flushes.append(request)
            else:
                self._perform(request)
                done.append(request)
                size += len(request.answer)
                if size >= _REPLY_BYTES:
                    self._reply(done)
                    done, size = [], 0
        if refused:
            self._send(refused)
        if done:
            self._reply(done)
        for request in flushes:
            self._perform(request)
            self._reply((request,))

    def _hold(self, holder: Holder, request: Request) -> bool:
        """Ask whether `request` is to wait. Somebody may finish it before the answer is here."""
        request.data = bytes(request.data)  # the buffer goes on to the next batch
        with self._lock:
            self._held.add(request)
            self._waiting += 1
        try:
            if holder.held(request):
                return True
        except Exception as error:
            request.error = self._server.errno(error)
        with self._lock:
            if request not in self._held:
                return True
            self._held.remove(request)
            self._waiting -= 1
        if request.error:
            self._reply((request,))
        return bool(request.error)

    def finish(self, request: Request) -> None:
        with self._lock:
            if request not in self._held:
                raise RuntimeError(f"{request} is not held: it was finished before, or never kept")
            self._held.remove(request)
        self._perform(request)
        self._reply((request,))
        with self._lock:
            self._waiting -= 1
            over = not self._reading and not self._waiting
        if over:
            self.close()

    def _perform(self, request: Request) -> None:
        export, kind = self._export, request.kind
        try:
            if kind is _WRITE:
                export.write(request.offset, request.data, request.fua)
            elif kind is _READ:
                request.answer = answer = export.read(request.offset, request.length)
                if len(answer) != request.length:
                    request.answer = b""
                    raise ValueError(f"{request}: the export returned {len(answer)} bytes")
            elif kind is _FLUSH:
                export.flush()
            elif kind is _TRIM:
                export.discard(request.offset, request.length)
                if request.fua:
                    export.flush()
            else:
                export.zero(request.offset, request.length, request.may_unmap, request.fua)
        except Exception as error:
            request.error = self._server.errno(error)

    def _reply(self, done: Sequence[Request]) -> None:
        if self._observer is not None:
            for request in done:
                try:
                    self._observer.finishing(request, request.error)
                except Exception as error:
                    request.error = self._server.errno(error)
        self._send(done)

    def _send(self, done: Sequence[Request]) -> None:
        """Answer all of `done` with one system call."""
        parts: list[Data] = []
        size = 0
        for request in done:
            if request.error:
                parts.append(SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, request.error, request.cookie))
                continue
            parts.append(_DONE + request.cookie)
            if request.kind is _READ:
                parts.append(request.answer)
                size += request.length
        with self._lock, contextlib.suppress(OSError):  # the client went away: what it asked was done
            if not size:
                self._socket.sendall(b"".join(parts))
                return
            size += len(done) * SIMPLE_REPLY.size - self._socket.sendmsg(parts)
            if size > 0:
                self._socket.sendall(memoryview(b"".join(parts))[-size:])
        for request in done:
            request.answer = b""  # its memory serves the next read


class Server:
    """Serves `export` on the unix socket `path` from `start` to `stop`, once; a context manager.

    `stop` raises the first exception of the export, or of its observer, that was not an OSError.
    """

    def __init__(self, export: Export, path: str | os.PathLike[str]) -> None:
        block = export.block_size
        if not 0 < block <= MAX_MINIMUM_BLOCK or block & (block - 1):
            raise ValueError(f"block size {block} is not a power of two from 1 to {MAX_MINIMUM_BLOCK}")
        if export.size % block:
            raise ValueError(f"size {export.size} is not a multiple of the block size {block}")
        self.export = export
        self.path = os.fspath(path)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._thread = threading.Thread(target=self._accept, name="nbd-accept", daemon=True)
        self._lock = threading.Lock()
        self._connections: set[Connection] = set()
        self._count = 0
        self._stopping = False
        self._failure: Exception | None = None

    def start(self) -> None:
        try:
            self._listener.bind(self.path)
            self._listener.listen(64)
        except OSError as error:
            self._listener.close()
            raise OSError(error.errno, f"{self.path}: cannot listen: {error.strerror or error}") from None
        self._thread.start()

    def stop(self, timeout: float = 60.0) -> None:
        """Drop every connection, wait for the threads, remove the socket. Held requests stay undone."""
        with self._lock:
            if self._stopping:
                return
            self._stopping = True
            connections = list(self._connections)
        if self._thread.ident is None:  # never started: the path is not ours
            self._listener.close()
            return
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept
        self._listener.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)
        for connection in connections:
            connection.hang_up()
        deadline = time.monotonic() + timeout
        for thread in [self._thread, *(connection.thread for connection in connections)]:
            if thread is threading.current_thread():
                continue
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                raise RuntimeError(f"{self.path}: {thread.name} is still busy {timeout} s after the server was stopped")
        for connection in connections:
            connection.close()
        if self._failure is not None:
            raise self._failure

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _accept(self) -> None:
        while True:
            try:
                connected, _ = self._listener.accept()
            except OSError as error:
                if self._stopping:
                    return
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    time.sleep(0.05)  # others may give some back; the client waits in the backlog
                    continue
                self.failed(error)
                return
            with self._lock:
                if self._stopping:
                    connected.close()
                    return
                self._count += 1
                connected.setblocking(True)  # whatever the default timeout of this process is
                try:
                    connection = Connection(self, self._count, connected)
                    connection.thread.start()
                except Exception as error:  # no thread to be had, or an export that cannot tell its size
                    connected.close()
                    self._failure = self._failure or error
                else:
                    self._connections.add(connection)

    @property
    def unread(self) -> bool:
        """Whether some client has sent what was not read yet."""
        with self._lock:
            connections = list(self._connections)
        return any(connection.unread for connection in connections)

    def forget(self, connection: Connection) -> None:
        with self._lock:
            self._connections.discard(connection)

    def failed(self, error: Exception) -> None:
        """Remember a bug: `stop` raises the first."""
        with self._lock:
            self._failure = self._failure or error

    def errno(self, error: Exception) -> int:
        """The errno by which a client learns of `error`."""
        if isinstance(error, OSError):
            return _ERRNOS.get(error.errno or 0, errno.EIO)
        self.failed(error)
        return errno.EIO
