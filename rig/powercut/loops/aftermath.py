"""What is looked at after a machine has ended: each image's structure, its header, and the guest's content."""

from __future__ import annotations

import errno
import json
import os
import subprocess
from dataclasses import replace
from typing import Final

import numpy as np

from powercut.disk import Bytes, ImageDisk
from powercut.endings import Ending
from powercut.errors import EnvironmentFault
from powercut.formats.qcow2.check import Check, check
from powercut.guest.daemon import tool
from powercut.guest.images import Image
from powercut.guest.ledger import Ledger
from powercut.verdict import Problem, Severity

_PATIENCE = 300.0  # seconds for qemu-img check
_PROBLEMS = 20  # of one kind listed at most
CHECKED_BY_QEMU: Final = ("qed", "vdi", "vhdx", "vmdk", "parallels")  # qcow2 by our own checker, in-process
# What of a qcow2 header may change at any time (offset, end): the refcount table grows; and what a snapshot changes:
# the L1 table of the active layer and the table of snapshots (QEMU, docs/interop/qcow2.txt, "Header").
_GROWS, _SNAPSHOT, _DIRTY = ((48, 60),), ((36, 48), (60, 72)), ((72, 80),)
_MAGIC = 8  # bytes of other formats' beginnings that never change


def first_cluster(image: Image) -> Bytes:
    """The bytes at the beginning of an image of which the header is a part; none where there is no header."""
    disk = ImageDisk(image.path)
    if image.format == "raw":
        return disk.read(0, 0)
    if image.format != "qcow2":
        return disk.read(0, _MAGIC).copy()
    bits = min(int(disk.read(23, 1)[0]), 21)
    return disk.read(0, 1 << bits).copy()


def examine(image: Image, before: Bytes | None, ending: Ending, ledger: Ledger | None) -> list[Problem]:
    """What is wrong with `image` after `ending`; its first cluster was `before` (None: it is new). A ledger that is
    given is settled.

    Raises EnvironmentFault if it cannot be told.
    """
    problems = _header(image, before, ending) if before is not None else []
    if image.format == "qcow2":
        problems += _qcow2(check(ImageDisk(image.path), trust_dirty=not ending.leaks), ending)
    elif image.format in CHECKED_BY_QEMU:
        problems += _by_qemu(image, ending)
    if ledger is not None and not _unreadable(problems):
        problems += content(image, ledger, ending)
    return problems


def _unreadable(problems: list[Problem]) -> bool:
    return any(problem.severity >= Severity.UNOPENABLE for problem in problems)


def content(image: Image, ledger: Ledger, ending: Ending, snapshot: str | None = None) -> list[Problem]:
    """What is wrong with what the guest would read, or would have read when a snapshot was taken; the ledger is
    settled. Raises EnvironmentFault if the disk is full."""
    try:
        held = image.held(snapshot)
    except EnvironmentFault as fault:
        if os.strerror(errno.ENOSPC) in str(fault):
            raise
        return [Problem("opens", "refused", 0, Severity.UNOPENABLE, str(fault))]
    problems = ledger.judge(held, ending.keeps)
    ledger.settle(held)
    if snapshot is not None:
        return [replace(problem, text=f"snapshot {snapshot}: {problem.text}") for problem in problems]
    return problems


def _header(image: Image, before: Bytes, ending: Ending) -> list[Problem]:
    after = first_cluster(image)
    if len(after) != len(before):
        return [Problem("opens", "header", 0, Severity.UNOPENABLE, "the header names another cluster size")]
    differs = after != before
    if image.format == "qcow2":
        allowed = _GROWS + (_SNAPSHOT if ending.header else ()) + (_DIRTY if ending.leaks else ())
        for begin, end in allowed:
            differs[begin:end] = False
    where = np.flatnonzero(differs)
    if not len(where):
        return []
    first = int(where[0])
    text = (
        f"{len(where):,} bytes of the first cluster changed: at offset {first} stands "
        f"{after[first : first + 16].tobytes().hex()}, before it was {before[first : first + 16].tobytes().hex()}"
    )
    return [Problem("opens", "header", first, Severity.UNOPENABLE, text)]


def _qcow2(found: Check, ending: Ending) -> list[Problem]:
    problems = found.problems[:_PROBLEMS]
    if found.aborted and not problems:
        problems.append(Problem("structure", "aborted", 0, Severity.CORRUPT, found.aborted))
    if found.leaks and not ending.leaks:
        text = f"{found.leaks:,} leaked clusters after an orderly end"
        problems.append(Problem("structure", "leak", found.leaks, Severity.LEAK, text))
    if found.dirty and not ending.leaks:
        problems.append(Problem("structure", "dirty", 0, Severity.CORRUPT, "the dirty bit is set after an orderly end"))
    return problems


def _by_qemu(image: Image, ending: Ending) -> list[Problem]:
    command = [tool("qemu-img"), "check", "-f", image.format, "--output=json", str(image.path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE)
    if done.returncode == 0 or (done.returncode == 3 and ending.leaks):
        return []
    if done.returncode == 2:
        counted = json.loads(done.stdout).get("corruptions", 0)
        text = f"qemu-img check: {counted:,} corruptions"
        return [Problem("structure", "corruptions", 0, Severity.CORRUPT, text)]
    if done.returncode == 3:
        text = "qemu-img check: leaked clusters after an orderly end"
        return [Problem("structure", "leak", 0, Severity.LEAK, text)]
    said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    if "Could not open" in said:
        return [Problem("opens", "refused", 0, Severity.UNOPENABLE, f"qemu-img check: {said}")]
    raise EnvironmentFault(f"qemu-img check: {said}")
