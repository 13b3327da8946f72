"""What the driver asks of its file, and how that is answered.

The driver is written as coroutines that await each request to the file and never wait for anything else. Whoever runs
one decides when a request completes, and in which order those of several guest requests do; so one driver serves a
single thread, an NBD server, and every interleaving that a test wants to see. A file answers in two steps, `begin`
when a request is issued and `finish` when it completes, so that a recording keeps what overlapped.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Coroutine, Generator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, TypeVar

import numpy as np

from powercut.disk import Bytes, Variants
from powercut.trace import Kind, TraceWriter

T = TypeVar("T")
READ = 0  # the kind of a request that changes nothing; the others are a trace's


@dataclass(frozen=True, slots=True)
class Ask:
    """One request to the file: a read, WRITE or FLUSH. Awaiting it gives what a read read."""

    kind: int
    offset: int = 0
    length: int = 0
    data: bytes = b""

    def __await__(self) -> Generator[Ask, bytes, bytes]:
        return (yield self)


@dataclass(frozen=True, slots=True)
class Until:
    """Awaiting it takes until `ready` says so; nothing else runs between its word and the next line."""

    ready: Callable[[], bool]

    def __await__(self) -> Generator[Until, bytes, None]:
        if not self.ready():
            yield self


Running = Coroutine[Any, Any, T]


def read(offset: int, length: int) -> Ask:
    return Ask(READ, offset, length)


def write(offset: int, data: bytes) -> Ask:
    return Ask(Kind.WRITE, offset, len(data), data)


def flush() -> Ask:
    return Ask(Kind.FLUSH)


class Lock:
    """Held by one coroutine at a time."""

    def __init__(self) -> None:
        self._held = False

    async def __aenter__(self) -> None:
        await Until(lambda: not self._held)
        self._held = True

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._held = False


class File(Protocol):
    """Answers requests. `finish` returns what a read read, and raises OSError for a request that failed."""

    def begin(self, ask: Ask) -> Any: ...

    def finish(self, ask: Ask, begun: Any) -> bytes: ...


class MemoryFile:
    """A file in memory; it grows as it is written to. It is also a `powercut.disk.Disk`."""

    def __init__(self, content: bytes = b"", size: int = 0) -> None:
        self.content = bytearray(content)
        self.content += bytes(max(0, size - len(content)))
        self.size = len(self.content)

    def begin(self, ask: Ask) -> Any:
        return None

    def finish(self, ask: Ask, begun: Any) -> bytes:
        stop = ask.offset + ask.length
        if ask.kind == READ:
            data = bytes(self.content[ask.offset : stop])
            return data + bytes(ask.length - len(data))
        if ask.kind == Kind.WRITE:
            if stop > self.size:
                self.content += bytes(stop - self.size)
                self.size = stop
            self.content[ask.offset : stop] = ask.data
        return b""

    def read(self, offset: int, length: int) -> Bytes:
        return np.frombuffer(self.finish(read(offset, length), None), dtype=np.uint8)

    def variants(self, offset: int, length: int) -> Variants:
        return Variants(self.read(offset, length))


class OpenFile:
    """An ordinary file. Flushes do nothing: what is tried on it is the driver, not the disk below."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)

    def begin(self, ask: Ask) -> Any:
        return None

    def finish(self, ask: Ask, begun: Any) -> bytes:
        if ask.kind == READ:
            data = os.pread(self._fd, ask.length, ask.offset)
            return data + bytes(ask.length - len(data))
        if ask.kind == Kind.WRITE:
            os.pwrite(self._fd, ask.data, ask.offset)
        return b""

    def close(self) -> None:
        os.close(self._fd)


class Recorded:
    """Records what is asked of `below` as events of file `file` of a trace."""

    def __init__(self, below: File, writer: TraceWriter, file: int) -> None:
        self._below, self._writer, self._file = below, writer, file

    def begin(self, ask: Ask) -> Any:
        position = -1
        if ask.kind != READ:
            data = ask.data if ask.kind == Kind.WRITE else None
            position = self._writer.issue(Kind(ask.kind), self._file, ask.offset, ask.length, data=data)
        return position, self._below.begin(ask)

    def finish(self, ask: Ask, begun: Any) -> bytes:
        position, below = begun
        error = 0
        try:
            return self._below.finish(ask, below)
        except OSError as failed:
            error = failed.errno or 5
            raise
        finally:
            if position >= 0:
                self._writer.complete(position, error)


class Failing:
    """Fails request number `at` (from 0, reads included) with `error`; if `full`, every later write too."""

    def __init__(self, below: File, at: int, full: bool, error: int) -> None:
        self._below, self._at, self._full, self._error = below, at, full, error
        self.asked = 0

    def begin(self, ask: Ask) -> Any:
        number, self.asked = self.asked, self.asked + 1
        return number, self._below.begin(ask)

    def finish(self, ask: Ask, begun: Any) -> bytes:
        number, below = begun
        if number == self._at or (self._full and 0 <= self._at < number and ask.kind == Kind.WRITE):
            raise OSError(self._error, os.strerror(self._error))
        return self._below.finish(ask, below)


def run(work: Running[T], file: File) -> T:
    """Run one coroutine to its end, each request completed as soon as it was issued."""
    answer: bytes | None = None
    error: OSError | None = None
    while True:
        try:
            asked = work.throw(error) if error is not None else work.send(answer)
        except StopIteration as done:
            result: T = done.value
            return result
        answer, error = None, None
        if isinstance(asked, Until):
            assert asked.ready(), "a coroutine that runs alone waits for another"
            continue
        try:
            answer = file.finish(asked, file.begin(asked))
        except OSError as failed:
            error = failed
