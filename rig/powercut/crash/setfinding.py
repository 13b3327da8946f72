"""A finding on several files: one crash state of a directory that breaks a rule, as a file that brings it back.

Like `powercut.crash.finding`, with decisions on names, sizes and contents. Everything else that was in flight was lost.
JSON, schema `powercut.set-finding/1`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import msgspec

from powercut import __version__
from powercut.crash.contents import Choice
from powercut.crash.fileset import CrashSet, Told
from powercut.crash.finding import Saved, read, same_trace
from powercut.crash.options import Options
from powercut.crash.search import Search
from powercut.crash.settled import Patch, apply, files_at, root_of, write_out
from powercut.errors import InputError
from powercut.trace import Kind, Trace
from powercut.verdict import Problem

SCHEMA = "powercut.set-finding/1"


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
    """See the module. `patches` are what recoveries made of the files before they were cut off themselves."""

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
        decisions=[_settled(told, trace) for told in found.decisions],
        patches=list(found.patches),
    )


def _settled(told: Told, trace: Trace) -> Settled:
    write = "" if told.level else _words(trace, told)
    return Settled(
        told.level,
        told.file,
        told.what,
        told.offset,
        told.event,
        told.durable,
        write,
        told.disk,
        told.atom,
        told.chosen,
    )


def _words(trace: Trace, told: Told) -> str:
    """The event, in words."""
    if told.event < 0:
        return "as before the recording"
    event = trace.events[told.event]
    kind = Kind(int(event["kind"])).name.lower()
    if told.what == "name":
        about: Mapping[str, Any] = trace.about(event)
        return f"{kind} {about.get('name')}{' to ' + str(about['to']) if 'to' in about else ''}"
    if kind == "truncate":
        return f"truncate to {int(event['length']):,} bytes"
    return f"{kind} of {int(event['length']):,} bytes at {int(event['offset']):#x}"


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
    answers = {(settled.disk, settled.atom): settled.chosen for settled in finding.decisions}

    def policy(disk: int, choice: Choice) -> int:
        chosen = answers.get((disk, choice.atom), 0)
        if chosen >= len(choice.contents):
            raise InputError(
                f"the finding does not fit: content {chosen} of {len(choice.contents)}, atom {choice.atom}"
            )
        return chosen

    search = Search()
    written: list[str] = []

    def whole() -> None:
        state = CrashSet(files_at(trace, finding.options, finding.position), search)
        written.extend(write_out(state, root_of(trace), target))

    search.answering(policy, whole)
    apply(finding.patches, target)
    return written
