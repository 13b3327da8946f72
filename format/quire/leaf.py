"""One leaf: a file with a disk's own blocks and its metadata. Opening, recovery, reading, writing.

A leaf that is written to has two locks, which its image shares among the leaves that follow each other: `lock` for
whatever changes states or data, `commit_lock` for what syncs; who needs both takes `commit_lock` first. So at most one
commit is in progress, and guest writes go on while it syncs. Reading takes none: states change only once their data is
there.

`flush`, `finish` and `close` are in `quire.commit`.
"""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Callable, Iterator
from typing import Self

from quire import pages
from quire.below import ZEROS, Below
from quire.commit import Commit
from quire.errors import Damaged, opening
from quire.identity import Identity
from quire.journal import Journal
from quire.layout import BLOCK, DATA, PAGE, PARENT, ZERO, M
from quire.pages import MapPages
from quire.states import States, pages_of
from quire.store import Buffer, File, Store


class Mode(enum.Enum):
    """What may be written to a leaf: nothing, better copies of damaged pages, anything."""

    READ = 0
    REPAIR = 1
    WRITE = 2


class Leaf(Commit):
    """See the module. `parent` is the leaf below, or None. The caller closes it."""

    def __init__(self, file: File, identity: Identity, parent: Leaf | None, journal: Journal, found: MapPages) -> None:
        super().__init__(file, identity, journal, found)
        self.parent = parent
        self.size = identity.size
        self.verify: Callable[[int, int], None] | None = None  # called before a range is read from the file
        self.repaired = 0  # pages that were rewritten from their other copy when it was opened
        self._chain: list[Leaf] = []  # the leaves below, the nearest first
        self._below: Below | None = None  # which of them holds what
        self._reserved: set[int] = set()  # map pages whose space on disk is ours

    # ---- creating and opening

    @classmethod
    def create(
        cls, store: Store, identity: Identity, parent: Leaf | None, *, features: int, created: int, name: str
    ) -> Self:
        """Make a complete, synced leaf, open for writing. Its name is not durable before `store.sync_dir`."""
        file = store.create(identity.file)
        try:
            place = identity.geometry
            found = pages.empty(place)
            journal = Journal(file, place, identity.leaf)
            file.truncate(place.end)
            for copy in (0, 1):
                file.allocate(place.index(0, copy), place.index_pages * PAGE)
                file.allocate(place.slot(0, copy), place.slots * PAGE)
                file.allocate(place.header(copy), PAGE)
                file.write(place.header(copy), identity.header(features, created, name))
                for number, raw in enumerate(found.index_pages(place, identity.leaf)):
                    file.write(place.index(number, copy), raw)
            journal.write(M)
            file.sync()
            journal.synced()
        except BaseException:
            file.close()
            with contextlib.suppress(OSError):
                store.unlink(identity.file)
            raise
        leaf = cls(file, identity, parent, journal, found)
        leaf.begin(features)
        return leaf

    @classmethod
    def open(cls, store: Store, identity: Identity, parent: Leaf | None, mode: Mode) -> Self:
        """Open a leaf; recovery happens in memory, and with Mode.WRITE on disk too. Raises Damaged or Foreign."""
        file = _open(store, identity.file, mode)
        try:
            if mode is Mode.WRITE:  # what a killed process left is in the cache and may not be on the disk
                file.sync()
                file.drop_cache()
            features, repairs = identity.check(file)
            place = identity.geometry
            states = States(place.map_pages)
            found = pages.load(file, place, identity.leaf, states)
            journal = Journal(file, place, identity.leaf)
            chain, worse, clean = journal.load(found.checkpoint, found.previous)
            if found.newest > journal.last:
                raise Damaged(file.name, f"a page knows record {found.newest}, the journal ends at {journal.last}")
            leaf = cls(file, identity, parent, journal, found)
            leaf.replay(states, chain)
            if mode is not Mode.READ:
                leaf.repair([*repairs, *found.repairs, *worse])
            if mode is Mode.WRITE:
                leaf.begin(features)
                if not (clean and journal.kind == M):
                    leaf.resolve()
        except BaseException:
            file.close()
            raise
        return leaf

    def repair(self, copies: pages.Repairs) -> None:
        """Rewrite copies that are bad or older, before anything else is written."""
        for offset, raw in copies:
            self.file.write(offset, raw)
        if copies:
            self.file.sync()
        self.repaired = len(copies)

    # ---- reading

    def read(self, offset: int, length: int) -> bytes | bytearray:
        """What the disk holds in a range within it."""
        block = offset // BLOCK
        if offset + length <= (block + 1) * BLOCK:  # the usual case, and the one where every call counts
            state = self.states[block]
            if state == DATA:
                return self._home(offset, length)
            if state == PARENT and self.parent is not None and offset + length <= self.parent.size:
                below = self._below or self._look_below()
                layer = below.layer(block)
                if layer != ZEROS and offset + length <= below.limits[layer]:
                    return self._chain[layer]._home(offset, length)
        last = (offset + length - 1) // BLOCK
        runs = list(self.states.runs(block, last - block + 1))
        if len(runs) == 1 and runs[0][2] == DATA:
            return self._home(offset, length)
        found = bytearray(length)
        for start, blocks, state in runs:
            begin, end = max(offset, start * BLOCK), min(offset + length, (start + blocks) * BLOCK)
            if state == DATA:
                found[begin - offset : end - offset] = self._home(begin, end - begin)
            elif state == PARENT and self.parent is not None:
                for place, data in self._inherited(begin, min(end, self.parent.size)):
                    found[place - offset : place - offset + len(data)] = data
        return found

    def _inherited(self, begin: int, end: int) -> Iterator[tuple[int, bytes]]:
        """(offset, data) of what leaves below hold in a range; the rest is zeros."""
        if begin >= end:
            return
        below = self._below or self._look_below()
        first = begin // BLOCK
        for start, blocks, layer in below.runs(first, (end - 1) // BLOCK - first + 1):
            if layer != ZEROS:
                low, high = max(begin, start * BLOCK), min(end, (start + blocks) * BLOCK, below.limits[layer])
                yield low, self._chain[layer]._home(low, high - low)

    def _look_below(self) -> Below:
        leaf, self._chain = self.parent, []
        while leaf is not None:
            self._chain.append(leaf)
            leaf = leaf.parent
        self._below = Below([(leaf.states, leaf.size) for leaf in self._chain])
        return self._below

    def _home(self, offset: int, length: int) -> bytes:
        if self.verify is not None:
            self.verify(offset, length)
        data = self.file.read(offset, length)
        if len(data) != length:
            raise Damaged(self.file.name, "ends within its data", offset)
        return data

    # ---- writing: the caller holds `lock`

    def write(self, offset: int, data: Buffer) -> None:
        """Write within the disk; an unaligned edge of a block that is not data takes the rest of it along."""
        self.admit()
        end = offset + len(data)
        first, last = offset // BLOCK, (end - 1) // BLOCK
        if first == last and self.states[first] == DATA:
            self.writes += 1
            self.file.write(offset, data)
            return
        new = [(start, count) for start, count, state in self.states.runs(first, last - first + 1) if state != DATA]
        if new:
            self._reserve(new)
            begin = first * BLOCK if new[0][0] == first else offset
            stop = (last + 1) * BLOCK if sum(new[-1]) == last + 1 else end
            if (begin, stop) != (offset, end):
                data = self._filled(begin, offset) + bytes(data) + self._filled(end, stop)
                offset = begin
        self.writes += 1
        self.file.write(offset, data)
        for start, count in new:
            self.change(start, count, DATA)

    def _filled(self, begin: int, end: int) -> bytes:
        """What the disk holds now from `begin` to `end`, zeros beyond its end."""
        inside = min(end, self.size) - begin
        return (bytes(self.read(begin, inside)) if inside > 0 else b"").ljust(end - begin, b"\0")

    def zero(self, offset: int, length: int, *, punch: bool, edges: bool = True) -> None:
        """Make a range read as zeros. `punch`: give the space of whole blocks back, when that is durable. Without
        `edges`, blocks that the range covers in part keep what they hold."""
        self.admit()
        end = offset + length
        first = -(-offset // BLOCK)
        last = self.place.blocks if end == self.size else end // BLOCK
        if edges:
            if first > last:  # within one block
                return self._zero_edge(offset, end)
            self._zero_edge(offset, min(first * BLOCK, end))
            if end != self.size:
                self._zero_edge(last * BLOCK, end)
        if first >= last:
            return None
        changes = [
            (start, count, state)
            for start, count, state in self.states.runs(first, last - first)
            if state == DATA or (state == PARENT and self.parent is not None)
        ]
        self._reserve([(start, count) for start, count, _ in changes])
        self.writes += bool(changes)
        for start, count, state in changes:
            self.change(start, count, ZERO)
            if punch and state == DATA:
                self.punches.append((start, count))
        return None

    def _zero_edge(self, begin: int, end: int) -> None:
        if begin < end and any(self.read(begin, end - begin)):
            self.write(begin, bytes(end - begin))

    def _reserve(self, runs: list[tuple[int, int]]) -> None:
        """Take the space that the map pages of these blocks need: a commit must not meet a full disk."""
        for start, count in runs:
            for number in pages_of(start, count):
                if number not in self._reserved:
                    self.file.allocate(self.place.map(number, 0), PAGE)
                    self.file.allocate(self.place.map(number, 1), PAGE)
                    self._reserved.add(number)


def _open(store: Store, name: str, mode: Mode) -> File:
    if mode is Mode.REPAIR:
        with contextlib.suppress(OSError):  # a leaf that only its reader owns is read as it is
            return store.open(name, write=True)
    with opening(name):
        return store.open(name, write=mode is Mode.WRITE)
