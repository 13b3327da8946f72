"""Whether a recovery left two good copies of everything: either may be lost then, and is mended.

After a set was opened for writing and closed, one copy of each page of metadata is struck, in all leaves and the
manifest together; the set is opened again, and then the same is done with the other copies. If the first open mended
nothing, nothing is left for the second. Only the bytes of the metadata matter for that: the same are tried once.
"""

from __future__ import annotations

from collections.abc import Iterator

import xxhash

from powercut.crash.store import SetStore
from powercut.stores import Case
from powercut.verdict import Problem, Severity
from quire.copies import FILES
from quire.errors import QuireError
from quire.layout import PAGE
from quire.leaf import Leaf
from quire.manifest import Manifest
from quire.sets import Set

Said = dict[str, list[tuple[int, int, int]]]  # of each leaf's file: the runs of its states


class Mends:
    """The rule `repairs`."""

    def __init__(self) -> None:
        self._good: set[bytes] = set()

    def check(self, case: Case) -> None:
        """Report what cannot be lost. Raises QuireError if the state does not open."""
        store = case.again()
        before = _said(store)
        manifest, _ = before
        pages = [list(_pages(manifest, copy)) for copy in (0, 1)]
        key = xxhash.xxh3_128()
        for file, offset in (*pages[0], *pages[1]):
            key.update(store.open(file, write=False).read(offset, PAGE))
        if key.digest() in self._good:
            return
        for copy in (0, 1):
            for file, offset in pages[copy]:
                store.open(file, write=True).write(offset, bytes(PAGE))
            try:
                wrong = None if _said(store) == before else "something else is read"
            except QuireError as error:
                wrong = f"refused: {error}"
            if wrong:
                text = f"copy {copy} of all metadata was lost: {wrong}"
                case.report(Problem("repairs", "copy", copy, Severity.CORRUPT, text))
                return
        self._good.add(key.digest())


def _said(store: SetStore) -> tuple[Manifest, Said]:
    """What the metadata says to a writer."""
    with Set.open(store, write=True) as quire:
        said = {}
        for name in quire.manifest.names:
            leaf: Leaf | None = quire.image(name).leaf
            while leaf is not None:
                said[leaf.identity.file] = list(leaf.states.runs(0, leaf.place.blocks))
                leaf = leaf.parent
        return quire.manifest, said


def _pages(manifest: Manifest, copy: int) -> Iterator[tuple[str, int]]:
    """The file and offset of one copy of every page of metadata."""
    yield FILES[copy], 0
    for identity in manifest.leaves.values():
        place = identity.geometry
        yield identity.file, place.header(copy)
        yield from ((identity.file, place.index(number, copy)) for number in range(place.index_pages))
        yield from ((identity.file, place.map(number, copy)) for number in range(place.map_pages))
        yield from ((identity.file, place.slot(number, copy)) for number in range(place.slots))
