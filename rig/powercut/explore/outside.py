"""Programs that judge a crash state of several files: they are run in a directory that shows it.

What the programs write is recorded by the store they are given; a program that would be given what an earlier run was
given is not run again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable
from types import TracebackType
from typing import Any, Self

from powercut.crash.explore import Unjudged
from powercut.errors import NotServed
from powercut.explore.calls import Call, Calls, Remembered
from powercut.mount import LOOKING, Mount, Tree
from powercut.stores import Case


class Outside:
    """Runs programs, while its context is entered. `runs` counts."""

    def __init__(self) -> None:
        self.runs = 0
        self._remembered: dict[Hashable, Remembered[Any]] = {}

    def __enter__(self) -> Self:
        self._stack = contextlib.ExitStack()
        self._mount = self._stack.enter_context(Mount())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def on(self, case: Case) -> Runs:
        """Programs run on this state, one after the other."""
        return Runs(self, case)


class Runs:
    """See `Outside.on`."""

    def __init__(self, outside: Outside, case: Case) -> None:
        self._outside = outside
        self._case = case
        self._before: list[list[Call]] = []  # of each program
        self._scratch: Tree | None = None  # the state as the programs before left it, where it is known

    def run(self, which: Hashable, program: Callable[[str], Any]) -> tuple[Any, list[Call]]:
        """What `program` concludes, which runs in the directory it is given, and the calls that it made. `which` tells
        programs apart that conclude different things."""
        remembered = self._outside._remembered.setdefault(which, Remembered())
        scratch = self._scratch
        if scratch is None:
            scratch = self._case.again()
            for before in self._before:
                _make(Calls(scratch), before)
        recalled = Calls(scratch)
        outcome = remembered.recall(recalled)
        calls = Calls(self._case.store)
        if outcome is not None:
            self._scratch = scratch
            made = [call for call, _ in recalled.made]
            _make(calls, [call for call in made if call[0] not in LOOKING])
        else:
            self._scratch = None
            self._outside.runs += 1
            try:
                with self._outside._mount.serving(calls) as path:
                    outcome = program(path)
            except NotServed as error:
                raise Unjudged(str(error)) from None
            remembered.keep(calls, outcome)
            made = [call for call, _ in calls.made]
        self._before.append(made)
        return outcome, made


def _make(calls: Calls, wanted: list[Call]) -> None:
    for name, words in wanted:
        with contextlib.suppress(OSError):
            calls(name, *words)
