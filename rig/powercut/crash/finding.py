"""A finding: one crash state that breaks a rule, as a file that brings it back.

The file names its trace by hash, says before which position the crash came, and lists the decisions that the
broken rule rests on. Of every other atom, what is in flight either survived or was lost, as `others` says; both are
legal states. JSON, schema `powercut.finding/1`; unknown versions are refused.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, Protocol, Self, TypeVar

import msgspec
import numpy as np

from powercut import __version__
from powercut.crash.contents import Contents
from powercut.crash.explore import Chosen, Found
from powercut.crash.media import Fault
from powercut.crash.options import SCRAMBLED, ZEROED, Options
from powercut.crash.shrink import newest
from powercut.errors import InputError
from powercut.trace import SECTOR, Kind, Trace

SCHEMA = "powercut.finding/1"


class Decided(msgspec.Struct, frozen=True, omit_defaults=True):
    """The atom at byte `offset` was left as the event numbered `event` left it (its index in the trace; -1: as it
    was before the recording), one of `contents` distinct contents. `lost`: that is its durable content, and what was
    in flight on it was lost; `whole`: the whole write was left or lost. `write` describes the event, `role` what the
    atom is for."""

    offset: int
    event: int
    contents: int
    lost: bool
    write: str = ""
    role: str = ""
    whole: bool = False


class Patch(msgspec.Struct, frozen=True):
    """What a recovery wrote over the crash state before it was cut off itself: bytes (base64 in JSON) at `offset`."""

    offset: int
    data: bytes


class Legal(msgspec.Struct, frozen=True):
    """What might have been found instead: in words, and the bytes (base64 in JSON)."""

    what: str
    data: bytes


class Saved(msgspec.Struct, frozen=True):
    """What every finding in a file says: which recording, by its path and its digest, and who wrote it."""

    schema: str
    powercut: str
    trace: str
    trace_hash: str

    def encode(self) -> bytes:
        """The finding as JSON, as it stands."""
        return msgspec.json.format(msgspec.json.encode(self))

    def of_trace(self, path: str) -> Self:
        """The same finding, for a copy of its trace at `path`."""
        return msgspec.structs.replace(self, trace=path)

    def save(self, path: Path) -> None:
        """Write the finding; the trace's path becomes relative to it."""
        path.write_bytes(self.of_trace(os.path.relpath(self.trace, path.parent)).encode())


class Finding(Saved, frozen=True):
    """See the module. `checker` is the command that judged, if one did; `patches` what it had written before it was
    cut off itself. `seen` counts the sectors or entries for which these decisions break this rule; `order` says
    what had to be on disk before what; `fault` is what the medium did besides. `whole`, `survivors` (the order) and
    `torn` are choices of the fault model (`powercut.crash.options`). `found` are the bytes that a guest's sector holds
    (base64 in JSON), `expected` what it might have held; `qemu` is the version that was recorded."""

    format: str
    atom: int
    position: int
    rule: str
    kind: str
    where: int
    severity: str
    text: str
    decisions: list[Decided]
    seen: int = 1
    others: Literal["lost", "survived"] = "lost"
    order: str = ""
    patches: list[Patch] = []
    checker: str = ""
    lying: int = 0
    fault: Fault | None = None
    whole: bool = False
    survivors: str = "any"
    torn: str = "old-or-new"
    found: bytes = b""
    expected: list[Legal] = []
    qemu: str = ""

    def retold(self, decisions: list[Decided], others: Literal["lost", "survived"], order: str) -> Finding:
        """The same broken rule, by these decisions."""
        return msgspec.structs.replace(self, decisions=decisions, others=others, order=order)


class Planned(Protocol):
    """How the trace was explored (`powercut.explore.session.Plan`)."""

    @property
    def format(self) -> str: ...
    @property
    def atom(self) -> int: ...
    @property
    def checker(self) -> str | None: ...
    @property
    def lying(self) -> int: ...
    @property
    def options(self) -> Options: ...


def from_found(found: Found, trace: Trace, plan: Planned, seen: int, role: Callable[[int], str]) -> Finding:
    """The finding for what the search found in `trace`; `role` says what the byte at an offset is for."""
    problem = found.problem
    return Finding(
        schema=SCHEMA,
        powercut=__version__,
        trace=trace.path,
        trace_hash=trace.hash,
        format=plan.format,
        atom=plan.atom,
        checker=plan.checker or "",
        lying=plan.lying,
        whole=plan.options.whole,
        survivors=plan.options.order,
        torn=plan.options.torn,
        position=found.position,
        rule=problem.rule,
        kind=problem.kind,
        where=problem.where,
        severity=problem.severity.label,
        text=problem.text,
        found=problem.found,
        qemu=str(trace.meta.get("qemu", "")),
        decisions=[
            Decided(d.offset, d.event, d.contents, d.durable, describe(trace, d.event), role(d.offset), d.whole)
            for d in found.decisions
        ],
        seen=seen,
        patches=[Patch(offset, data) for offset, data in found.patches],
        fault=found.fault,
    )


