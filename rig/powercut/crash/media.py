"""Media faults: what a disk does to bytes besides losing power, laid over any crash state.

    flip               one bit of an atom is the other way round
    zero               an atom reads as zeros
    read-error         an atom cannot be read (EIO)
    lost-write         a write was acknowledged and flushed, and never reached the disk
    misdirected-write  a write was acknowledged and flushed, and landed at another offset

The first three strike one atom after the crash: it has one content then, whatever was in flight on it. The others are
another history of the same recording: its event is gone, or has another offset, and everything else follows from the
fault model. Recorded bytes stay as they are.

Faults are drawn with a seed, spread over what the bytes are for, so that a header is struck as often as a sector of
data, of which there are thousands more.
"""

from __future__ import annotations

import copy
import errno
import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from powercut.crash.contents import Contents, InFlight, Rows, Tokens
from powercut.crash.disk import Deciding
from powercut.crash.search import Search
from powercut.disk import Bytes, Variants
from powercut.stamp import GARBAGE
from powercut.trace import SECTOR, FileInfo, Kind, Trace
from powercut.verdict import Problem, Severity

KINDS = ("flip", "zero", "read-error", "lost-write", "misdirected-write")
_OF_WRITES = KINDS[3:]
_TRIES = 8  # places looked at for each fault that is drawn


class Fault(msgspec.Struct, frozen=True, omit_defaults=True):
    """One fault, in a crash before `position`. `offset`: the first byte of the atom, or of the write. `bit`: of a
    flip, counted from the atom's first byte. `event`: the write's index. `to`: where it landed. `role`: what the bytes
    at `offset` are for."""

    kind: str
    position: int
    offset: int
    bit: int = 0
    event: int = -1
    to: int = -1
    role: str = ""

    def __str__(self) -> str:
        what = f"{self.role}, at {self.offset:#x}"
        return {
            "flip": f"bit {self.bit % 8} of byte {self.offset + self.bit // 8:#x} is flipped ({self.role})",
            "zero": f"an atom reads as zeros: {what}",
            "read-error": f"an atom cannot be read: {what}",
            "lost-write": f"the write of event {self.event} was flushed and is lost: {what}",
            "misdirected-write": f"the write of event {self.event} landed at {self.to:#x}: {what}",
        }[self.kind]


class Unreadable(OSError):
    """A latent read error at byte `offset` of the disk."""

    def __init__(self, offset: int) -> None:
        super().__init__(errno.EIO, f"byte {offset} cannot be read")
        self.offset = offset


def struck(trace: Trace, fault: Fault) -> Trace:
    """The history of `trace` as the disk has it: without a lost write, or with a misdirected one where it landed."""
    if fault.kind not in _OF_WRITES:
        return trace
    other = copy.copy(trace)
    other.events = trace.events.copy()
    if fault.kind == "lost-write":
        other.events["kind"][fault.event] = Kind.MARK
    else:
        other.events["offset"][fault.event] = fault.to
    return other


