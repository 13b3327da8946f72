"""Histories in which one call to the disk fails: each call in its turn."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from pathlib import Path

from powercut.formats.quire.history import parse, record
from powercut.formats.quire.judge import Quire
from powercut.formats.quire.promises import Promises
from powercut.stores import StoreOutcome, explore_store
from powercut.trace import Kind, Trace
from support.quires import SIZE, SLOTS, after

ERRORS = {
    "data": [
        "write main 0 512",
        "flush main",
        "write main 512 512",
        "discard main 4k 4k",
        "write main 8k 512 fua",
        "discard main 0 4k",
        "flush main",
        "write main 0 512",
        "flush main",
        "write main 8k 512",
        "flush main",
    ],
    "tree": [
        "write main 0 512",
        "snapshot main s",
        "write main 0 512",
        "clone s c",
        "resize main 20k",
        "rename c d",
        "write main 512 512",
        "flush main",
        "seal s",
        "delete d",
        "revert main s",
    ],
}
FULL = ("write", "truncate", "allocate", "create")  # calls that a full disk can fail


class Failing:
    """Fails call number `at` with `error`, if it is one that can fail so."""

    def __init__(self, at: int, error: int) -> None:
        self.at = at
        self.error = error
        self.count = 0
        self.struck = ""

    def __call__(self, call: str, file: str) -> None:
        if call == "read":
            return
        self.count += 1
        if self.count == self.at + 1 and (self.error == errno.EIO or call in FULL):
            self.struck = f"{call} {file}"
            raise OSError(self.error, "planted", file)


_EPOCHS = 3  # explored after the failure, and the last one


def with_errors(folder: Path, history: Sequence[str], features: int, error: int) -> Iterator[tuple[str, StoreOutcome]]:
    """Fail each call that can fail with `error`; the call that was struck, and what a crash soon after it, or at the
    end, may then leave."""
    lines = parse(history)
    path = folder / "t.trace"
    known = set[bytes]()  # what comes before the call that fails is the same each time
    for at in range(10**6):
        failing = Failing(at, error)
        record(lines, SIZE, SLOTS, path, features, failing)
        if failing.struck:
            soon = _soon(path)
            judge = Quire(Promises(path, lines))
            yield failing.struck, explore_store(path, judge, depth=0, positions=soon, known=known)
        if failing.count <= at:
            return


def _soon(path: Path) -> list[int]:
    trace = Trace(path)
    marks = [trace.about(event) for event in trace.events if event["kind"] == Kind.MARK]
    failed = next((mark["line"] for mark in marks if mark["label"] == "failed"), 0)
    positions = after(path, failed)
    return [*positions[:-1][:_EPOCHS], positions[-1]]
