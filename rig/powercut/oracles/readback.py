"""What was read from a guest's disk, held against what each sector may hold.

A sector's content is named by the operation that wrote it: `stamp.ZERO` is zeros, 0 what the disk held before.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from powercut import stamp
from powercut.stamp import GARBAGE, SECTOR, ZERO

Bytes = NDArray[np.uint8]
Range = tuple[int, int, Collection[int]]  # begin and end in bytes; the operations whose data may be there


class Wrong(NamedTuple):
    """The first sector that holds what it may not: data of `op`, written for sector `of`. `kind` is a word for the
    machine: zeros, garbage, stale (data of an operation that may not be there), foreign (of another sector)."""

    kind: str
    sector: int
    op: int
    of: int
    legal: Collection[int]


def first_wrong(data: Any, offset: int, ranges: Iterable[Range]) -> Wrong | None:
    """The first sector of `data`, which was read at byte `offset` of a disk, that is not legal. `ranges` ascend, and
    cover what was read."""
    view = np.frombuffer(data, dtype=np.uint8)
    for low, high, legal in ranges:
        piece = view[low - offset : high - offset]
        if any(_holds(piece, value, low, high) for value in legal):
            continue
        stamps = stamp.decode(piece.reshape(-1, SECTOR))
        at = np.arange(low // SECTOR, high // SECTOR)
        good = np.isin(stamps.op, list(legal)) & ((stamps.op < 0) | (stamps.sector == at))
        for bad in np.flatnonzero(~good)[:1].tolist():
            op, sector = int(stamps.op[bad]), int(stamps.sector[bad])
            kind = "garbage" if op == GARBAGE else "zeros" if op == ZERO else "stale"
            return Wrong("foreign" if op >= 0 and sector != at[bad] else kind, int(at[bad]), op, sector, legal)
    return None


def _holds(piece: Bytes, op: int, low: int, high: int) -> bool:
    return not piece.any() if op == ZERO else np.array_equal(piece, _written(op, low, high))


@lru_cache(maxsize=128)
def _written(op: int, low: int, high: int) -> Bytes:
    """What operation `op` writes there."""
    return np.frombuffer(stamp.make(op, 0, low // SECTOR, (high - low) // SECTOR), dtype=np.uint8)
