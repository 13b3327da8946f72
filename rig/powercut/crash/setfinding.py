"""A finding on several files: one crash state of a directory that breaks a rule, as a file that brings it back.

Like `powercut.crash.finding`, with decisions on names, sizes and contents. JSON, schema `powercut.set-finding/1`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import msgspec

from powercut import __version__
from powercut.crash.contents import Choice
from powercut.crash.fileset import CrashSet, Told
from powercut.crash.finding import Saved, read, same_trace
from powercut.crash.options import Options
from powercut.crash.search import OneState
from powercut.crash.settled import Patch, apply, files_at, root_of, write_out
from powercut.errors import InputError
from powercut.trace import Trace
from powercut.verdict import Problem

SCHEMA = "powercut.set-finding/1"
_SAID = 3  # things that are named in a sentence


class Settled(msgspec.Struct, frozen=True):
    """A decision (`powercut.crash.fileset.Told`). `what` is in words what it is about, `lost` whether what was in
    flight there was."""

    level: int
    file: str
    what: str
    offset: int
    event: int
    lost: bool
    write: str
    disk: int
    atom: int
    chosen: int


class SetFinding(Saved, frozen=True):
    """See the module. What was in flight besides was lost or survived as `others` says. `patches` are what recoveries
    made of the files before they were cut off themselves; `order` says what had to be on disk before what."""

    options: Options
    position: int
    level: int
    rule: str
    kind: str
    where: int
    severity: str
    text: str
    checker: str
    image: str
    decisions: list[Settled]
    patches: list[Patch] = msgspec.field(default_factory=list)
    others: Literal["lost", "survived"] = "lost"
    order: str = ""

    @property
    def stretches(self) -> list[Stretch]:
        """The decisions, neighbours put together."""
        return stretches(self.decisions, self.options.atom)


class Found(Protocol):
    """What the search found (`powercut.stores.StoreFinding`)."""

    @property
    def position(self) -> int: ...
    @property
    def level(self) -> int: ...
    @property
    def problem(self) -> Problem: ...
    @property
    def decisions(self) -> tuple[Told, ...]: ...
    @property
    def patches(self) -> tuple[Patch, ...]: ...
    @property
    def others(self) -> Literal["lost", "survived"]: ...
    @property
    def needs(self) -> tuple[Told, ...]: ...


class Planned(Protocol):
    """How the trace was explored (`powercut.explore.sets.SetPlan`)."""

    @property
    def options(self) -> Options: ...
    @property
    def checker(self) -> str | None: ...
    @property
    def image(self) -> str | None: ...


def from_found(found: Found, plan: Planned, trace: Trace) -> SetFinding:
    """The finding for what the search found in `trace`."""
    problem = found.problem
    return SetFinding(
        schema=SCHEMA,
        powercut=__version__,
        trace=trace.path,
        trace_hash=trace.hash,
        options=plan.options,
        position=found.position,
        level=found.level,
        rule=problem.rule,
        kind=problem.kind,
        where=problem.where,
        severity=problem.severity.label,
        text=problem.text,
        checker=plan.checker or "",
        image=plan.image or "",
        decisions=[_settled(told) for told in found.decisions],
        patches=list(found.patches),
        others=found.others,
        order=_order(found, plan.options.atom),
    )


class Stretch(NamedTuple):
    """Decisions that are alike, on neighbouring atoms of one file; `end` is where they end, in bytes."""

    first: Settled
    end: int

    def __str__(self) -> str:
        what, file, begin = self.first.what, self.first.file, self.first.offset
        whose = f" (of recovery {self.first.level})" if self.first.level else ""
        if what == "content":
            return f"{file} at {begin:#x}" + (f" to {self.end:#x}" if self.end > begin else "") + whose
        if what == "size":
            return f"the size of {file}{whose}"
        return self.first.write + (f" in {file}" if what == "name" and file != "." else "") + whose


def stretches(decisions: Sequence[Settled], atom: int) -> list[Stretch]:
    """Decisions, neighbours put together."""
    found: list[Stretch] = []
    for one in sorted(decisions, key=lambda one: (one.level, one.file, one.what, one.offset)):
        if found:
            first, end = found[-1]
            alike = all(getattr(first, name) == getattr(one, name) for name in ("level", "file", "event", "lost"))
            if alike and first.what == one.what == "content" and end + atom == one.offset:
                found[-1] = Stretch(first, one.offset)
                continue
        found.append(Stretch(one, one.offset))
    return found


def _order(found: Found, atom: int) -> str:
    """What had to be on disk before what; "" where that was not found out."""
    if found.others == "lost":
        return ""

    def words(items: Sequence[Told]) -> str:
        said = list(dict.fromkeys(str(one) for one in stretches([_settled(told) for told in items], atom)))
        return " and ".join(said[:_SAID]) + (f" and {len(said) - _SAID:,} more" if len(said) > _SAID else "")

    lost = words(found.decisions) or "what was done only later"
    before = words(found.needs)
    return f"{lost} had to be on disk {f'before {before}' if before else 'by then'}"


def _settled(told: Told) -> Settled:
    return Settled(
        told.level,
        told.file,
        told.what,
        told.offset,
        told.event,
        told.durable,
        told.write,
        told.disk,
        told.atom,
        told.chosen,
    )


def is_one(path: str) -> bool:
    """Whether the file at `path` is a finding on several files."""
    try:
        return SCHEMA.encode() in Path(path).read_bytes()[:200]
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None


def load(path: str) -> SetFinding:
    """Read a finding. Raises InputError."""
    return read(path, SetFinding, SCHEMA)


def write_state(finding: SetFinding, trace: Trace, target: str) -> list[str]:
    """Write the state of the finding out as files under `target`. Raises InputError."""
    same_trace(finding, trace)
    files = files_at(trace, finding.options, finding.position)
    answers = {(settled.disk, settled.atom): settled.chosen for settled in finding.decisions}

    def policy(disk: int, choice: Choice) -> int:
        chosen = answers.get((disk, choice.atom))
        if chosen is None:
            return files.newest(disk, choice) if finding.others == "survived" else 0
        if chosen >= len(choice.contents):
            raise InputError(
                f"the finding does not fit: content {chosen} of {len(choice.contents)}, atom {choice.atom}"
            )
        return chosen

    written = write_out(CrashSet(files, OneState(policy)), root_of(trace), target)
    apply(finding.patches, target)
    return written
