"""A set: a directory of leaves, and the tree that the manifest makes of them.

    with Set.create(RealStore(path), 20 << 30) as quire:      # has one head, "main"
        image = quire.image("main")
        image.write(0, b"...")
        image.flush()
        quire.snapshot("main", "before")                       # the image goes on, in a new leaf
        quire.clone("before", "test")                          # another head

One writer at a time, and each head is open once. Whatever changes the tree is atomic: after a crash it happened or it
did not. Methods may be called from several threads. Errors: `quire.errors`, and OSError from the disk.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Self

from quire import copies, strangers, writer
from quire.copies import Copies
from quire.errors import Busy, Damaged, Foreign, ReadOnly, Unusable
from quire.guest_state import Kept, read_state, write_state
from quire.identity import Identity
from quire.image import Image
from quire.layout import CHECKED_RECORDS, DEAD_LEAF, NONE, SLOTS, default_slots
from quire.leaf import Leaf, Mode
from quire.manifest import MAX_CHAIN, Base, Manifest, Name, good_name, good_path
from quire.seal import Progress, Seal, quiet
from quire.seal import file_name as seal_file
from quire.seal import write as write_seal
from quire.store import File, Store

FEATURES = CHECKED_RECORDS  # of leaves that are made


def new_id() -> bytes:
    """An id that nothing had before."""
    return os.urandom(16)


def now() -> int:
    """Nanoseconds since 1970."""
    return time.time_ns()


class Set:
    """See the module. `write`: whether it was opened for writing. `features`: those of leaves that it makes. `verify`:
    what is read of sealed leaves is compared with their seals. The set closes its images; the caller closes `store`."""

    def __init__(
        self,
        store: Store,
        lock: File | None,
        *,
        features: int = FEATURES,
        verify: bool = False,
        within: frozenset[bytes] = frozenset(),
    ) -> None:
        self.store = store
        self.verify = verify
        self.features = features
        self.write = lock is not None
        self._lock = lock
        self._tree = threading.RLock()
        self._images: dict[str, Image] = {}
        self._snapshots: list[Image] = []
        self._seals: list[Seal] = []
        self._below: dict[bytes, Leaf] = {}  # leaves that are only read, by id
        self._bases: dict[bytes, Set] = {}
        self._within = within  # the sets whose parents are being looked for
        self._copies = self._load()

    # ---- creating and opening

    @classmethod
    def create(
        cls,
        store: Store,
        size: int | None = None,
        *,
        head: str = "main",
        slots: int | None = None,
        features: int = FEATURES,
        base: str | None = None,
        snapshot: str = "",
    ) -> Self:
        """Make a set with one head, and open it for writing. `base` is the path of another set, relative to this one,
        whose `snapshot` the head begins with; `size` is then that snapshot's if it is not given. Raises Unusable."""
        _check_name(head)
        if store.names():
            raise Unusable(store.path, "is not empty")
        this = new_id()
        manifest = Manifest(this)
        parent, of = NONE, NONE
        if base is not None:
            if not good_path(base):
                raise Unusable(base, "a base is found by a relative path, and this cannot be one")
            with Set.open(store.at(base)) as other:
                name = other.manifest.name(snapshot)
                if name.writable:
                    raise Unusable(snapshot, "is a head; a base must be a snapshot")
                parent, of = name.leaf, other.manifest.set
                size = other.manifest.leaves[parent].size if size is None else size
            manifest = dataclasses.replace(manifest, bases={of: Base(of, base)})
        size = size or 0
        identity = Identity(new_id(), this, size, slots or default_slots(size), parent, of)
        if not identity.possible:
            raise Unusable(store.path, f"a disk of {size} bytes with {identity.slots} slots cannot be")
        lock = writer.take(store)
        try:
            Leaf.create(store, identity, None, features=features, created=now(), name=head).close()
            store.sync_dir()
            copies.create(store, manifest.with_leaf(identity).with_name(head, Name(identity.leaf, True, now())))
            store.sync_dir()
            return cls(store, lock, features=features)
        except BaseException:
            lock.close()
            raise

    @classmethod
    def open(
        cls,
        store: Store,
        *,
        write: bool = False,
        features: int = FEATURES,
        verify: bool = False,
        within: frozenset[bytes] = frozenset(),
    ) -> Self:
        """Open a set. Raises Busy if somebody else writes to it, Refused if it cannot be used."""
        if not write:
            return cls(store, None, verify=verify, within=within)
        if not set(copies.FILES) & set(store.names()):
            raise Foreign(store.path, "not a quire: it has no manifest")
        lock = writer.take(store)
        try:
            return cls(store, lock, features=features, verify=verify)
        except BaseException:
            lock.close()
            raise

    def _load(self) -> Copies:
        """The manifest, which nothing in the directory contradicts. With `write`, what nothing needs is removed."""
        before = -1
        while True:
            found = Copies(self.store, write=self.write)
            try:
                unneeded = strangers.check(self.store, found.manifest)
            except BaseException as error:
                found.close()
                if isinstance(error, Damaged) and not self.write and found.manifest.generation != before:
                    before = found.manifest.generation  # a writer may have gone on since it was read: look again
                    continue
                raise
            if self.write:
                strangers.remove(self.store, unneeded)
            return found

    def close(self) -> None:
        """Close all images, and let go of the lock. The first error of an image is raised when all is closed."""
        with self._tree, contextlib.ExitStack() as last:
            if self._lock is not None:
                last.callback(self._lock.close)
            last.callback(self._copies.close)
            for base in self._bases.values():
                last.callback(base.close)
            for seal in self._seals:
                last.callback(seal.close)
            for leaf in self._below.values():
                last.callback(leaf.close)
            for image in (*self._images.values(), *self._snapshots):
                last.callback(image.close)
            self._lock, self._bases, self._below, self._images = None, {}, {}, {}
            self._snapshots, self._seals = [], []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    # ---- looking

    @property
    def manifest(self) -> Manifest:
        """The tree as it is now."""
        return self._copies.manifest

    @property
    def mended(self) -> list[str]:
        """The files of the manifest that were bad when the set was opened, and were rewritten."""
        return self._copies.mended

    def image(self, name: str, *, write: bool | None = None) -> Image:
        """Open a head or a snapshot. A head of a set that is open for writing is written to, unless `write` is False.
        Raises Unusable, Busy if the head is open already, ReadOnly, Refused."""
        with self._tree:
            value = self.manifest.name(name)
            write = (self.write and value.writable) if write is None else write
            if not write:
                return self._read_only(name, value)
            if not self.write or not value.writable:
                why = "is a snapshot: clone it to write" if self.write else "its set was opened for reading"
                raise ReadOnly(name, why)
            self._not_open(name)
            identity = self.manifest.leaves[value.leaf]
            leaf = Leaf.open(self.store, identity, self._parent(identity), Mode.WRITE)
            if self._copies.stopped:
                leaf.stop("an error stopped all writing to its set until it is opened again")
            self._images[name] = Image(name, leaf, writable=True)
            return self._images[name]

    def opened(self, head: str) -> Image | None:
        """The image of a head that is open for writing."""
        image = self._images.get(head)
        return None if image is None or image.closed else image

    def _read_only(self, name: str, value: Name) -> Image:
        if value.writable:
            identity = self.manifest.leaves[value.leaf]
            image = Image(name, Leaf.open(self.store, identity, self._parent(identity), Mode.READ), writable=False)
        else:
            image = Image(name, self._chain(value.leaf), writable=False, shared=True)
        self._snapshots.append(image)
        return image

    def _parent(self, identity: Identity) -> Leaf | None:
        """The opened parent of a leaf."""
        if identity.parent == NONE:
            return None
        return self._chain(identity.parent) if identity.base == NONE else self._base(identity)

    def leaf(self, leaf: bytes) -> Leaf:
        """A leaf that does not change, by id, opened."""
        with self._tree:
            return self._chain(leaf)

    def seal_of(self, leaf: Leaf) -> Seal | None:
        """The seal of a leaf, if it has one. The caller closes it."""
        root = self.manifest.seals.get(leaf.identity.leaf)
        return None if root is None else Seal(self.store, leaf, root)

    def _chain(self, leaf: bytes) -> Leaf:
        """A leaf that is only read, and opened once, with all below it."""
        chain = []
        for identity in self.manifest.chain(leaf):
            if identity.leaf in self._below:
                break
            chain.append(identity)
        for identity in reversed(chain):
            if identity.base == NONE:
                parent = self._below[identity.parent] if identity.parent != NONE else None
            else:
                parent = self._base(identity)
            mode = Mode.REPAIR if self.write else Mode.READ
            opened = self._below[identity.leaf] = Leaf.open(self.store, identity, parent, mode)
            if self.verify and (seal := self.seal_of(opened)) is not None:
                self._seals.append(seal)
                opened.verify = seal.verify
        return self._below[leaf]

    def _base(self, identity: Identity) -> Leaf:
        """The parent of a leaf in another set."""
        of, path = identity.base, self.manifest.bases[identity.base].path
        if of not in self._bases:
            within = self._within | {self.manifest.set}
            if of in within or len(within) > MAX_CHAIN:
                raise Foreign(path, "sets that are each other's base, in a circle")
            try:
                store = self.store.at(path)
            except OSError as error:
                raise Foreign(path, f"the set that leaf {identity.leaf.hex()} builds on: {error.strerror}") from None
            base = Set.open(store, verify=self.verify, within=within)
            if base.manifest.set != of:
                found = base.manifest.set.hex()
                base.close()
                raise Foreign(path, f"is set {found}; the base of leaf {identity.leaf.hex()} is {of.hex()}")
            self._bases[of] = base
        manifest = self._bases[of].manifest
        heads = {value.leaf for value in manifest.names.values() if value.writable}
        if identity.parent not in manifest.leaves or identity.parent in heads:
            raise Foreign(path, f"has no snapshot with leaf {identity.parent.hex()}, on which this set builds")
        return self._bases[of]._chain(identity.parent)

    def guest_state(self, name: str) -> Iterator[bytes]:
        """The guest's state that was kept with a snapshot, in pieces. Raises Unusable if there is none."""
        value = self.manifest.name(name)
        if value.state == NONE:
            raise Unusable(name, "no guest state was kept with it")
        return self.state_of(value)

    def state_of(self, value: Name) -> Iterator[bytes]:
        """The guest's state that a name has, in pieces."""
        return read_state(self.store, value)

    # ---- changing the tree

    def snapshot(self, head: str, name: str, *, state: Iterable[bytes] | None = None) -> None:
        """Give what `head` holds now a name of its own. `state` is the guest's, kept beside it. An open image waits
        meanwhile, and goes on in a new leaf."""
        with self._changing(name), self._paused(head) as image:
            value = self.manifest.name(head)
            kept = Kept(state=NONE, state_size=0, state_check=0)
            if state is not None:
                kept = write_state(self.store, new_id(), state)
            frozen = Name(value.leaf, False, now(), **kept)
            self._grow(head, image, self.manifest.with_name(name, frozen), image.size)

    def resize(self, head: str, size: int) -> None:
        """Give a head another size, in a new leaf. What is cut off is gone for the head; what is added is zeros."""
        with self._changing(), self._paused(head) as image:
            self._grow(head, image, self.manifest, size)

    def seal(self, snapshot: str, progress: Progress = quiet) -> None:
        """Seal a snapshot and what it builds on in this set: what it reads as can be verified from then on."""
        with self._changing():
            chain = list(self.manifest.chain(self._snapshot(snapshot).leaf))
            fresh = [identity for identity in chain if identity.leaf not in self.manifest.seals]
            seals = {one.leaf: write_seal(self.store, self._chain(one.leaf), progress) for one in fresh}
            for identity in fresh:
                self.store.chmod(identity.file, 0o444)
                self.store.chmod(seal_file(identity.leaf), 0o444)
            self.store.sync_dir()
            self._save(dataclasses.replace(self.manifest, seals={**self.manifest.seals, **seals}))

    def clone(self, snapshot: str, name: str) -> None:
        """Make a head that begins as a snapshot."""
        with self._changing(name):
            self._begin(name, self._snapshot(snapshot), self.manifest)

    def revert(self, head: str, snapshot: str) -> None:
        """Let a head, which must not be open, begin again as a snapshot; what it held is gone."""
        with self._changing():
            if not self.manifest.name(head).writable:
                raise Unusable(head, "is a snapshot, which never changes")
            self._not_open(head)
            self._begin(head, self._snapshot(snapshot), self.manifest)

    def rename(self, old: str, new: str) -> None:
        """Give a head or a snapshot, which must not be open, another name."""
        with self._changing(new):
            value = self.manifest.name(old)
            self._not_open(old)
            names = {new if name == old else name: one for name, one in self.manifest.names.items()}
            self._save(dataclasses.replace(self.manifest, names={**names, new: value}))

    def delete(self, name: str) -> None:
        """Remove a name, which must not be open, and the leaves that only it needs."""
        with self._changing():
            self.manifest.name(name)
            self._not_open(name)
            self._save(self.manifest.without_name(name).collected())

    @contextlib.contextmanager
    def _changing(self, new: str | None = None) -> Iterator[None]:
        with self._tree:
            if not self.write:
                raise ReadOnly(self.store.path, "opened for reading")
            if new is not None:
                _check_name(new)
                if new in self.manifest.names:
                    raise Unusable(new, "the name is taken")
            yield

    def _not_open(self, name: str) -> None:
        if self.opened(name) or any(image.name == name and not image.closed for image in self._snapshots):
            raise Busy(name, "is open")

    def _snapshot(self, name: str) -> Identity:
        value = self.manifest.name(name)
        if value.writable:
            raise Unusable(name, "is a head, which changes; take a snapshot of it first")
        return self.manifest.leaves[value.leaf]

    @contextlib.contextmanager
    def _paused(self, head: str) -> Iterator[Image]:
        """The image of a head with nothing in flight and everything proven; opened for the while if it is not open."""
        if not self.manifest.name(head).writable:
            raise Unusable(head, "is a snapshot, which never changes")
        there = self.opened(head)
        image = there or self.image(head, write=True)
        try:
            with image.leaf.commit_lock, image.leaf.lock:
                image.leaf.finish()
                yield image
        finally:
            if there is None:
                image.close()

    def _grow(self, head: str, image: Image, manifest: Manifest, size: int) -> None:
        """Let `head` and its image go on in a new leaf on top of the one they have."""
        old = image.leaf
        fresh = self._new_leaf(head, old.identity, size, old)
        name = dataclasses.replace(self.manifest.names[head], leaf=fresh.identity.leaf)
        self._save_or_remove(manifest.with_leaf(fresh.identity).with_name(head, name), fresh)
        self._below[old.identity.leaf] = old
        image.follow(fresh)

    def _begin(self, head: str, below: Identity, manifest: Manifest) -> None:
        """Let `head`, which has no image, go on in a new leaf on top of `below`."""
        fresh = self._new_leaf(head, below, below.size, None)
        name = Name(fresh.identity.leaf, True, now())
        self._save_or_remove(manifest.with_leaf(fresh.identity).with_name(head, name).collected(), fresh)
        fresh.close()

    def _new_leaf(self, head: str, below: Identity, size: int, parent: Leaf | None) -> Leaf:
        slots = below.slots if size == below.size else max(SLOTS[0], default_slots(size))
        identity = Identity(new_id(), self.manifest.set, size, slots, below.leaf)
        if not identity.possible:
            raise Unusable(head, f"a disk of {size} bytes cannot be")
        return Leaf.create(self.store, identity, parent, features=self.features, created=now(), name=head)

    def _save_or_remove(self, manifest: Manifest, fresh: Leaf) -> None:
        try:
            self.store.sync_dir()
            self._save(manifest)
        except BaseException:
            fresh.stop("was never used")
            fresh.close()
            if not self._copies.stopped:  # else the manifest on the disk may name it
                with contextlib.suppress(OSError):
                    self.store.unlink(fresh.identity.file)
            raise

    def _save(self, manifest: Manifest) -> None:
        """Make a tree the one that counts, and remove the files it declares dead."""
        there = set(self.store.names())
        gone = {item for item in manifest.dead if item.file not in there}
        if gone:
            self.store.sync_dir()  # else one of them could come back, and nobody would know what it is
        try:
            self._copies.save(dataclasses.replace(manifest, dead=manifest.dead - gone))
        except BaseException:
            if self._copies.stopped:
                for image in self._images.values():
                    image.leaf.stop("an error stopped all writing to its set until it is opened again")
            raise
        for item in manifest.dead - gone:
            for file in (item.file, *([seal_file(item.id)] if item.kind == DEAD_LEAF else [])):
                with contextlib.suppress(OSError):
                    self.store.unlink(file)


def _check_name(name: str) -> None:
    if not good_name(name):
        raise Unusable(repr(name), "cannot be a name: 1 to 120 bytes, printable, without / and @")
