"""Rule `acknowledged`: what the guest saw flushed is there; the rest is old or new, sector by sector.

Guest sectors are checked as sets. A recovered disk reads guest sector `at[i]` from host sector `host[i]`; every
content which that host sector may have after the crash must by itself be legal for the guest sector. That needs
no branching: host sectors vary independently of each other and of the metadata that led there.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from powercut.disk import Disk
from powercut.stamp import GARBAGE, SECTOR, ZERO, decode
from powercut.verdict import Problem, Severity

Sectors = NDArray[np.int64]
NOWHERE = -1  # host sector of a guest sector that reads as zeros


class Promises(Protocol):
    """What a guest sector may hold (`powercut.crash.promise`)."""

    def legal(self, at: Sectors, op: Sectors, stamped: Sectors) -> NDArray[np.bool_]: ...

    def describe(self, sector: int) -> str: ...


class Locate(Protocol):
    """Follows the format's metadata, by deciding reads, from a guest sector to the disk and sector it is read from."""

    def __call__(self, sector: int) -> tuple[Disk, int] | None: ...


def unlawful_zeros(promise: Promises, at: Sectors) -> Sectors:
    """Those guest sectors of `at` which must not read as zeros."""
    zero = np.full(len(at), ZERO)
    return at[~promise.legal(at, zero, zero)]


def confirm(promise: Promises, sector: int, locate: Locate) -> Problem | None:
    """The judgement of one guest sector on a disk that `locate` decides, with its words."""
    place = locate(sector)
    if place is None:
        op, stamped, content = ZERO, 0, bytes(SECTOR)
    else:
        disk, host = place
        read = disk.read(host * SECTOR, SECTOR)
        content = read.tobytes()
        stamps = decode(read.reshape(1, SECTOR))
        op, stamped = int(stamps.op[0]), int(stamps.sector[0])
    if promise.legal(np.array([sector]), np.array([op]), np.array([stamped]))[0]:
        return None
    if op == ZERO:
        found = "zeros"
    elif op == GARBAGE:
        found = "bytes that no operation wrote"
    elif stamped != sector:
        found = f"what operation {op} wrote to guest sector {stamped}"
    else:
        found = f"what operation {op} wrote"
    where = "" if place is None else f" (read from host byte {place[1] * SECTOR})"
    return Problem(
        rule="acknowledged",
        kind="zeros" if op == ZERO else "garbage" if op == GARBAGE else "misplaced" if stamped != sector else "stale",
        where=sector,
        severity=Severity.SILENT,
        text=f"guest sector {sector} holds {found}{where}; legal: {promise.describe(sector)}",
        found=content,
    )
