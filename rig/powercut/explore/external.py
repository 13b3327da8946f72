"""A program as the checker: `qemu-img check`, `qemu-img check -r all`, or a user's own, on a crash disk over NBD.

The program reads the lazily decided disk through a socket: the same search, with slower leaves. What it writes is
kept over the disk and recorded, and a crash at every moment of that recovery is explored in its turn.

Two rules:

    checker  the program found the state broken (for qemu-img check: exit code 2; for others: 1)
    repairs  the program wrote, and was content, and yet the image is not: its structure is judged by the format's own
             checker, and what the guest was promised must still be there

A program that ends in any other way (a signal, a time-out, an internal error) has no opinion: UNKNOWN, never a pass.
"""

from __future__ import annotations

import contextlib
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, Protocol

from powercut.capture.nbd import Recorder
from powercut.crash.contents import Contents
from powercut.crash.disk import CrashDisk
from powercut.crash.explore import MORE, Enough, Report, Unjudged
from powercut.crash.memory import Memory, Steps
from powercut.crash.model import epochs
from powercut.crash.options import DEFAULT, Options
from powercut.crash.recovery import Overlay, RecoveredDisk
from powercut.crash.visited import Visited
from powercut.errors import EnvironmentFault, InputError
from powercut.guest.lifetime import with_parent
from powercut.trace import SECTOR, Trace, TraceWriter
from powercut.verdict import Problem, Severity
from quire.nbd import Server
from quire.nbd_protocol import Data

TIMEOUT = 60.0  # seconds that one run of the program may take
_SHOWN = 300  # characters of what the program said
_BROKEN = {("qemu-img", "check"): (2,), ("qemu-img", "compare"): (1,)}  # exit codes; for others: 1
_FINE = {("qemu-img", "check"): (0, 3)}  # 3: leaks only, which are legal; for others: 0

Disk = CrashDisk | RecoveredDisk


class JudgeDisk(Protocol):
    """The format's own judgement of one state."""

    def __call__(self, disk: Disk, report: Report, enough: Callable[[str], bool]) -> None: ...


class _Export(Recorder):
    """What the program gets: the disk with its own writes over it."""

    def __init__(self, overlay: Overlay, writer: TraceWriter, file: int) -> None:
        super().__init__(writer, file)
        self.size = overlay.size
        self._overlay = overlay

    def read(self, offset: int, length: int) -> Data:
        return self._overlay.read(offset, length)

    def write(self, offset: int, data: Data, fua: bool) -> None:
        self._overlay.write(offset, data)

    def zero(self, offset: int, length: int, may_unmap: bool, fua: bool) -> None:
        self._overlay.zero(offset, length)

    def discard(self, offset: int, length: int) -> None:
        self._overlay.zero(offset, length)

    def flush(self) -> None:
        """Nothing: what counts is the trace."""


class _Run(NamedTuple):
    """What came of one run: whether the program is content, what it said, and the trace of what it wrote, if it did."""

    content: bool
    said: str
    written: Trace | None


