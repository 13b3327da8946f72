"""The same work with several QEMUs, and one table of what came out.

A QEMU is named by the folder that holds its programs (or by one of them); a build tree will do. What is not in that
folder is taken from PATH, so a folder may hold one changed program only; the table says which programs were there.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from powercut.errors import EnvironmentFault, InputError

SCHEMA = "powercut.compare/1"
PROGRAMS = ("qemu-storage-daemon", "qemu-img", "qemu-io", "qemu-nbd", "qemu-system-x86_64")
_BUILT = ("", "storage-daemon")  # where a build tree has them
_PATIENCE = 30.0  # seconds that a program may take to state its version


class Worked(NamedTuple):
    """What came of the work: an exit code, its lines in the table, and the whole as JSON."""

    code: int
    cells: dict[str, str]
    document: dict[str, Any]


class Side(NamedTuple):
    """`qemu` as it was named; `about`: its version, and the programs that are its own."""

    qemu: str
    about: str
    worked: Worked


def _folders(qemu: str) -> list[Path]:
    """Where the programs of this QEMU lie. Raises InputError."""
    named = Path(shutil.which(qemu) or qemu)
    home = named if named.is_dir() else named.parent
    if not named.exists():
        raise InputError(f"--qemu: {qemu} was not found")
    folders = [home / part for part in _BUILT if (home / part).is_dir()]
    if not any(os.access(folder / name, os.X_OK) for folder in folders for name in PROGRAMS):
        raise InputError(f"--qemu {qemu}: neither a folder with programs of QEMU's nor one of them")
    return [folder.absolute() for folder in folders]


@contextmanager
def using(qemu: str | None) -> Iterator[None]:
    """For as long as this lasts QEMU's programs are those of `qemu` (None: those on PATH), in processes that are
    started meanwhile, too. Raises InputError."""
    if qemu is None:
        yield
        return
    before = os.environ.get("PATH", os.defpath)
    os.environ["PATH"] = os.pathsep.join([*map(str, _folders(qemu)), before])
    try:
        yield
    finally:
        os.environ["PATH"] = before


def system(qemu: str | None) -> str:
    """The emulator that belongs to `qemu`, to be started while `using` it: that program, unless it is a tool."""
    named = shutil.which(qemu) if qemu else None
    return named if named and Path(named).name not in PROGRAMS else "qemu-system-x86_64"


def about(qemu: str) -> str:
    """ "7.2.22 (qemu-img, qemu-io)": the version that its programs state, and which there are. Raises InputError and
    EnvironmentFault."""
    found = {name: folder / name for folder in _folders(qemu) for name in PROGRAMS if (folder / name).is_file()}
    versions = []
    for path in found.values():
        try:
            said = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=_PATIENCE).stdout
        except (OSError, subprocess.TimeoutExpired) as error:
            raise EnvironmentFault(f"{path}: does not state its version: {error}") from None
        version = re.search(r"[0-9]+(?:\.[0-9]+)+", said)
        versions.append(version[0] if version else "unknown")
    return f"{'/'.join(dict.fromkeys(versions))} ({', '.join(found)})"


def run(qemus: Sequence[str], work: Callable[[str], Worked]) -> list[Side]:
    """Have the work done with one QEMU after the other."""
    sides = [(qemu, about(qemu)) for qemu in qemus]  # what is wrong with the last one is told before the first begins
    done = []
    for qemu, what in sides:
        with using(qemu):
            done.append(Side(qemu, what, work(qemu)))
    return done


def _rows(sides: Sequence[Side]) -> list[tuple[str, list[str]]]:
    names = dict.fromkeys(name for side in sides for name in side.worked.cells)
    return [(name, [side.worked.cells.get(name, "-") for side in sides]) for name in names]


def differing(sides: Sequence[Side]) -> list[str]:
    """The lines of the table that are not the same for all."""
    return [name for name, cells in _rows(sides) if len(set(cells)) > 1]


def text(sides: Sequence[Side]) -> str:
    """One table: a line for each result, a column for each QEMU."""
    letters = [chr(ord("A") + number) for number in range(len(sides))]
    lines = [f"{letter}  {side.qemu}: {side.about}" for letter, side in zip(letters, sides, strict=True)]
    rows, differ = [("", letters), *_rows(sides)], differing(sides)
    widths = [max(len(row[1][column]) for row in rows) for column in range(len(sides))]
    first = max(len(name) for name, _ in rows)
    for name, cells in rows:
        line = f"{name:{first}}  " + "  ".join(f"{cell:{width}}" for cell, width in zip(cells, widths, strict=True))
        lines.append((line + ("  differs" if name in differ else "")).rstrip())
    return "\n".join(lines)


def exit_code(sides: Sequence[Side]) -> int:
    """1 if any was BROKEN, else 3 if any was UNKNOWN, else 0."""
    codes = {side.worked.code for side in sides}
    return next((code for code in (1, 3) if code in codes), 0)


def document(sides: Sequence[Side]) -> dict[str, Any]:
    """The comparison as JSON, schema `powercut.compare/1`."""
    return {
        "schema": SCHEMA,
        "sides": [{"qemu": side.qemu, "about": side.about, "result": side.worked.document} for side in sides],
        "rows": [{"name": name, "cells": cells} for name, cells in _rows(sides)],
        "differing": differing(sides),
    }
