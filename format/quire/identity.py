"""What a leaf is: the header pages in its file, and the rows of the manifest that must say the same."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from quire.errors import Damaged, Foreign
from quire.layout import (
    HEADER,
    HEADER_MAGIC,
    KNOWN_FEATURES,
    MAX_SIZE,
    NONE,
    PAGE,
    PREFIX,
    SECTOR,
    SLOTS,
    VERSION,
    Geometry,
    page,
    read_page,
)
from quire.pages import Repairs
from quire.store import File


@dataclass(frozen=True, slots=True)
class Identity:
    """`leaf`, `set`, `parent` and `base` (the set that the parent is in) are ids; `size` is the disk's, in bytes."""

    leaf: bytes
    set: bytes
    size: int
    slots: int
    parent: bytes = NONE
    base: bytes = NONE

    @property
    def file(self) -> str:
        """The name of the leaf's file."""
        return self.leaf.hex() + ".leaf"

    @property
    def geometry(self) -> Geometry:
        return Geometry.of(self.size, self.slots)

    @property
    def possible(self) -> bool:
        """Whether size and slots are within the format's bounds."""
        return 0 < self.size <= MAX_SIZE and not self.size % SECTOR and SLOTS[0] <= self.slots <= SLOTS[1]

    def header(self, features: int, created: int, name: str) -> bytes:
        """The header page."""
        header = np.zeros((), HEADER)
        header["version"], header["slots"], header["size"] = VERSION, self.slots, self.size
        header["incompatible"], header["created"] = features, created
        for field, value in (("set", self.set), ("parent", self.parent), ("base", self.base), ("name", name.encode())):
            header[field] = np.void(value.ljust(HEADER[field].itemsize, b"\0"))
        return page(HEADER_MAGIC, self.leaf, header.tobytes())

    def check(self, file: File) -> tuple[int, Repairs]:
        """Read both headers of `file` and hold them against this. Returns the leaf's features, and what to repair.

        Raises Damaged, or Foreign if it is another leaf or one with features that are not known here."""
        place = self.geometry
        if file.size() != place.end:
            raise Damaged(file.name, f"is {file.size()} bytes long, and should be {place.end}")
        places = place.header(0), place.header(1)
        copies = [file.read(offset, PAGE) for offset in places]
        good = [raw for raw in copies if read_page(raw, HEADER_MAGIC, self.leaf)]
        if not good:
            raise Damaged(file.name, "the header is bad in both copies", places[0])
        if good[-1] != good[0]:
            raise Damaged(file.name, "two good headers that differ", places[1])
        seen, features = parse(good[0], file.name, places[0])
        for field in ("size", "slots", "set", "parent", "base"):
            if getattr(seen, field) != getattr(self, field):
                there, here = (
                    value.hex() if isinstance(value, bytes) else value
                    for value in (getattr(seen, field), getattr(self, field))
                )
                raise Foreign(file.name, f"{field} is {there}, and the manifest says {here}", places[0])
        return features, [(place, good[0]) for place, raw in zip(places, copies, strict=True) if raw != good[0]]


def parse(raw: bytes, name: str, offset: int) -> tuple[Identity, int]:
    """The identity and the incompatible features that a good header page tells. Raises Foreign."""
    header = np.frombuffer(raw, HEADER, 1, PREFIX.itemsize)[0]
    if header["version"] != VERSION:
        raise Foreign(name, f"version {header['version']}; this program knows {VERSION}", offset)
    features = int(header["incompatible"])
    if features & ~KNOWN_FEATURES:
        raise Foreign(name, f"incompatible features {features & ~KNOWN_FEATURES:#x} that are not known here", offset)
    ids = (header[field].tobytes() for field in ("set", "parent", "base"))
    of_set, parent, base = ids
    return Identity(raw[16:32], of_set, int(header["size"]), int(header["slots"]), parent, base), features