def describe(trace: Trace, event: int) -> str:
    """The event with this index, in words; less than 0 stands for what no event left."""
    if event < 0:
        return {ZEROED: "torn: zeros", SCRAMBLED: "torn: garbage"}.get(event, "as before the recording")
    about = trace.events[event]
    kind = Kind(about["kind"]).name.lower()
    return f"as the {kind} of {about['length']} bytes at {about['offset']:#x} left it"


AnyFinding = TypeVar("AnyFinding", bound=Saved)


def read(path: str, kind: type[AnyFinding], schema: str) -> AnyFinding:
    """Read a finding of this kind and schema; its trace's path becomes one from here. Raises InputError."""
    try:
        finding = msgspec.json.decode(Path(path).read_bytes(), type=kind)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a finding: {error}") from None
    if finding.schema != schema:
        raise InputError(f"{path}: schema {finding.schema!r}, this powercut reads {schema!r}")
    return finding.of_trace(os.path.normpath(os.path.join(os.path.dirname(path), finding.trace)))


def load(path: str) -> Finding:
    """Read a finding. Raises InputError."""
    finding = read(path, Finding, SCHEMA)
    if finding.atom <= 0 or finding.atom % SECTOR:
        raise InputError(f"{path}: atom {finding.atom} is not a multiple of {SECTOR} bytes")
    return finding


class OfTrace(Protocol):
    """Whatever is about one trace."""

    @property
    def trace_hash(self) -> str: ...


def same_trace(finding: OfTrace, trace: Trace) -> None:
    """Raise InputError if `trace` is not the one that the finding is about."""
    if trace.hash != finding.trace_hash:
        raise InputError(
            f"{trace.path}: another trace than the finding's (hash {trace.hash}, not {finding.trace_hash})"
        )


def apply(finding: Finding, contents: Contents) -> None:
    """Make the finding's decisions durable in `contents`, which stand at its crash, and let nothing be in flight.
    Raises InputError if the decisions do not fit."""
    same_trace(finding, contents.trace)
    flight = contents.in_flight_atoms()
    lost = [decided.offset // finding.atom for decided in finding.decisions if decided.lost]
    inner = np.arange(contents.per_atom)
    if finding.others == "survived":
        atoms, rows = newest(contents)
        kept = ~np.isin(atoms, lost)
        contents.rows[atoms[kept, None] * contents.per_atom + inner] = rows[kept]
    for decided in finding.decisions:
        atom, rest = divmod(decided.offset, finding.atom)
        if decided.lost and (decided.whole or not rest):
            continue
        hits = np.flatnonzero((flight.event == decided.event) & (decided.whole | (flight.atom == atom)))
        if decided.whole and len(hits):
            contents.rows[flight.atom[hits, None] * contents.per_atom + inner] = flight.rows[hits]
            continue
        if rest or not len(hits):
            raise InputError(
                f"the finding decides byte {decided.offset} for event {decided.event}: not in flight there"
            )
        contents.rows[atom * contents.per_atom + inner] = flight.rows[hits[0]]
    contents.settle_all()


@contextmanager
def settled_at(contents: Contents, decisions: Sequence[Chosen]) -> Iterator[None]:
    """For a while `contents` are the state that `decisions` made, everything else in flight being lost."""
    flight = contents.in_flight_atoms()
    survived = [(d.offset // contents.atom, d.event) for d in decisions if not d.durable]
    hits = [np.flatnonzero((flight.atom == atom) & (flight.event == event))[0] for atom, event in survived]
    where = np.array(hits, dtype=np.int64)
    with contents.settled_as(flight.atom[where], flight.rows[where]):
        yield


def write_image(contents: Contents, path: str, patches: Sequence[Patch] = ()) -> None:
    """Write the durable contents, with `patches` over them, as a sparse file of the image's size, in place of any file
    at `path`."""
    step = 2048  # sectors: 1 MiB
    try:
        with open(path, "wb") as out:
            for first in range(0, min(contents.sectors, -(-contents.size // SECTOR)), step):
                rows = contents.rows[first : min(first + step, contents.sectors)]
                if not rows.any():
                    continue
                data = contents.take(rows)
                if data.any():
                    out.seek(first * SECTOR)
                    out.write(data.reshape(-1)[: contents.size - first * SECTOR].tobytes())
            for patch in patches:
                out.seek(patch.offset)
                out.write(patch.data[: contents.size - patch.offset])
            out.truncate(contents.size)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from None