class External:
    """Judges by running `command`; in it, {} stands for the image, which else comes last, and {dir} for the directory
    with all files. Crashes inside what it
    writes are explored `depth` levels deep. `own` judges what the program left; None: nobody does. `runs` counts: given
    what it was given before, it need not run again. Raises InputError for no command, EnvironmentFault for a missing
    one."""

    def __init__(self, command: str, depth: int, own: JudgeDisk | None = None, options: Options = DEFAULT) -> None:
        try:
            self._words = shlex.split(command)
        except ValueError as error:
            raise InputError(f"checker {command!r}: {error}") from None
        if not self._words:
            raise InputError("the checker is an empty command")
        if shutil.which(self._words[0]) is None:
            raise EnvironmentFault(f"checker {self._words[0]!r} was not found")
        if not any("{}" in word or "{dir}" in word for word in self._words):
            self._words.append("{}")
        self._depth = depth
        self._own = own
        self._options = replace(options, atom=SECTOR, lying=0)
        self._memory: Memory[_Run] = Memory()
        self._visited: Visited | None = None
        self._left: Visited | None = None
        self._enough: Callable[[str], bool] = lambda rule: False
        self._more, self._found = MORE, False
        self.runs = 0
        kind = (Path(self._words[0]).name, self._words[1])
        self._broken = _BROKEN.get(kind, (1,))
        self._fine = _FINE.get(kind, (0,))

    def judge(self, disk: CrashDisk, report: Report, enough: Callable[[str], bool]) -> None:
        """Run the program on `disk`, and again on every crash inside what it writes. `enough` says of a rule whether
        more that breaks it need not be looked for."""
        self._enough = enough
        if self._visited is None or self._visited.below is not disk:
            self._visited, self._left = Visited(disk), Visited(disk)
            self._more, self._found = MORE, False

        def told(problem: Problem, patches: Sequence[tuple[int, bytes]] = ()) -> None:
            self._found = True
            report(problem, patches)

        self._check(disk, self._depth, told)

    def _judging(self) -> None:
        """One more state is judged. Raises Enough: something was found `MORE` states before, maybe deep in a recovery,
        whose states may be without end."""
        self._more -= self._found
        if self._more == 0:
            raise Enough

    def run(self, image: str, directory: str | None = None) -> tuple[bool, str]:
        """Run the program on `image`, a file or an NBD URI, and `directory`: whether it is content, and what it said.

        Raises Unjudged if it has no opinion."""
        words = [word.replace("{}", image).replace("{dir}", directory or "") for word in self._words]
        try:
            done = subprocess.run(
                with_parent(words),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=TIMEOUT,
            )
        except subprocess.TimeoutExpired:
            raise Unjudged(f"the checker did not end within {TIMEOUT:.0f} s") from None
        said = done.stdout + done.stderr
        said = " ".join(said.replace(f"{directory}/", "").split() if directory else said.split())[:_SHOWN]
        if done.returncode in self._fine:
            return True, said
        if done.returncode in self._broken:
            return False, said
        how = f"exit code {done.returncode}" if done.returncode >= 0 else f"signal {-done.returncode}"
        raise Unjudged(f"the checker ended with {how}: {said.replace(image, 'the image')}")

    def _run_on(self, disk: Disk) -> _Run:
        """Run the program on `disk`, or remember what came of it. Raises Unjudged."""
        known = self._memory.recall(disk)
        if known is not None:
            return known
        self.runs += 1
        with tempfile.TemporaryDirectory(prefix="powercut-") as scratch:
            recording, socket = Path(scratch) / "recovery.trace", f"{scratch}/disk.sock"
            steps = Steps(disk)
            with TraceWriter(recording, {}) as writer:
                file = writer.file("image", disk.size, "image")
                with Server(_Export(steps, writer, file), socket):
                    content, said = self.run(f"nbd+unix:///?socket={socket}")
            trace = Trace(recording)  # stays mapped when the file is gone
            wrote = len(trace.events) and Contents(trace, trace.files[file]).writes()
        done = _Run(content, said.replace(socket, "the image"), trace if wrote else None)
        self._memory.keep(steps, done)
        return done

    def _check(self, disk: Disk, depth: int, report: Report) -> None:
        self._judging()
        done = self._run_on(disk)
        if not done.content:
            within = _patches(disk)
            text = f"{' '.join(self._words[:-1])}: {done.said}"
            where = "" if not within else " (after a crash inside the recovery before)"
            report(Problem("checker", "broken", 0, Severity.CORRUPT, text + where), within)
            return
        assert self._visited is not None
        if done.written is None or self._visited.again(disk, depth):
            return
        written = Contents(done.written, done.written.files[0], options=self._options)
        level = self._depth - depth + 1
        if depth > 0:
            issued = -1
            for position in epochs(done.written, 0):
                written.advance(position)
                if len(written.touched) == issued:  # nothing new is in flight: each such state was one before
                    continue
                issued = len(written.touched)
                crashed = RecoveredDisk(disk, written, level)
                crashed.explore(lambda crashed=crashed: self._check(crashed, depth - 1, report))  # type: ignore[misc]
        written.advance(done.written.length)
        written.settle_rest()
        repaired = RecoveredDisk(disk, written, level)
        assert self._left is not None
        if not self._left.again(repaired, 0):  # asked once, not in each of its runs
            repaired.explore(lambda: self._judge_repaired(repaired, report))

    def _judge_repaired(self, disk: RecoveredDisk, report: Report) -> None:
        if self._own is None or self._enough("repairs"):
            return
        self._judging()

        def told(problem: Problem, patches: object = ()) -> None:
            text = f"after the checker was content: {problem.text}"
            report(replace(problem, rule="repairs", text=text), disk.patches())

        with contextlib.suppress(Unjudged):  # the format cannot tell; the program's word stands
            self._own(disk, told, lambda rule: self._enough("repairs"))


def _patches(disk: Disk) -> list[tuple[int, bytes]]:
    return disk.patches() if isinstance(disk, RecoveredDisk) else []
