"""The rig's end of the line to the agent (agent.c) that runs in a guest: commands out, answers in."""

from __future__ import annotations

import os
import select
import socket
import time
from typing import NamedTuple

from powercut.errors import EnvironmentFault, Unanswered

_PATIENCE = 30.0  # seconds until a guest must have answered


class Answer(NamedTuple):
    """`error` is the guest's errno, 0 if all is well. `value` is the size where one was asked for."""

    tag: int
    error: int
    value: int


class Gone(Exception):
    """The machine has ended: no answer will come any more."""


class Agent:
    """Speaks with one guest over `line`, which it owns. Requests may be many at once; answers come in any order."""

    def __init__(self, line: socket.socket, patience: float = _PATIENCE) -> None:
        self._line = line
        self._patience = patience
        self._heard = b""
        self._answers: list[Answer] = []
        self._tag = 1 << 62  # tags of commands; those of requests are the caller's, and smaller
        line.setblocking(False)

    def close(self) -> None:
        self._line.close()

    def say(self, *words: object) -> None:
        """Send one command. Raises Gone, Unanswered."""
        data = (" ".join(map(str, words)) + "\n").encode()
        deadline = time.monotonic() + self._patience
        while data:
            try:
                data = data[self._line.send(data) :]
            except BlockingIOError:
                if not select.select([], [self._line], [], max(0.0, deadline - time.monotonic()))[1]:
                    raise Unanswered(f"the guest took no command for {self._patience:g} s") from None
            except OSError:
                raise Gone from None

    def write(self, tag: int, disk: int, offset: int, length: int, op: int, epoch: int) -> None:
        """Ask for a write of stamps that bear `op` and `epoch`."""
        self.say("w", tag, disk, offset, length, op, epoch)

    def flush(self, tag: int, disk: int) -> None:
        self.say("f", tag, disk)

    def zero(self, tag: int, disk: int, offset: int, length: int, *, unmap: bool) -> None:
        self.say("z", tag, disk, offset, length, int(unmap))

    def discard(self, tag: int, disk: int, offset: int, length: int) -> None:
        self.say("d", tag, disk, offset, length)

    def wait(self, patience: float | None = None) -> Answer:
        """The next answer. Raises Gone, and Unanswered if there is none within `patience` seconds."""
        patience = self._patience if patience is None else patience
        deadline = time.monotonic() + patience
        while not self._answers:
            left = deadline - time.monotonic()
            if not select.select([self._line], [], [], max(0.0, left))[0]:
                raise Unanswered(f"the guest gave no answer for {patience:g} s")
            self._hear()
        return self._answers.pop(0)

    def _hear(self) -> None:
        try:
            data = self._line.recv(65536)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            raise Gone
        *lines, self._heard = (self._heard + data).split(b"\n")
        for line in lines:
            words = line.split()
            if words[:1] == [b"done"]:
                self._answers.append(Answer(int(words[1]), int(words[2]), int(words[3]) if words[3:] else 0))

    def ask(self, verb: str, *words: object, patience: float | None = None) -> int:
        """Execute a command while no request is in flight. Returns its value; raises EnvironmentFault if it fails."""
        self._tag += 1
        self.say(verb, self._tag, *words)
        while (answer := self.wait(patience)).tag != self._tag:
            pass  # a request from before the machine was restored
        if answer.error:
            raise EnvironmentFault(f"the guest could not {verb} {words}: {os.strerror(answer.error)}")
        return answer.value

    def hello(self, patience: float | None = None) -> None:
        """Return when the agent answers."""
        self.ask("hello", patience=patience)

    def open(self, disk: int) -> int:
        """Find disk number `disk`. Returns its size in bytes."""
        return self.ask("open", disk)

    def mount(self, disk: int) -> None:
        """Mount the ext4 on disk number `disk`."""
        self.ask("mount", disk)

    def file(self, tag: int, name: str, length: int, op: int) -> None:
        """Ask for a file of stamps, fsynced and renamed to `name`: it is safe when the answer comes."""
        self.say("file", tag, name, length, op)

    def poweroff(self) -> None:
        """Let the guest flush its disks and switch the machine off."""
        self.say("poweroff")

    def panic(self) -> None:
        self.say("panic")
