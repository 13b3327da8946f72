"""The crash disk: a lazy image that decides an atom only when it is first read.

The number of crash states is astronomic; what a checker can observe of them is small. `powercut.crash.search` visits
them all by running the check again for every way its reads can turn out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from powercut.crash.contents import Choice, Contents, Rows
from powercut.crash.search import Search
from powercut.crash.survival import Survival
from powercut.disk import Bytes, Gathered, Offsets, Span, Variants
from powercut.trace import SECTOR


class Deciding(Protocol):
    """A disk that is decided as it is read, by a search. `written`: the ranges of sectors that a recovery wrote to."""

    size: int
    search: Search

    @property
    def written(self) -> list[tuple[int, int]]: ...

    def read(self, offset: int, length: int) -> Bytes: ...

    def variants(self, offset: int, length: int) -> Variants: ...

    def explore(self, part: Callable[[], None]) -> None: ...


class CrashDisk:
    """`contents` as one of its crash states, decided as it is read.

    With `sets=False`, `variants` decides too: every check then sees one decided disk at a time, which is the
    plain search, slower and with nothing left to a checker's own reasoning. The two must agree.
    `number` tells disks apart that share one search.
    """

    def __init__(
        self,
        contents: Contents,
        search: Search | None = None,
        *,
        sets: bool = True,
        number: int = 0,
        survival: Survival | None = None,
    ) -> None:
        self.contents = contents
        self.size = contents.size
        self.search = search or Search()
        self._sets = sets and not contents.options.narrow
        self._number = number
        self._survival = survival

    @property
    def written(self) -> list[tuple[int, int]]:
        return []

    def read(self, offset: int, length: int) -> Bytes:
        return self._assemble(offset, length, decide=True)[0]

    def variants(self, offset: int, length: int) -> Variants:
        first, open_choices = self._assemble(offset, length, decide=not self._sets)
        spans = []
        for choice in open_choices:
            start = max(choice.atom * self.contents.atom, offset)
            stop = min((choice.atom + 1) * self.contents.atom, offset + length)
            inner = choice.contents[:, start - choice.atom * self.contents.atom :][:, : stop - start]
            if stop - start < self.contents.atom:
                _, order = np.unique(inner, axis=0, return_index=True)
                inner = inner[np.sort(order)]
            if len(inner) > 1:
                spans.append(Span(start - offset, stop - offset, inner[1:]))
        return Variants(first, tuple(spans))

    def gather(self, offsets: Offsets, length: int) -> Gathered:
        size, contents = self.contents.atom, self.contents
        quiet = contents.quiet(offsets // size, -(-(offsets + length) // size))
        if length % SECTOR:
            quiet[:] = False
        quiet &= (offsets % SECTOR == 0) & (offsets + length <= contents.sectors * SECTOR)
        first = np.empty((len(offsets), length), dtype=np.uint8)
        sectors = offsets[quiet, None] // SECTOR + np.arange(length // SECTOR)
        first[quiet] = contents.take(contents.rows[sectors].reshape(-1)).reshape(-1, length)
        undecided = []
        for i in np.flatnonzero(~quiet).tolist():
            variants = self.variants(int(offsets[i]), length)
            first[i] = variants.first
            if variants.spans:
                undecided.append((i, variants))
        return first, undecided

    def undecided(self, offset: int, length: int) -> bool:
        """Whether some byte of the range could still hold something else."""
        return bool(self._assemble(offset, length, decide=False)[1])

    def known(self, sectors: Rows) -> tuple[Bytes, NDArray[np.bool_]]:
        """The contents of `sectors`, which ascend (a row each), and which of them are still to be decided."""
        size = self.contents.atom
        content, is_open = np.empty((len(sectors), SECTOR), dtype=np.uint8), np.zeros(len(sectors), dtype=np.bool_)
        breaks = np.flatnonzero(np.diff(sectors) > 1) + 1
        for part in filter(len, np.split(np.arange(len(sectors)), breaks)):
            begin, end = int(sectors[part[0]]) * SECTOR, (int(sectors[part[-1]]) + 1) * SECTOR
            inside, open_choices = self._assemble(begin, end - begin, decide=False)
            content[part] = inside.reshape(-1, SECTOR)
            for choice in open_choices:
                is_open |= sectors * SECTOR // size == choice.atom
        return content, is_open

    def _assemble(self, offset: int, length: int, *, decide: bool) -> tuple[Bytes, list[Choice]]:
        """The range with every decision applied, and the choices in it that are open."""
        size = self.contents.atom
        first, last = offset // size, -(-(offset + length) // size)
        content = self.contents.durable(first, last)
        open_choices: list[Choice] = []
        copied = False
        for choice in self.contents.choices(first, last):
            chosen = self._chosen(choice, decide)
            if chosen is None:
                open_choices.append(choice)
            elif chosen:
                if not copied:
                    content, copied = content.copy(), True
                begin = (choice.atom - first) * size
                content[begin : begin + size] = choice.contents[chosen]
        return content[offset - first * size :][:length], open_choices

    def _chosen(self, choice: Choice, decide: bool) -> int | None:
        """The number of the content that was decided, or is now if it is to be."""
        if self.contents.options.narrow:
            if not decide:
                return None
            contents = self.contents
            survival = self._survival or Survival(self.search, contents.options, contents.in_flight)
            return survival.content(self._number, choice, contents.layers(choice))
        decision = self.search.decided(self._number, choice.atom)
        if decision is None and decide:
            decision = self.search.decide(self._number, choice)
        return None if decision is None else decision.chosen

    def explore(self, part: Callable[[], None]) -> None:
        """Run `part` of a check for every way its reads can turn out (`Search.explore`)."""
        self.search.explore(part)
