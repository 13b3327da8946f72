"""Sectors that prove themselves.

A stamp is 32 bytes, four little-endian 64-bit numbers: the number of the operation that wrote the sector,
the epoch (how many flushes the guest had seen acknowledged when it issued the operation), the guest's own
sector number, and the xxh3-64 of those 24 bytes. It is repeated 16 times to fill a sector of 512 bytes, so
that a sector which is partly something else is found out.

A sector decodes to zeros (`ZERO`: never written), to a valid stamp, or to garbage (`GARBAGE`). A stamp whose
sector number is not the sector it was read from is a misdirected write.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

SECTOR = 512
REPEATS = SECTOR // 32
ZERO = -1
GARBAGE = -2

_SECRET = np.array(  # xxh3's default secret, first 32 bytes, as little-endian words (xxHash specification, XXH3)
    [0xBE4BA423396CFEB8, 0x1CAD21F72C81017C, 0xDB979083E96DD4DE, 0x1F67B3B7A4A44072], dtype=np.uint64
)
_PRIME64_1 = 0x9E3779B185EBCA87
_AVALANCHE = np.uint64(0x165667919E3779F9)
_LOW = np.uint64(0xFFFFFFFF)
_MAX_OP = np.uint64((1 << 63) - 1)
_U32, _U37 = np.uint64(32), np.uint64(37)

Words = NDArray[np.uint64]


class Stamps(NamedTuple):
    """What sectors hold: `op` is the operation's number, ZERO or GARBAGE; the rest counts where op >= 0."""

    op: NDArray[np.int64]
    epoch: NDArray[np.int64]
    sector: NDArray[np.int64]


def _mul_fold(a: Words, b: Words) -> Words:
    """The 128-bit product of a and b, its halves xored (XXH3's mul128_fold64)."""
    al, ah, bl, bh = a & _LOW, a >> _U32, b & _LOW, b >> _U32
    low, mid1, mid2, high = al * bl, ah * bl, al * bh, ah * bh
    carry = ((low >> _U32) + (mid1 & _LOW) + (mid2 & _LOW)) >> _U32
    top = high + (mid1 >> _U32) + (mid2 >> _U32) + carry
    return np.asarray((a * b) ^ top)


def digest(op: Words, epoch: Words, sector: Words) -> Words:
    """xxh3-64 (seed 0) of each 24-byte triple: the specification's case of 17 to 128 bytes, vectorised."""
    start = np.uint64(24 * _PRIME64_1 & (1 << 64) - 1)
    value = start + _mul_fold(op ^ _SECRET[0], epoch ^ _SECRET[1]) + _mul_fold(epoch ^ _SECRET[2], sector ^ _SECRET[3])
    value = value ^ (value >> _U37)
    value = value * _AVALANCHE
    return value ^ (value >> _U32)


def make(op: int, epoch: int, sector: int, count: int) -> bytes:
    """The bytes of `count` sectors from guest sector `sector` on, written by operation `op` in `epoch`."""
    words = np.empty((count, 4), dtype="<u8")
    words[:, 0], words[:, 1] = op, epoch
    words[:, 2] = np.arange(sector, sector + count, dtype=np.uint64)
    words[:, 3] = digest(words[:, 0], words[:, 1], words[:, 2])
    return np.repeat(words[:, None, :], REPEATS, axis=1).tobytes()


def decode(sectors: NDArray[np.uint8]) -> Stamps:
    """What each of `sectors` (shape (n, 512)) holds."""
    words = np.ascontiguousarray(sectors).view("<u8").reshape(-1, REPEATS, 4)
    uniform = (words[:, 1:, :] == words[:, :-1, :]).all(axis=(1, 2))
    op, epoch, sector, proof = np.ascontiguousarray(words[:, 0, :].T)
    valid = uniform & (op <= _MAX_OP) & (digest(op, epoch, sector) == proof)
    zero = uniform & (op | epoch | sector | proof == 0)
    ops = np.where(valid, op.astype(np.int64), np.where(zero, ZERO, GARBAGE))
    return Stamps(ops, epoch.astype(np.int64), sector.astype(np.int64))