class Damaged(Contents):
    """The contents of a disk with one fault, from `fault.position` on."""

    def __init__(self, trace: Trace, file: FileInfo, atom: int, lying: int, fault: Fault) -> None:
        super().__init__(struck(trace, fault), file, atom, lying)
        self.fault = fault
        self._struck = -1  # the atom that the fault is on

    def advance(self, position: int) -> None:
        super().advance(position)
        if self._struck >= 0 or position < self.fault.position or self.fault.kind in _OF_WRITES:
            return
        self._struck = self.fault.offset // self.atom
        sectors = slice(self._struck * self.per_atom, (self._struck + 1) * self.per_atom)
        if self.fault.kind == "zero":
            self.rows[sectors] = 0
        elif self.fault.kind == "flip":
            sector, bit = divmod(self.fault.bit, SECTOR * 8)
            content = self.take(self.rows[sectors][sector : sector + 1])[0].copy()
            content[bit // 8] ^= 1 << bit % 8
            self._composed.append(content)
            self.rows[sectors.start + sector] = len(self.trace.rows) + len(self._composed) - 1
        self._forget()

    def in_flight_atoms(self) -> InFlight:
        flight = super().in_flight_atoms()
        if self._struck >= 0 and (flight.atom == self._struck).any():
            kept = flight.atom != self._struck
            flight = self._in_flight = InFlight(flight.atom[kept], flight.event[kept], flight.rows[kept])
        return flight

    def durable(self, first: int, last: int) -> Bytes:
        if self.fault.kind == "read-error" and first <= self._struck < last:
            raise Unreadable(self._struck * self.atom)
        return super().durable(first, last)

    def quiet(self, first: Rows, last: Rows) -> NDArray[np.bool_]:
        return super().quiet(first, last) & ((first > self._struck) | (self._struck >= last))

    def candidates(self, sectors: Rows, tokens: Tokens) -> tuple[Rows, Rows, Rows]:
        index, op, stamped = super().candidates(sectors, tokens)
        if self.fault.kind == "read-error":  # suspect, so that it is read
            op = np.where(sectors[index] // self.per_atom == self._struck, GARBAGE, op)
        return index, op, stamped


class Noticing:
    """`disk`, whose read errors end the part of a check that meets one, and are reported as noticed."""

    def __init__(self, disk: Deciding, report: Callable[[Problem], None]) -> None:
        self.size = disk.size
        self.search: Search = disk.search
        self._disk = disk
        self._report = report

    @property
    def written(self) -> list[tuple[int, int]]:
        return self._disk.written

    def read(self, offset: int, length: int) -> Bytes:
        return self._disk.read(offset, length)

    def variants(self, offset: int, length: int) -> Variants:
        return self._disk.variants(offset, length)

    def explore(self, part: Callable[[], None]) -> None:
        self._disk.explore(lambda: self.run(part))

    def run(self, part: Callable[[], None]) -> None:
        """Run `part` of a check, or as much of it as can be read."""
        try:
            part()
        except Unreadable as error:
            text = f"the disk cannot read byte {error.offset:#x}, and says so"
            self._report(Problem("media", "read-error", error.offset, Severity.LOSS, text))


Roles = Callable[[], Callable[[int], str]]  # what bytes are for, at the position that the contents stand at


def draw(
    contents: Contents, roles: Roles, positions: Sequence[int], kinds: Sequence[str], number: int, seed: int
) -> list[Fault]:
    """`number` faults of each of `kinds`, fewer where there are not as many places, by position ascending.
    `contents` go forward to some of `positions`."""
    rnd = random.Random(seed)
    some = sorted({rnd.choice(positions) for _ in range(4)} | {positions[-1]})
    faults: list[Fault] = []
    for place, position in enumerate(some):
        contents.advance(position)
        role = roles()
        for kind in kinds:
            share = (place + 1) * number // len(some) - sum(fault.kind == kind for fault in faults)
            here = _writes(contents, kind, rnd, share) if kind in _OF_WRITES else _atoms(contents, kind, rnd, share)
            named = [msgspec.structs.replace(fault, role=role(fault.offset)) for fault in here]
            faults += _spread(named, share, rnd)
    return faults


def _used(contents: Contents) -> Rows:
    """The atoms that hold something else than zeros."""
    sectors = np.flatnonzero(contents.rows)
    parts = np.array_split(sectors, -(-len(sectors) // 16384) or 1)  # at most 8 MiB at a time
    filled = [part[contents.take(contents.rows[part]).any(axis=1)] for part in parts]
    return np.unique(np.concatenate(filled) // contents.per_atom)


def _atoms(contents: Contents, kind: str, rnd: random.Random, number: int) -> Iterator[Fault]:
    used = _used(contents).tolist()
    edge = used[: 2 * _TRIES]  # metadata is first in most formats, and few
    for atom in dict.fromkeys([*rnd.sample(used, min(len(used), number * _TRIES)), *edge]):
        bit = rnd.randrange(contents.atom * 8) if kind == "flip" else 0
        yield Fault(kind, contents.position, atom * contents.atom, bit)


def _writes(contents: Contents, kind: str, rnd: random.Random, number: int) -> Iterator[Fault]:
    durable = np.unique(contents.writer[: contents.sectors])
    events = (durable[durable > 0] - 1).tolist()
    events = [event for event in events if contents.kind[event] == Kind.WRITE]
    used = _used(contents)
    for event in rnd.sample(events, min(len(events), number * _TRIES)):
        offset, length = (int(contents.trace.events[name][event]) for name in ("offset", "length"))
        to = -1
        if kind == "misdirected-write":
            fits = used[used * contents.atom + offset % SECTOR + length <= contents.size] * contents.atom
            fits = fits[fits != offset - offset % SECTOR]
            if not len(fits):
                continue
            to = rnd.choice(fits.tolist()) + offset % SECTOR
        yield Fault(kind, contents.position, offset, event=event, to=to)


def _spread(faults: list[Fault], number: int, rnd: random.Random) -> list[Fault]:
    """`number` of `faults`, taken in turn from each group of bytes that are for the same."""
    groups: dict[str, list[Fault]] = defaultdict(list)
    for fault in faults:
        groups[purpose(fault.role)].append(fault)
    turns = list(groups.values())
    rnd.shuffle(turns)
    chosen: list[Fault] = []
    while len(chosen) < number and any(turns):
        chosen += [group.pop() for group in turns if group]
    return chosen[:number]


def purpose(role: str) -> str:
    """A role without its numbers: "guest data at sector 8" is guest data."""
    return re.split(r" (?:at|of|from) ", role)[0].removeprefix("the ")
