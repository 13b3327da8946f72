"""Arrays that are as long as a disk, and cost what is written to them."""

from __future__ import annotations

import mmap

import numpy as np
from numpy.typing import NDArray

_MAP_NORESERVE = 0x4000


def sparse_zeros(count: int, dtype: type[np.generic]) -> NDArray[np.generic]:
    """A zeroed array whose untouched pages take no memory, however large it is."""
    size = max(1, count) * np.dtype(dtype).itemsize
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    return np.frombuffer(mmap.mmap(-1, size, flags=flags), dtype=dtype)[:count]
