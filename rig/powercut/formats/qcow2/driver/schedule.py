"""Several coroutines of the driver at once: which request to the file completes next is drawn from a seed."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from powercut.formats.qcow2.driver.host import Ask, File, Running, Until

Done = Callable[[Any, OSError | None], None]  # called with the result, or the error


@dataclass
class _Task:
    work: Running[Any]
    done: Done
    waits: Ask | Until | None = None
    begun: Any = None


class Together:
    """Runs coroutines over one file."""

    def __init__(self, file: File, seed: int) -> None:
        self._file = file
        self._random = random.Random(seed)
        self._tasks: list[_Task] = []

    def __len__(self) -> int:
        return len(self._tasks)

    def start(self, work: Running[Any], done: Done) -> None:
        """Run `work` up to its first request, which is issued."""
        task = _Task(work, done)
        self._tasks.append(task)
        self._go_on(task, None, None)

    def step(self) -> None:
        """Complete one request, and let its coroutine go on to the next."""
        ready = [task for task in self._tasks if not isinstance(task.waits, Until) or task.waits.ready()]
        assert ready, "every request waits for another"
        task = self._random.choice(ready)
        answer, error = None, None
        if isinstance(task.waits, Ask):
            try:
                answer = self._file.finish(task.waits, task.begun)
            except OSError as failed:
                error = failed
        self._go_on(task, answer, error)

    def drain(self) -> None:
        """Run all to their ends."""
        while self._tasks:
            self.step()

    def coin(self) -> bool:
        return self._random.random() < 0.5

    def _go_on(self, task: _Task, answer: bytes | None, error: OSError | None) -> None:
        try:
            task.waits = task.work.throw(error) if error is not None else task.work.send(answer)
        except StopIteration as stop:
            self._tasks.remove(task)
            task.done(stop.value, None)
        except OSError as failed:
            self._tasks.remove(task)
            task.done(None, failed)
        else:
            task.begun = self._file.begin(task.waits) if isinstance(task.waits, Ask) else None
