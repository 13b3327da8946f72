"""`powercut check IMAGE`: a format's checker on an ordinary image."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from powercut.disk import ImageDisk
from powercut.errors import InputError
from powercut.formats.qcow2.check import Check, check
from powercut.formats.qcow2.forensics.anatomy import Anatomy, header_document
from powercut.formats.qcow2.forensics.dissect import dissect
from powercut.formats.qcow2.forensics.first import First, look
from powercut.formats.qcow2.forensics.layers import Layers, all_references, clean, of
from powercut.formats.qcow2.forensics.losses import Loss, losses
from powercut.report.text import count, progress

SCHEMA = "powercut.check/1"
_SHOWN = 20  # problems in the text; the JSON document has all that the checker lists


@dataclass(frozen=True, slots=True)
class Inspection:
    """What a check says. `exit_code`: 0 clean or leaks only, 1 damaged, 2 not an image of a known format."""

    exit_code: int
    text: str
    document: dict[str, Any]


def inspect(path: str, format: str | None) -> Inspection:
    """Check the image at `path`. `format` says what it is known to be; else its magic tells, or its name's ending.

    Raises InputError if it cannot be read, or is of no known format.
    """
    if format not in (None, "qcow2"):
        raise InputError(f"{path}: format {format!r} has no checker; qcow2 has")
    disk = ImageDisk(path)
    result = check(disk, trust_dirty=True)
    if not result.is_qcow2 and format is None and Path(path).suffix.lower() != ".qcow2":
        raise InputError(f"{path}: not an image of a known format: begins with {disk.read(0, 16).tobytes()!r}")
    damaged = bool(result.problems or result.corruptions or result.check_errors or result.aborted)
    remains = _remains(path, disk) if result.header is None else None
    hidden = _hidden(path, disk) if result.leaks and not result.aborted else []
    suspicious = any(not loss.faint for loss in hidden)
    lines = [_text(path, result, suspicious), *([] if remains is None else _remains_text(path, remains))]
    lines += [f"  {'unless it crashed' if loss.faint else 'suspicion'}: {loss.text}" for loss in hidden]
    if hidden:
        lines.append(
            "  qemu-img check calls these leaks harmless; to repair them is to throw away what a rescue may find"
        )
    document = _document(path, result, damaged or suspicious, remains, hidden)
    return Inspection(int(document["damaged"]), "\n".join(lines), document)


def _hidden(path: str, disk: ImageDisk) -> list[Loss]:
    """What is lost in an image that has leaks and nothing worse."""
    anatomy = dissect(path, disk)
    assert anatomy is not None, "the header is there"
    layers = of(anatomy)
    clean(layers, anatomy, [])
    working = Layers(disk, anatomy.header, layers, disk.size)
    return losses(anatomy, working, all_references(working, -(-disk.size >> anatomy.header.cluster_bits)))


@dataclass(frozen=True, slots=True)
class Remains:
    """An image without a header: what lies there, and what the rest shows (None: nothing)."""

    at_zero: First
    anatomy: Anatomy | None


def _remains(path: str, disk: ImageDisk) -> Remains:
    with progress("looking for tables") as show:
        anatomy = dissect(path, disk, show)
    return Remains(look(disk, anatomy), anatomy)


def _remains_text(path: str, remains: Remains) -> list[str]:
    at_zero = f"  at offset 0 lies {remains.at_zero.text}"
    if remains.anatomy is None:
        return [f"{at_zero}; no table of a qcow2 image was found anywhere"]
    lines = [at_zero, "  the header was, as far as the rest shows:"]
    lines += [f"    {note.certainty:9}  {note.what}: {note.text}" for note in remains.anatomy.notes]
    return [*lines, f"  powercut rescue {shlex.quote(path)} --out NEW.qcow2"]


def _word(result: Check, suspicious: bool) -> str:
    if not result.is_qcow2:
        return "DAMAGED: the header is gone"
    if result.header is None:
        return "DAMAGED: cannot be opened"
    if result.corruptions or result.problems or result.check_errors or result.aborted:
        return "DAMAGED"
    if suspicious:
        return "SUSPECT: the leaks may be lost data"
    return "clean, but for leaks" if result.leaks else "clean"


def _text(path: str, result: Check, suspicious: bool) -> str:
    lines = [f"{path}: qcow2, {_word(result, suspicious)}"]
    if result.header is not None:
        header = result.header
        lines.append(
            f"  version {header.version}, {header.size:,} bytes, clusters of {header.cluster_size:,}, "
            f"{count(header.nb_snapshots, 'snapshot')}"
        )
        lines.append(
            f"  {count(result.corruptions, 'corruption')}, {count(result.leaks, 'leaked cluster')}, "
            f"{count(result.check_errors, 'error')} of the check itself"
        )
        if result.dirty:
            lines.append("  the dirty bit is set: refcounts are rebuilt at the next writable open")
    if result.leaks:
        lines.append(f"  leaked clusters: {_runs(_leaked(result))}")
    lines += [f"  {problem.text}" for problem in result.problems[:_SHOWN]]
    more = len(result.problems) + result.omitted - _SHOWN
    if more > 0:
        lines.append(f"  and {count(more, 'more problem')}")
    return "\n".join(lines)


def _leaked(result: Check) -> list[int]:
    return [] if result.leaked is None else np.flatnonzero(result.leaked).tolist()


def _runs(numbers: list[int]) -> str:
    """ "5 to 9, 12", cut off where nobody reads on."""
    cuts = [i for i in range(1, len(numbers)) if numbers[i] != numbers[i - 1] + 1]
    runs = [numbers[i:j] for i, j in zip([0, *cuts], [*cuts, len(numbers)], strict=True)]
    words = [str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs[:_SHOWN]]
    return ", ".join(words) + (" ..." if len(runs) > _SHOWN else "")


def _document(path: str, result: Check, damaged: bool, remains: Remains | None, hidden: list[Loss]) -> dict[str, Any]:
    anatomy = remains and remains.anatomy
    return {
        "schema": SCHEMA,
        "image": path,
        "format": "qcow2",
        "damaged": damaged,
        "summary": _word(result, any(not loss.faint for loss in hidden)),
        "corruptions": result.corruptions,
        "leaks": result.leaks,
        "leaked_clusters": _leaked(result),
        "check_errors": result.check_errors,
        "aborted": result.aborted or None,
        "dirty": result.dirty,
        "problems": [
            {"rule": p.rule, "kind": p.kind, "where": p.where, "severity": p.severity.label, "text": p.text}
            for p in result.problems
        ],
        "omitted": result.omitted,
        "suspicions": [{"kind": one.kind, "faint": one.faint, "text": one.text} for one in hidden],
        "offset_zero": {"kind": remains.at_zero.kind, "text": remains.at_zero.text} if remains else None,
        "header_was": header_document(anatomy) if anatomy else None,
    }
