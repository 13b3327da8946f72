"""Which leaf of a chain holds a block: looked up a map page at a time, so that a long chain costs a read no more than a
short one. The leaves of a chain never change, so what was found stays true.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from quire.layout import BLOCK, BLOCKS_PER_PAGE, DATA
from quire.states import States

ZEROS = -1
_KEPT = 1024  # pages, of 32 KiB each


class Below:
    """`layers` are the states and the size in bytes of each leaf, from the nearest to the farthest.

    `limits[k]` is the first byte of layer k that no reader sees, because a layer before it is shorter."""

    def __init__(self, layers: Sequence[tuple[States, int]]) -> None:
        self._layers = layers
        self.limits = list(itertools.accumulate((size for _, size in layers), min))
        self._pages: OrderedDict[int, NDArray[np.int16]] = OrderedDict()

    def layer(self, block: int) -> int:
        """The layer that holds a block; ZEROS where none does."""
        number, inner = divmod(block, BLOCKS_PER_PAGE)
        return int(self._page(number)[inner])

    def runs(self, start: int, length: int) -> Iterator[tuple[int, int, int]]:
        """(start, length, layer) of each run of blocks that one layer holds, in order; ZEROS where none does."""
        end = start + length
        while start < end:
            number, first = divmod(start, BLOCKS_PER_PAGE)
            owners = self._page(number)[first : first + end - start]
            cuts = np.flatnonzero(owners[1:] != owners[:-1]) + 1
            for low, high in itertools.pairwise([0, *cuts.tolist(), len(owners)]):
                yield start + low, high - low, int(owners[low])
            start += len(owners)

    def _page(self, number: int) -> NDArray[np.int16]:
        owners = self._pages.get(number)
        if owners is not None:
            return owners
        owners = np.full(BLOCKS_PER_PAGE, ZEROS, np.int16)
        undecided = np.ones(BLOCKS_PER_PAGE, np.bool_)
        for layer, (states, _) in enumerate(self._layers):
            seen = -(-self.limits[layer] // BLOCK) - number * BLOCKS_PER_PAGE  # blocks of the page
            if seen <= 0:
                break
            undecided[seen:] = False
            blocks, held = states.set_blocks(number)
            new = undecided[blocks]
            owners[blocks[new & (held == DATA)]] = layer
            undecided[blocks] = False
        self._pages[number] = owners
        if len(self._pages) > _KEPT:
            self._pages.popitem(last=False)
        return owners
