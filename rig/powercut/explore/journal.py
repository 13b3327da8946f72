"""What a long exploration has found out so far, kept in a file beside the trace, so that it can go on from there.

JSON lines: the first says of which exploration they are (`powercut.progress/1`), each other one is a task and its
result. A line that was cut off when the process died ends the file. The file is begun only when the exploration has
taken `AFTER` seconds, and removed when it is done.
"""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

import msgspec

from powercut import __version__
from powercut.crash.explore import EpochResult, Task
from powercut.errors import InputError
from powercut.explore.session import Plan

SCHEMA = "powercut.progress/1"
AFTER = 2.0


class _Head(msgspec.Struct, frozen=True):
    schema: str
    powercut: str
    trace_hash: str
    plan: Plan


class _Line(msgspec.Struct, frozen=True):
    task: Task
    result: EpochResult


class Journal:
    """The results of one exploration, on disk when it takes long. With `resume`, those of an earlier one that was cut
    off are taken over. Raises InputError if there are none, or they are of another exploration.

    A journal that cannot be written is given up: `fault` says why, and the exploration goes on without.
    """

    def __init__(self, path: Path, plan: Plan, trace_hash: str, resume: bool) -> None:
        self.path = path
        self.known: dict[Task, EpochResult] = {}
        self.fault: str | None = None
        self._begin = time.monotonic()
        self._fd = -1
        self._resumed = resume
        head = _Head(SCHEMA, __version__, trace_hash, replace(plan, trace=""))
        self._waiting = [msgspec.json.encode(head)]
        if resume:
            self._read(head)

    def _read(self, head: _Head) -> None:
        try:
            lines = self.path.read_bytes().split(b"\n")
        except FileNotFoundError:
            raise InputError(f"{self.path}: there is no exploration to resume") from None
        except OSError as error:
            raise InputError(f"{self.path}: {error.strerror}") from None
        try:
            found = msgspec.json.decode(lines[0], type=_Head)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise InputError(f"{self.path}: not the progress of an exploration: {error}") from None
        if found != head:
            names = ("schema", "powercut", "trace_hash", "plan")
            differs = next(name for name in names if getattr(found, name) != getattr(head, name))
            raise InputError(f"{self.path}: of another exploration ({differs}): start anew without --resume")
        for number, line in enumerate(lines[1:-1], 2):  # what follows the last newline was cut off, or is empty
            try:
                entry = msgspec.json.decode(line, type=_Line)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise InputError(f"{self.path}:{number}: damaged: {error}") from None
            self.known[entry.task] = entry.result
            self._waiting.append(line)
        self._begin -= AFTER

    def put(self, task: Task, result: EpochResult) -> None:
        """Keep the result of `task`."""
        self.known[task] = result
        if self.fault is not None:
            return
        self._waiting.append(msgspec.json.encode(_Line(task, result)))
        if time.monotonic() - self._begin >= AFTER:
            self._write()

    def _write(self) -> None:
        lines, self._waiting = self._waiting, []
        try:
            first = self._fd < 0
            partial = self.path.with_name(f"{self.path.name}.partial")
            if first:
                self._fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
            rest = memoryview(b"".join(line + b"\n" for line in lines))
            while rest:
                rest = rest[os.write(self._fd, rest) :]
            if first:  # what an earlier exploration left is replaced by a file that has it all
                os.replace(partial, self.path)
        except OSError as error:
            self.fault = f"{self.path}: progress is not kept: {error.strerror}"

    def keep(self) -> bool:
        """Write down what there is, for an exploration that is cut short. Returns whether it can be resumed."""
        if self.fault is None:
            self._write()
        self.close()
        return self.fault is None

    def done(self) -> None:
        """The exploration came to its end: nothing is left to resume."""
        if self._fd >= 0 or self._resumed:
            self.path.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
