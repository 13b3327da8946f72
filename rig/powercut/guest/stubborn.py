"""A guest whose disk fails: it goes on, and repeats what failed, as operating systems do.

One request is in flight at a time. Before each flush, and before a request that overlaps one that failed, what failed
is repeated; a flush is repeated too. After so many tries the guest gives up, and goes on with the rest.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from powercut import stamp
from powercut.guest.expectation import Expectation
from powercut.guest.workload import Operation
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
    """A disk as its guest sees it. Its errors are OSErrors."""

    def write(self, offset: int, data: bytes) -> None: ...
    def zero(self, offset: int, length: int, may_unmap: bool = False) -> None: ...
    def discard(self, offset: int, length: int) -> None: ...
    def flush(self) -> None: ...


class Stubborn:
    """Drives operations into `guest`, keeps `expectation` up to date, and adds what it sees to `seen`. `noticed` is
    called after each error.

    Raises EnvironmentFault when the disk is lost altogether.
    """

    def __init__(
        self, guest: Disk, expectation: Expectation, seen: Seen, noticed: Callable[[], None] = lambda: None
    ) -> None:
        self._guest, self._expectation, self._seen, self._noticed = guest, expectation, seen, noticed
        self._failed: dict[int, Operation] = {}

    def run(self, operations: Sequence[Operation], first: int) -> None:
        """Carry out operations, counted from `first`, and flush at the end."""
        for number, operation in enumerate(operations, first):
            if operation.kind is Kind.FLUSH:
                self._flush(number)
                continue
            self._repeat([n for n, other in self._failed.items() if _overlap(operation, other)])
            if not self._try(number, operation):
                self._failed[number] = operation
        self._flush(first + len(operations))

    def _try(self, number: int, operation: Operation) -> bool:
        offset, length = operation.offset, operation.length
        value = number if operation.kind is Kind.WRITE else ZERO
        self._expectation.tried(offset, length, value)
        try:
            if operation.kind is Kind.WRITE:
                self._guest.write(offset, stamp.make(number, 0, offset // SECTOR, length // SECTOR))
            elif operation.kind is Kind.ZERO:
                self._guest.zero(offset, length, operation.unmap)
            else:
                self._guest.discard(offset, length)
        except OSError as error:
            self._failing(number, error)
            return False
        self._seen.story.append(f"{number} done")
        if operation.kind is not Kind.DISCARD:
            self._expectation.done(offset, length, value)
        return True

    def _failing(self, number: int, error: OSError) -> None:
        self._seen.errors += 1
        self._seen.story.append(f"{number} {errno.errorcode.get(error.errno or 0, 'failed')}")
        self._noticed()

    def _repeat(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            operation = self._failed.pop(number)
            if any(self._try(number, operation) for _ in range(TRIES)):
                self._seen.repeated += 1
            else:
                self._seen.given_up.append(number)

    def _flush(self, number: int) -> None:
        self._repeat(list(self._failed))
        for attempt in range(TRIES):
            try:
                self._guest.flush()
            except OSError as error:
                self._failing(number, error)
                continue
            self._seen.story.append(f"{number} flushed")
            self._expectation.flushed()
            self._seen.repeated += attempt > 0
            return
        self._seen.given_up.append(number)


def _overlap(one: Operation, other: Operation) -> bool:
    return one.offset < other.offset + other.length and other.offset < one.offset + one.length
