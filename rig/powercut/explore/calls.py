"""What a program concluded from what its system calls gave it: same answers, same verdict.

A program that decides by what it is given does the same again while it is given the same. So its runs on a served
directory (`powercut.mount`) make a tree: the call it made next, for each answer to the one before. On a state where
the tree can be followed to its end the program need not run: its calls are made in its place, those that write too,
and so the state is decided, and its writes are recorded, in the same order as if it had run.
"""

from __future__ import annotations

import contextlib
import threading
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import xxhash

from powercut.mount import Served, Tree

MOST = 1 << 20  # calls that are remembered: some hundred bytes each
Outcome = TypeVar("Outcome")
Call = tuple[str, tuple[Any, ...]]


@dataclass(slots=True)
class _Node(Generic[Outcome]):
    call: Call | None = None
    after: dict[bytes, _Node[Outcome]] = field(default_factory=dict)  # by the digest of the answer
    ended: Outcome | None = None


class Calls:
    """The calls on one state, as they are made."""

    def __init__(self, root: Tree) -> None:
        self._served = Served(root)
        self._lock = threading.Lock()
        self.made: list[tuple[Call, bytes]] = []

    def __call__(self, name: str, *words: Any) -> Any:
        with self._lock:
            try:
                answer = getattr(self._served, name)(*words)
            except OSError as error:
                self.made.append(((name, words), b"error %d" % (error.errno or 0)))
                raise
            self.made.append(((name, words), _digest(answer)))
            return answer


def _digest(answer: Any) -> bytes:
    return xxhash.xxh3_128_digest(answer if isinstance(answer, bytes) else repr(answer).encode())


class Remembered(Generic[Outcome]):
    """The outcomes of runs of one program."""

    def __init__(self) -> None:
        self._root: _Node[Outcome] = _Node()
        self._count = 0

    def recall(self, calls: Calls) -> Outcome | None:
        """The outcome of a run, if it would be given just what an earlier one was."""
        node: _Node[Outcome] | None = self._root
        while node is not None and node.ended is None:
            if node.call is None:
                return None
            name, words = node.call
            with contextlib.suppress(OSError):  # an answer like others
                calls(name, *words)
            node = node.after.get(calls.made[-1][1])
        return None if node is None else node.ended

    def keep(self, calls: Calls, outcome: Outcome) -> None:
        """Remember what came of a run."""
        node = self._root
        if self._count >= MOST:
            return
        for call, answer in calls.made:
            if node.ended is not None or (node.call is not None and node.call != call):
                return  # it is no such program: what it did first stays
            node.call = call
            if answer not in node.after:
                node.after[answer] = _Node()
                self._count += 1
            node = node.after[answer]
        if node.call is None:
            node.ended = outcome
