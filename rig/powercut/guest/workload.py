"""Stamped operations: what a guest asks of its disk, chosen from a seed or written down one by one.

Operations never overlap with one that is still in flight, as no file system's do; so of two writes to a sector
it is always known which came first. Operation 0 is what the disk held before; the workload counts from 1.
"""

from __future__ import annotations

import enum
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from powercut import stamp
from powercut.guest.nbd_client import Client
from powercut.trace import SECTOR, Kind, TraceWriter
from quire.nbd_protocol import Command

MIB = 1 << 20
KINDS = {"write": Kind.WRITE, "zero": Kind.ZERO, "discard": Kind.DISCARD, "flush": Kind.FLUSH}
COMMANDS = {
    Kind.WRITE: Command.WRITE,
    Kind.ZERO: Command.WRITE_ZEROES,
    Kind.DISCARD: Command.TRIM,
    Kind.FLUSH: Command.FLUSH,
}


class Verb(enum.StrEnum):
    """What is done to the image from outside, while the guest has nothing in flight (`powercut.guest.manage`)."""

    REOPEN = "reopen"
    CREATE = "snapshot create"
    APPLY = "snapshot apply"
    DELETE = "snapshot delete"
    RESIZE = "resize"
    COMMIT = "commit"


@dataclass(frozen=True, slots=True)
class Operation:
    """`offset` and `length` are bytes, multiples of 512; both are 0 for a flush. `unmap`: a zero may deallocate.

    Of kind MARK it is no request of the guest's: `verb` says what is done, `name` to which snapshot, and `length` is
    the size after a resize."""

    kind: Kind
    offset: int = 0
    length: int = 0
    unmap: bool = False
    verb: Verb | None = None
    name: str = ""


def draw(seed: int, operations: int, size: int, extra: Iterable[str] = ()) -> Iterator[Operation]:
    """`operations` operations on a disk of `size` bytes: writes and flushes, and the kinds in `extra`.

    Lengths run from 512 bytes to 1 MiB, small ones more often; half of the places lie near the last one, the
    others anywhere; one operation in ten is a flush.
    """
    rnd = random.Random(seed)
    others = [KINDS[name] for name in sorted(extra)]
    sectors = size // SECTOR
    place = 0
    for _ in range(operations):
        if rnd.random() < 0.1:
            yield Operation(Kind.FLUSH)
            continue
        kind = rnd.choice(others) if others and rnd.random() < 0.3 else Kind.WRITE
        length = min(int(2 ** rnd.triangular(0, 11, 2)), sectors)
        if rnd.random() < 0.5:
            length = min(-(-length // 8) * 8, sectors)  # most of a guest's requests are whole pages
        if rnd.random() < 0.5:
            place += rnd.randrange(0, 256)
        else:
            place = rnd.randrange(sectors)
        if length % 8 == 0:
            place -= place % 8
        if place + length > sectors:
            place = rnd.randrange(sectors - length + 1)
        unmap = kind is Kind.ZERO and rnd.random() < 0.5
        yield Operation(kind, place * SECTOR, length * SECTOR, unmap)
        place += length


def payload(number: int, epoch: int, operation: Operation) -> bytes:
    """The bytes that operation `number` writes: stamps, or nothing."""
    if operation.kind is not Kind.WRITE:
        return b""
    return stamp.make(number, epoch, operation.offset // SECTOR, operation.length // SECTOR)


class Workload:
    """Drives operations into a disk and marks each in the trace when it is issued and when it completes.

    `writer` may be None: then nothing is marked, requests are drained before each flush, and each acknowledged
    flush is followed by a write of one sector, so that stamps alone tell what was flushed.
    """

    def __init__(self, client: Client, writer: TraceWriter | None, guest: int, depth: int) -> None:
        self._client = client
        self._writer = writer
        self._guest = guest
        self._depth = depth
        self._number = 0
        self._epoch = 0
        self._pending: dict[int, tuple[Operation, int]] = {}  # number: operation, position of its mark
        self.errors: list[tuple[int, int]] = []  # (operation, errno) of what failed

    def run(self, operations: Iterable[Operation]) -> None:
        """Issue all, in order, up to `depth` at once, and wait for the last."""
        for operation in operations:
            if operation.kind is Kind.FLUSH and self._writer is None:
                self._drain()
                self._submit(operation)
                self._drain()
                self._submit(Operation(Kind.WRITE, 0, SECTOR))
                continue
            while len(self._pending) >= self._depth or self._conflicts(operation):
                self._wait()
            self._submit(operation)
        self._drain()

    def managed(self, client: Client) -> int:
        """Go on with `client`: something was done to the image. That counts as an operation, so that the numbers of
        operations are those of a history's lines. Returns its number."""
        self._client = client
        self._number += 1
        return self._number

    def _conflicts(self, operation: Operation) -> bool:
        end = operation.offset + operation.length
        return any(
            other.offset < end and operation.offset < other.offset + other.length for other, _ in self._pending.values()
        )

    def _submit(self, operation: Operation) -> None:
        self._number += 1
        number, kind = self._number, operation.kind
        offset, length = operation.offset, operation.length
        data = payload(number, self._epoch, operation)
        position = -1
        if self._writer is not None:
            position = self._writer.issue(kind, self._guest, offset, length, ref=number)
        self._pending[number] = (operation, position)
        self._client.submit(
            COMMANDS[kind],
            offset,
            length,
            data,
            may_unmap=operation.unmap,
            tag=number,
        )

    def _wait(self) -> None:
        number, error, _ = self._client.wait()
        operation, position = self._pending.pop(number)
        if self._writer is not None:
            self._writer.complete(position, error)
        if error:
            self.errors.append((number, error))
        elif operation.kind is Kind.FLUSH:
            self._epoch += 1

    def _drain(self) -> None:
        while self._pending:
            self._wait()
