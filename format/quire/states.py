"""The states of a leaf's blocks in memory: two bits each, packed as in the map's pages."""

from __future__ import annotations

import itertools
import mmap
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from quire.layout import BLOCKS_PER_PAGE, PAYLOAD

_UNPACK = np.array([[byte >> shift & 3 for shift in (0, 2, 4, 6)] for byte in range(256)], np.uint8)
_ONE_BY_ONE = 16  # so many blocks are looked at one by one; more at once


class States:
    """All states are 0 at first. Memory is taken for what was set, not for the whole."""

    def __init__(self, pages: int) -> None:
        self._raw = mmap.mmap(-1, pages * PAYLOAD)
        self._array: NDArray[np.uint8] = np.frombuffer(self._raw, np.uint8)

    def __getitem__(self, block: int) -> int:
        return self._raw[block >> 2] >> ((block & 3) << 1) & 3

    def __setitem__(self, block: int, state: int) -> None:
        shift = (block & 3) << 1
        self._raw[block >> 2] = self._raw[block >> 2] & ~(3 << shift) | state << shift

    def fill(self, start: int, length: int, state: int) -> None:
        """Give `length` blocks one state."""
        end = start + length
        inner = -(-start >> 2), end >> 2  # whole bytes
        if inner[0] >= inner[1]:
            for block in range(start, end):
                self[block] = state
            return
        for block in (*range(start, inner[0] << 2), *range(inner[1] << 2, end)):
            self[block] = state
        self._array[inner[0] : inner[1]] = state * 0x55

    def runs(self, start: int, length: int) -> Iterator[tuple[int, int, int]]:
        """(start, length, state) of each run of blocks of one state within a range, in order."""
        if length <= _ONE_BY_ONE:
            yield from self._few(start, length)
            return
        first = start >> 2
        states = _UNPACK[self._array[first : (start + length + 3) >> 2]].ravel()
        states = states[start - (first << 2) :][:length]
        cuts = np.flatnonzero(states[1:] != states[:-1]) + 1
        edges = [0, *cuts.tolist(), length]
        for begin, end in itertools.pairwise(edges):
            yield start + begin, end - begin, int(states[begin])

    def _few(self, start: int, length: int) -> Iterator[tuple[int, int, int]]:
        begin, state = start, self[start]
        for block in range(start + 1, start + length):
            now = self[block]
            if now != state:
                yield begin, block - begin, state
                begin, state = block, now
        yield begin, start + length - begin, state

    def packed(self) -> NDArray[np.uint8]:
        """All states, four to a byte, the lowest bits first."""
        return self._array

    def set_blocks(self, number: int) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
        """The blocks of a map page whose state is not 0, counted from its first, and their states."""
        packed = self._array[number * PAYLOAD : (number + 1) * PAYLOAD]
        used = np.flatnonzero(packed)
        states = _UNPACK[packed[used]].ravel()
        blocks = (used[:, None] * 4 + np.arange(4)).ravel()
        here = states > 0
        return blocks[here], states[here]

    def page(self, number: int) -> bytes:
        """The payload of a map page."""
        return self._raw[number * PAYLOAD : (number + 1) * PAYLOAD]

    def set_page(self, number: int, payload: bytes) -> None:
        self._raw[number * PAYLOAD : (number + 1) * PAYLOAD] = payload

    def count(self, state: int) -> int:
        """How many blocks have a state."""
        per_byte = np.count_nonzero(np.equal(_UNPACK, state), axis=1)
        step = 1 << 20
        parts = (self._array[place : place + step] for place in range(0, len(self._array), step))
        return sum(int(np.bincount(part, minlength=256) @ per_byte) for part in parts)


def pages_of(start: int, length: int) -> range:
    """The map pages that a run of blocks lies on."""
    return range(start // BLOCKS_PER_PAGE, (start + length - 1) // BLOCKS_PER_PAGE + 1)


def unused(payload: bytes) -> bool:
    """Whether a map page holds the state that does not exist."""
    states = np.frombuffer(payload, np.uint8)
    return bool((states & states >> 1 & 0x55).any())
