"""Loops with a disk image that somebody brought: it boots by itself, and no agent runs in it.

It is never written to: each loop's guest has an overlay on it. What is judged is the overlay's structure, and how
the machine ended; of the guest's content nothing is known.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
from pathlib import Path
from typing import Any

from powercut.disk import Bytes
from powercut.endings import Running
from powercut.errors import EnvironmentFault, InputError, Unanswered
from powercut.guest.daemon import create_image, tool
from powercut.guest.images import Image
from powercut.guest.machine import Machine
from powercut.loops import aftermath
from powercut.loops.cycle import Cycled, Lane, before_of, copy
from powercut.verdict import Problem, Severity

_AFTER = (10.0, 40.0)  # seconds after its start that a guest is ended, where nothing else was asked for


def look_at(path: Path) -> tuple[str, int]:
    """The format of the image at `path` and the size of its disk. Raises InputError."""
    if not path.is_file():
        raise InputError(f"{path}: {'is no file' if path.exists() else 'No such file or directory'}")
    command = [tool("qemu-img"), "info", "-U", "--output=json", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if done.returncode:
        raise InputError(f"{path}: {done.stderr.strip().removeprefix('qemu-img: ')}")
    about = json.loads(done.stdout)
    return str(about["format"]), int(about["virtual-size"])


def _state(path: Path) -> tuple[int, int]:
    about = path.stat()
    return about.st_size, about.st_mtime_ns


class BroughtLane(Lane):
    """A row of loops on an overlay on the image that was brought."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        if self.ending.agent or self.ending.recorded:
            raise InputError(f"ending {self.ending.name} needs our agent in the guest, and no --disk")
        assert self.plan.disk is not None
        self._brought = Path(os.path.realpath(self.plan.disk))
        self._format, size = look_at(self._brought)
        self.images = [Image(self.folder / "disk0.qcow2", "qcow2", size, size, self._format)]
        self._used = False
        self._state = _state(self._brought)

    def _prepare(self) -> None:
        (image,) = self.images
        before_of(image).unlink(missing_ok=True)
        if self._used and not self.plan.fresh:
            copy(image.path, before_of(image))
            return
        image.path.unlink(missing_ok=True)
        create_image(image.path, "qcow2", image.size, self.scenario.options, self._brought, self._format)
        self._used = True

    def _work(self, machine: Machine, chance: random.Random, cycled: Cycled) -> Running:
        running = Running(machine, list(self.images), None, chance, cycled.number)
        seconds = self.plan.after or chance.uniform(*_AFTER)
        try:
            status = machine.wait_end(seconds)
        except Unanswered:  # as it should be: it works on
            self.ending.end(running)
        else:
            if machine.said:
                raise EnvironmentFault(f"QEMU ended by itself: {machine.said}")
            text = f"the guest ended by itself before {seconds:.0f} s were over, with exit code {status}"
            cycled.problems.append(Problem("ends", "early", 0, Severity.UNOPENABLE, text))
        return running

    def _look(self, cycled: Cycled, running: Running, firsts: list[Bytes]) -> None:
        if _state(self._brought) != self._state:
            raise EnvironmentFault(
                f"{self._brought} was written to while guests had overlays on it: they are worthless"
            )
        before = firsts[0] if running.images == self.images else None
        for image in [*running.images, *running.others]:
            cycled.problems += aftermath.examine(image, before if image == self.images[0] else None, self.ending, None)
        if cycled.problems or running.images != self.images:
            self._used = False

    def go_on_from(self, images: Any, operation: int) -> None:
        copy(images[0], self.images[0].path)
        self._used = True
