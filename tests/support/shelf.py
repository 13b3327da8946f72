"""A small set with something in every structure, and faults to lay over each of its copies."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

from powercut.crash.store import SetStore, in_memory
from powercut.formats.quire.history import repeatable
from quire.errors import QuireError
from quire.layout import BLOCK, PAGE, Geometry
from quire.sets import Set
from quire.store import Store

SIZE, SLOTS = 8 * BLOCK, 4


class Place(NamedTuple):
    """A structure: both of its copies, as (file, offset, length)."""

    what: str
    copies: tuple[tuple[str, int, int], tuple[str, int, int]]


class Shelf:
    """A set that was closed, and what all its names read as; and the same set some time before."""

    def __init__(self) -> None:
        self.store = in_memory()
        with repeatable(), Set.create(self.store, SIZE, slots=SLOTS) as quire:
            image = quire.image("main")
            for block in range(5):  # more flushes than slots: the map is written
                image.write(block * BLOCK, bytes([block + 1]) * BLOCK)
                image.flush()
            quire.snapshot("main", "s")
            for block in range(4):
                image.write(block * BLOCK + 100, b"before" * 100)
                image.flush()
            self.early = files(self.store)
            for block in range(4, 8):
                image.write(block * BLOCK + 5, b"after" * 50)
                image.zero((block - 2) * BLOCK, BLOCK)
                image.flush()
            quire.clone("s", "c")
            self.manifest = quire.manifest
        self.content = everything(self.store, write=False)
        self.files = files(self.store)

    def again(self) -> SetStore:
        """A store that holds the same."""
        store = in_memory()
        for name, data in self.files.items():
            file = store.create(name)
            file.write(0, data)
        return store

    def places(self) -> Iterator[Place]:
        """Every structure that a reader depends on."""
        length = int.from_bytes(self.files["manifest-0"][32:40], "little")
        yield Place("manifest", (("manifest-0", 0, length), ("manifest-1", 0, length)))
        for number, identity in enumerate(self.manifest.leaves.values()):
            place, file = identity.geometry, identity.file
            for what, at in structures(place):
                here = tuple((file, at(copy), PAGE) for copy in (0, 1))
                if any(self.files[file][offset : offset + PAGE].strip(b"\0") for _, offset, _ in here):
                    yield Place(f"{what} of leaf {number}", here)  # type: ignore[arg-type]


def structures(place: Geometry) -> Iterator[tuple[str, Callable[[int], int]]]:
    yield "header", place.header
    yield "index", lambda copy: place.index(0, copy)
    yield "map", lambda copy: place.map(0, copy)
    for slot in range(place.slots):
        yield f"slot {slot}", lambda copy, slot=slot: place.slot(slot, copy)


def files(store: Store) -> dict[str, bytes]:
    found = {}
    for name in store.names():
        file = store.open(name, write=False)
        found[name] = file.read(0, file.size())
    return found


def everything(store: Store, *, write: bool) -> dict[str, bytes]:
    with Set.open(store, write=write) as quire:
        found = {}
        for name in sorted(quire.manifest.names):
            image = quire.image(name)
            found[name] = bytes(image.read(0, image.size))
        return found


# A fault makes other bytes of what lies in a place; `old` is what lay there before, `near` what lies beside it.
FAULTS = {
    "a flipped bit": lambda now, old, near: now[:70] + bytes([now[70] ^ 4]) + now[71:],
    "a flipped bit in the prefix": lambda now, old, near: now[:41] + bytes([now[41] ^ 1]) + now[42:],
    "a zeroed sector": lambda now, old, near: bytes(512) + now[512:],
    "all zeros": lambda now, old, near: bytes(len(now)),
    "a lost write": lambda now, old, near: old,
    "a misdirected write": lambda now, old, near: near,
}

PAIRS = [*((fault, fault) for fault in FAULTS), ("a lost write", "all zeros"), ("a flipped bit", "a lost write")]


def strike(store: Store, shelf: Shelf, place: Place, copy: int, fault: str) -> bool:
    """Lay a fault over one copy; False if that changes nothing."""
    name, offset, length = place.copies[copy]
    file = store.open(name, write=True)
    now = shelf.files[name][offset : offset + length]
    old = shelf.early.get(name, bytes(offset + length))[offset : offset + length].ljust(length, b"\0")
    near = shelf.files[name][offset - PAGE : offset - PAGE + length] if offset else bytes(length)
    new = FAULTS[fault](now, old, near.ljust(length, b"\0"))
    file.write(offset, new)
    return new != now


def one_copy(shelf: Shelf) -> Iterator[str | None]:
    """Strikes every copy of every structure alone. What is wrong then, or None, for each fault that changes anything:
    it must be served from the other copy, and mended, so that a later fault in the other does no harm either."""
    for place, fault, copy in itertools.product(shelf.places(), FAULTS, (0, 1)):
        store = shelf.again()
        if not strike(store, shelf, place, copy, fault):
            continue
        wrong = None
        for write in (False, True, None):
            if write is None:
                strike(store, shelf, place, 1 - copy, "all zeros")
            try:
                found = everything(store, write=bool(write))
            except OSError as error:
                wrong = wrong or f"refused: {error}"
            else:
                wrong = wrong or ("wrong data" if found != shelf.content else None)
        yield wrong and f"{fault}, copy {copy} of {place.what}: {wrong}"


def both_copies(shelf: Shelf) -> Iterator[tuple[str, str | None]]:
    """Strikes both copies of every structure: what came of it in a word, and what is wrong, or None."""
    for place, faults in itertools.product(shelf.places(), PAIRS):
        for write in (False, True):
            store = shelf.again()
            for copy, fault in enumerate(faults):
                strike(store, shelf, place, copy, fault)
            try:
                found = everything(store, write=write)
            except QuireError:
                yield "refused", None
                continue
            if place.what == "manifest" and "a lost write" in faults and found.items() <= shelf.content.items():
                # All that is left is the tree before the last change, and nothing that could contradict it.
                yield "an older tree", None
            elif found == shelf.content:
                yield "harmless", None
            else:
                yield "wrong", f"{' and '.join(faults)}: {place.what}"
