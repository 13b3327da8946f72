"""A guest whose disk fails: it goes on, and repeats what failed, as operating systems do.

Requests that are in flight together do not overlap. Before each flush, and before a request that overlaps one that
failed, what failed is repeated, one after the other; a flush is repeated too. After so many tries the guest gives up,
and goes on with the rest.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from powercut import stamp
from powercut.guest.expectation import Expectation
from powercut.guest.nbd_client import Client
from powercut.guest.workload import COMMANDS, Operation
from powercut.stamp import SECTOR, ZERO
from powercut.trace import Kind

TRIES = 4


@dataclass(slots=True)
class Seen:
    """What the guest saw: requests that failed (repetitions counted), operations that it repeated with success, those
    that it gave up, and the story: operation by operation, how it ended. `stops`: how often its machine was stopped."""

    errors: int = 0
    stops: int = 0
    repeated: int = 0
    given_up: list[int] = field(default_factory=list)
    story: list[str] = field(default_factory=list)


class Disk(Protocol):
    """A disk as its guest sees it."""

    def submit(self, tag: int, operation: Operation, data: bytes) -> None:
        """Ask for an operation; `data` is what a write brings."""

    def wait(self) -> tuple[int, int]:
        """The tag of the next operation that was answered, and its error: an errno, or 0."""


class Served:
    """The disk of a guest that is played: an NBD connection."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def submit(self, tag: int, operation: Operation, data: bytes) -> None:
        kind, offset, length = COMMANDS[operation.kind], operation.offset, operation.length
        self._client.submit(kind, offset, length, data, may_unmap=operation.unmap, tag=tag)

    def wait(self) -> tuple[int, int]:
        tag, error, _ = self._client.wait()
        return tag, error


class Stubborn:
    """Drives operations into `disk`, `depth` at once, keeps `expectation` up to date, and adds what it sees to `seen`.
    `noticed` is called after each error.

    Raises EnvironmentFault when the disk is lost altogether.
    """

    def __init__(
        self,
        disk: Disk,
        expectation: Expectation,
        seen: Seen,
        noticed: Callable[[], None] = lambda: None,
        depth: int = 1,
    ) -> None:
        self._disk, self._expectation, self._seen, self._noticed = disk, expectation, seen, noticed
        self._depth = depth
        self._pending: dict[int, Operation] = {}
        self._failed: dict[int, Operation] = {}

    def run(self, operations: Sequence[Operation], first: int) -> None:
        """Carry out operations, counted from `first`, and flush at the end."""
        for number, operation in enumerate(operations, first):
            if operation.kind is Kind.FLUSH:
                self._flush(number)
                continue
            while len(self._pending) >= self._depth or _met(operation, self._pending):
                self._take()
            if again := _met(operation, self._failed):
                self._drain()
                self._repeat(again)
            self._submit(number, operation)
        self._flush(first + len(operations))

    def _submit(self, number: int, operation: Operation) -> None:
        offset, length, data = operation.offset, operation.length, b""
        if operation.kind is Kind.WRITE:
            data = stamp.make(number, 0, offset // SECTOR, length // SECTOR)
        if operation.kind is not Kind.FLUSH:
            self._expectation.tried(offset, length, _value(number, operation))
        self._pending[number] = operation
        self._disk.submit(number, operation, data)

    def _take(self) -> bool:
        """Take one answer. Whether it was a good one."""
        number, error = self._disk.wait()
        operation = self._pending.pop(number)
        self._seen.story.append(f"{number} {errno.errorcode.get(error, 'failed') if error else 'done'}")
        if error:
            self._seen.errors += 1
            if operation.kind is not Kind.FLUSH:
                self._failed[number] = operation
            self._noticed()
        elif operation.kind in (Kind.WRITE, Kind.ZERO):  # a discard is a hint
            self._expectation.done(operation.offset, operation.length, _value(number, operation))
        return not error

    def _drain(self) -> None:
        while self._pending:
            self._take()

    def _once_more(self, number: int, operation: Operation) -> bool:
        """With nothing else in flight."""
        self._submit(number, operation)
        return self._take()

    def _repeat(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            operation = self._failed.pop(number)
            if any(self._once_more(number, operation) for _ in range(TRIES)):
                self._seen.repeated += 1
            else:
                del self._failed[number]
                self._seen.given_up.append(number)

    def _flush(self, number: int) -> None:
        self._drain()
        self._repeat(list(self._failed))
        for attempt in range(TRIES):
            if self._once_more(number, Operation(Kind.FLUSH)):
                self._expectation.flushed()
                self._seen.repeated += attempt > 0
                return
        self._seen.given_up.append(number)


def _value(number: int, operation: Operation) -> int:
    """What sectors hold that it wrote."""
    return number if operation.kind is Kind.WRITE else ZERO


def _met(operation: Operation, others: dict[int, Operation]) -> list[int]:
    """The numbers of those that it overlaps."""
    end = operation.offset + operation.length
    return [n for n, other in others.items() if other.offset < end and operation.offset < other.offset + other.length]
