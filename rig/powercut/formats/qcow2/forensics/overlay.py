"""A disk with a few bytes changed, in memory: a hypothesis that a checker can look at."""

from __future__ import annotations

import bisect

import numpy as np

from powercut.disk import Bytes, Disk, Variants


class Overlaid:
    """`base` with `patches` (byte offset -> bytes, disjoint) on top; it may reach beyond the base."""

    def __init__(self, base: Disk, patches: dict[int, bytes]) -> None:
        self._base, self._starts = base, sorted(patches)
        self._patches = [np.frombuffer(patches[start], dtype=np.uint8) for start in self._starts]
        self.size = max(base.size, *(start + len(patches[start]) for start in self._starts))

    def read(self, offset: int, length: int) -> Bytes:
        out = self._base.read(offset, length)
        at = max(0, bisect.bisect_right(self._starts, offset) - 1)
        for start, patch in zip(self._starts[at:], self._patches[at:], strict=True):
            if start >= offset + length:
                break
            lo, hi = max(start, offset), min(start + len(patch), offset + length)
            if lo < hi:
                out = out if out.flags.writeable else out.copy()
                out[lo - offset : hi - offset] = patch[lo - start : hi - start]
        return out

    def variants(self, offset: int, length: int) -> Variants:
        return Variants(self.read(offset, length))
