"""Scrub: every copy of everything that a set keeps is read and verified; what can be made whole again is.

Metadata is served from its other copy and rewritten; so is a page of a seal. The data of sealed leaves and the states
of guests have one copy: damage is told. Space that was written and never recorded, which only a scan can find, is
given back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from quire.errors import QuireError
from quire.identity import Identity
from quire.layout import BLOCK, DATA, NONE
from quire.leaf import Leaf
from quire.seal import UNIT
from quire.sets import Set

Progress = Callable[[str, int, int], None]  # what, bytes done, bytes in all


@dataclass(frozen=True, slots=True)
class Found:
    """Something that was not as it should be. `offset` is a byte of the file, or None. `mended`: it is now."""

    file: str
    offset: int | None
    what: str
    mended: bool


def quiet(what: str, done: int, of: int) -> None:
    """A progress that nobody watches."""


def scrub(quire: Set, progress: Progress = quiet) -> list[Found]:
    """Scrub a set that is open for writing and has no open disks; its bases are other sets, and not looked at.

    What opening it mended comes first. A leaf that cannot be opened is one finding, and so are those built on it."""
    found = [Found(file, None, "a copy of the manifest was bad, and is rewritten", True) for file in quire.mended]
    heads = {value.leaf: name for name, value in quire.manifest.names.items() if value.writable}
    for identity in quire.manifest.leaves.values():
        try:
            found += _leaf(quire, identity, heads.get(identity.leaf), progress)
        except QuireError as error:
            found.append(Found(error.file, error.offset, error.what, False))
    for value in quire.manifest.names.values():
        if value.state != NONE:
            try:
                for _ in quire.state_of(value):
                    pass
            except OSError as error:
                found.append(Found(value.state.hex() + ".state", None, str(error), False))
    return found


def _leaf(quire: Set, identity: Identity, head: str | None, progress: Progress) -> Iterator[Found]:
    image = quire.image(head) if head is not None else None
    leaf = image.leaf if image is not None else quire.leaf(identity.leaf)
    try:
        if leaf.repaired:
            yield Found(
                identity.file, None, f"{leaf.repaired} pages were bad or old in one copy, and are rewritten", True
            )
        seal = quire.seal_of(leaf)
        if seal is not None:
            try:
                for offset in seal.verify_all(lambda done, of: progress(identity.file, done, of)):
                    yield Found(identity.file, offset, f"{UNIT} bytes of a sealed leaf are not what was sealed", False)
                for offset in seal.mend():
                    yield Found(seal.name, offset, "a page of the seal was bad in one copy, and is rewritten", True)
            finally:
                seal.close()
        lost = _give_back(leaf)
        if lost:
            yield Found(identity.file, None, f"{lost} bytes were written and never recorded, and are given back", True)
    finally:
        if image is not None:
            image.close()


def _give_back(leaf: Leaf) -> int:
    """Punch what lies where the leaf holds nothing. Returns how many bytes that were."""
    given = 0
    ranges = list(leaf.file.data_ranges(0, leaf.place.data))
    for offset, length in ranges:
        first, last = -(-offset // BLOCK), (offset + length) // BLOCK
        if last <= first:
            continue
        for start, count, state in leaf.states.runs(first, min(last, leaf.place.blocks) - first):
            if state != DATA and any(leaf.file.read(start * BLOCK, count * BLOCK)):
                leaf.file.punch(start * BLOCK, count * BLOCK)
                given += count * BLOCK
    return given
