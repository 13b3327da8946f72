"""Drives stamped operations into a guest's disks through its agent, and keeps the ledgers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from powercut.guest.agent import Agent, Gone
from powercut.guest.ledger import Ledger
from powercut.guest.workload import Operation
from powercut.trace import Kind

_LAST_WORDS = 1.0  # seconds to listen to a machine that has ended
Step = tuple[int, Operation]  # number of the disk, what is done to it


class Writing:
    """Operations are numbered from `first` on, over all disks. Up to `depth` are in flight, and none that overlap."""

    def __init__(self, agent: Agent, ledgers: list[Ledger], steps: Iterable[Step], depth: int, first: int) -> None:
        self._agent = agent
        self.ledgers = ledgers
        self._steps: Iterator[Step] = iter(steps)
        self._depth = depth
        self.number = first  # of the next operation
        self.answered = 0
        self.errors: list[tuple[int, int]] = []  # (operation, errno)
        self._pending: dict[int, Step] = {}

    def run(self, answers: int | None = None) -> None:
        """Go on until so many more operations were answered, leaving others in flight; None: until all are answered.

        Raises Unanswered, and Gone if the machine ends meanwhile.
        """
        until = None if answers is None else self.answered + answers
        for step in self._steps:
            while len(self._pending) >= self._depth or self._conflicts(step):
                self._take()
            self._submit(step)
            if until is not None and self.answered >= until:
                return
        while self._pending and (until is None or self.answered < until):
            self._take()

    def drain(self) -> None:
        """Wait for everything in flight."""
        while self._pending:
            self._take()

    def hear_the_rest(self) -> None:
        """Take the answers that a machine still gave before it ended."""
        try:
            while self._pending:
                self._take(_LAST_WORDS)
        except Gone:
            pass

    def forget(self, ledgers: list[Ledger]) -> None:
        """The guest and its disks were put back to a moment when nothing was in flight and `ledgers` were true."""
        self._pending.clear()
        self.ledgers[:] = ledgers

    def _conflicts(self, step: Step) -> bool:
        disk, operation = step
        end = operation.offset + operation.length
        return any(
            other_disk == disk and other.offset < end and operation.offset < other.offset + other.length
            for other_disk, other in self._pending.values()
        )

    def _submit(self, step: Step) -> None:
        disk, operation = step
        number, self.number = self.number, self.number + 1
        ledger = self.ledgers[disk]
        ledger.issue(number, operation)
        self._pending[number] = step
        if operation.kind is Kind.WRITE:
            self._agent.write(number, disk, operation.offset, operation.length, number, ledger.epoch)
        elif operation.kind is Kind.ZERO:
            self._agent.zero(number, disk, operation.offset, operation.length, unmap=operation.unmap)
        elif operation.kind is Kind.DISCARD:
            self._agent.discard(number, disk, operation.offset, operation.length)
        else:
            self._agent.flush(number, disk)

    def _take(self, patience: float | None = None) -> None:
        answer = self._agent.wait(patience)
        if answer.tag not in self._pending:
            return
        disk, _ = self._pending.pop(answer.tag)
        self.answered += 1
        self.ledgers[disk].complete(answer.tag, answer.error)
        if answer.error:
            self.errors.append((answer.tag, answer.error))
