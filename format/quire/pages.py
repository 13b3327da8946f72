"""The map on disk: index pages and map pages, each in two copies; reading, choosing, and the checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from quire.errors import Damaged
from quire.layout import INDEX_MAGIC, MAP_MAGIC, PAGE, PAGES_PER_INDEX, PREFIX, Geometry, Prefix, page, read_page
from quire.states import States, unused
from quire.store import File

Repairs = list[tuple[int, bytes]]
_TOGETHER = 256  # pages read at once


@dataclass(slots=True)
class MapPages:
    """What the map's pages say. `checkpoint`: the map contains all records up to this one, whose checksum is
    `previous`. `generations`: the index's entries. `newest`: the highest generation seen."""

    checkpoint: int
    previous: int
    generations: NDArray[np.uint64]
    newest: int
    repairs: Repairs = field(default_factory=list)

    def save(self, file: File, place: Geometry, owner: bytes, states: States, dirty: set[int]) -> None:
        """The checkpoint: write the `dirty` pages of `states`, which contains the records up to `checkpoint`. In
        three steps, each synced, so that never the only good copy of anything is overwritten."""
        self.generations[sorted(dirty)] = self.checkpoint
        pages = {
            number: page(MAP_MAGIC, owner, states.page(number), number=number, generation=self.checkpoint)
            for number in sorted(dirty)
        }
        indexes = self.index_pages(place, owner)
        for number, raw in pages.items():
            file.write(place.map(number, 0), raw)
        file.sync()
        for number, raw in pages.items():
            file.write(place.map(number, 1), raw)
        for number, raw in enumerate(indexes):
            file.write(place.index(number, 0), raw)
        file.sync()
        for number, raw in enumerate(indexes):
            file.write(place.index(number, 1), raw)
        file.sync()

    def index_pages(self, place: Geometry, owner: bytes) -> list[bytes]:
        """The index as it is to be written."""
        return [
            page(
                INDEX_MAGIC,
                owner,
                self.generations[number * PAGES_PER_INDEX : (number + 1) * PAGES_PER_INDEX].tobytes(),
                number=number,
                generation=self.checkpoint,
                previous=self.previous,
            )
            for number in range(place.index_pages)
        ]


def empty(place: Geometry) -> MapPages:
    """The map of a new leaf."""
    return MapPages(0, 0, np.zeros(place.map_pages, np.uint64), 0)


def load(file: File, place: Geometry, owner: bytes, states: States) -> MapPages:
    """Read and verify both copies of every page there is, and fill `states`. Raises Damaged."""
    found = empty(place)
    lowest: Prefix | None = None
    for number in range(place.index_pages):
        places = place.index(number, 0), place.index(number, 1)
        copies = [file.read(offset, PAGE) for offset in places]
        raw, prefix = _choose(file, copies, places, INDEX_MAGIC, owner, number, found.repairs)
        some = slice(number * PAGES_PER_INDEX, (number + 1) * PAGES_PER_INDEX)
        entries = np.frombuffer(raw, "<u8", offset=PREFIX.itemsize)
        found.generations[some] = entries[: len(found.generations[some])]
        found.newest = max(found.newest, prefix.generation)
        if lowest is None or prefix.generation < lowest.generation:
            lowest = prefix
    assert lowest is not None
    found.checkpoint, found.previous = lowest.generation, lowest.previous
    _load_map(file, place, owner, states, found)
    return found


def _load_map(file: File, place: Geometry, owner: bytes, states: States, found: MapPages) -> None:
    written = np.flatnonzero(found.generations).tolist()
    while written:
        count = 1
        while count < min(len(written), _TOGETHER) and written[count] == written[0] + count:
            count += 1
        first = written[0]
        both = [file.read(place.map(first, copy), count * PAGE) for copy in (0, 1)]
        for i in range(count):
            number = first + i
            places = place.map(number, 0), place.map(number, 1)
            copies = [raw[i * PAGE : (i + 1) * PAGE] for raw in both]
            raw, prefix = _choose(file, copies, places, MAP_MAGIC, owner, number, found.repairs)
            payload = raw[PREFIX.itemsize :]
            if prefix.generation < found.generations[number]:
                raise Damaged(file.name, f"map page {number}: an older one than the index knows", places[0])
            if unused(payload):
                raise Damaged(file.name, f"map page {number}: a state that does not exist", places[0])
            found.newest = max(found.newest, prefix.generation)
            states.set_page(number, payload)
        del written[:count]


def _choose(
    file: File,
    copies: list[bytes],
    places: tuple[int, int],
    magic: bytes,
    owner: bytes,
    number: int,
    repairs: Repairs,
) -> tuple[bytes, Prefix]:
    """The good copy of the higher generation; the other is to be repaired if it is not the same."""
    good = []
    for raw in copies:
        prefix = read_page(raw, magic, owner)
        if prefix is not None and prefix.number == number:
            good.append((prefix.generation, raw, prefix))
    if not good:
        raise Damaged(file.name, f"{magic.decode()} page {number} is bad in both copies", places[0])
    generation, raw, prefix = max(good, key=lambda item: item[0])
    if any(other[0] == generation and other[1] != raw for other in good):
        raise Damaged(file.name, f"{magic.decode()} page {number}: two good copies that differ", places[0])
    repairs += [(offset, raw) for offset, copy in zip(places, copies, strict=True) if copy != raw]
    return raw, prefix
