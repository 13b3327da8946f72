"""A scenario's operations: from the words of a history, or drawn from a seed."""

from __future__ import annotations

import contextlib

import msgspec

from powercut.errors import InputError
from powercut.guest.workload import KINDS, Operation, Verb, draw
from powercut.scenario import Scenario, parse_size, size_text
from powercut.trace import SECTOR, Kind

_VERBS = {str(verb): verb for verb in Verb}
_FORMS = (
    "write|zero|discard OFFSET LENGTH, zero ... unmap, flush, reopen, snapshot create|apply|delete NAME, resize SIZE, "
    "commit"
)


def operations(scenario: Scenario) -> list[Operation]:
    """The operations of a scenario's workload. Raises InputError for a history that makes no sense, and for a scenario
    that cannot be recorded."""
    size = parse_size(scenario.size)
    for name, text in (("size", scenario.size), ("backing", scenario.backing)):
        if text is not None and (parse_size(text) % SECTOR or not parse_size(text)):
            raise InputError(f"{name} {text}: not a positive multiple of {SECTOR} bytes")
    if scenario.workload.history:
        reader = _Reader(scenario, size)
        work = [reader.operation(line) for line in scenario.workload.history]
    else:
        work = list(draw(scenario.workload.seed, scenario.workload.operations, size, scenario.workload.extra))
    if scenario.record.via == "blklogwrites":
        _check_log(scenario, work)
    elif scenario.record.no_flush:
        raise InputError("no_flush does nothing over nbd")
    return work


def line(operation: Operation) -> str:
    """The line of a history that says this."""
    if operation.verb is Verb.RESIZE:
        return f"{operation.verb} {size_text(operation.length)}"
    if operation.verb is not None:
        return f"{operation.verb} {operation.name}".strip()
    if operation.kind is Kind.FLUSH:
        return "flush"
    where = f"{size_text(operation.offset)} {size_text(operation.length)}"
    return f"{operation.kind.name.lower()} {where}{' unmap' if operation.unmap else ''}"


def possible(scenario: Scenario) -> Scenario:
    """The scenario without those lines of its history that make no sense where they stand."""
    reader, kept = _Reader(scenario, parse_size(scenario.size)), []
    for line in scenario.workload.history:
        with contextlib.suppress(InputError):
            reader.operation(line)
            kept.append(line)
    workload = msgspec.structs.replace(scenario.workload, history=tuple(kept))
    return msgspec.structs.replace(scenario, workload=workload)


def _check_log(scenario: Scenario, work: list[Operation]) -> None:
    if scenario.workload.extra or any(operation.kind not in (Kind.WRITE, Kind.FLUSH) for operation in work):
        raise InputError(
            "via blklogwrites only writes and flushes can be judged: zeroes and discards bear no stamps, and a reopen "
            "begins a new log"
        )
    if scenario.backing is not None or scenario.record.lie:
        raise InputError("via blklogwrites neither a backing file nor a lie can be recorded")


class _Reader:
    """Reads a history line by line, and knows how large the disk is there and which snapshots there are."""

    def __init__(self, scenario: Scenario, size: int) -> None:
        self._size = size
        self._format = scenario.format
        self._backed = scenario.backing is not None
        self._old = scenario.options.get("compat") in ("0.10", "v2")
        self._base = parse_size(scenario.backing or "0")
        self._committed = False
        self._snapshots: dict[str, int] = {}  # and how large the disk was

    def operation(self, line: str) -> Operation:
        """Raises InputError for what is not an operation, or not possible there."""
        words = line.split()
        name = " ".join(words[:2]) if words[:1] == ["snapshot"] else "".join(words[:1])
        if name in _VERBS:
            return self._managed(line, _VERBS[name], words[len(name.split()) :])
        kind = KINDS.get(name)
        unmap = words[-1:] == ["unmap"]
        places = words[1 : len(words) - unmap]
        bare = kind is Kind.FLUSH
        if kind is None or len(places) != (0 if bare else 2) or (unmap and kind is not Kind.ZERO):
            raise InputError(f"history: {line!r} is not one of: {_FORMS}")
        offset, length = [parse_size(word) for word in places] or [0, 0]
        if (offset | length) % SECTOR or offset + length > self._size or (length == 0) != bare:
            raise InputError(f"history: {line!r} is not a range of whole sectors within {self._size} bytes")
        return Operation(kind, offset, length, unmap)

    def _managed(self, line: str, verb: Verb, words: list[str]) -> Operation:
        takes = 0 if verb in (Verb.REOPEN, Verb.COMMIT) else 1
        if len(words) != takes:
            raise InputError(f"history: {line!r} is not one of: {_FORMS}")
        if verb is not Verb.REOPEN and self._format != "qcow2":
            raise InputError(f"history: {line!r}: {self._format} knows no such thing")
        if verb is Verb.COMMIT and not self._backed:
            raise InputError(f"history: {line!r}: there is no backing file")
        if verb is Verb.COMMIT:
            if self._base < self._size:
                raise InputError(f"history: {line!r}: the disk is larger than its backing file, which cannot grow")
            self._committed = True
        elif self._committed and verb in (Verb.RESIZE, Verb.APPLY):
            raise InputError(f"history: {line!r}: what this does after a commit is not known")
        if verb is Verb.RESIZE:
            size = parse_size(words[0])
            if size % SECTOR or not size:
                raise InputError(f"history: {line!r}: not a positive multiple of {SECTOR} bytes")
            if self._old and self._backed and size > self._size:
                raise InputError(f"history: {line!r}: QEMU does not enlarge an image of version 2 on a backing file")
            if self._old and self._snapshots:
                raise InputError(f"history: {line!r}: QEMU does not resize an image of version 2 that has snapshots")
            self._size = size
            return Operation(Kind.MARK, length=size, verb=verb)
        name = "".join(words)
        if name and (name in self._snapshots) == (verb is Verb.CREATE):
            raise InputError(
                f"history: {line!r}: there is {'already a' if verb is Verb.CREATE else 'no'} such snapshot"
            )
        if verb is Verb.CREATE:
            self._snapshots[name] = self._size
        elif verb is Verb.APPLY:
            self._size = self._snapshots[name]
        elif verb is Verb.DELETE:
            del self._snapshots[name]
        return Operation(Kind.MARK, verb=verb, name=name)
