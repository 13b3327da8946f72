"""What the manifest says: which leaves there are, what they are called, and what is dead. No disk here."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field

from quire.errors import Unusable
from quire.identity import Identity
from quire.layout import DEAD_LEAF, DEAD_STATE, MAX_NAME, MAX_PATH, NONE

MAX_CHAIN = 4096


@dataclass(frozen=True, slots=True)
class Name:
    """A head (`writable`) or a snapshot. `state`: the id of the guest's state file, or NONE."""

    leaf: bytes
    writable: bool
    created: int
    state: bytes = NONE
    state_size: int = 0
    state_check: int = 0


@dataclass(frozen=True, slots=True)
class Base:
    """Another set, and where it was, relative to this one."""

    set: bytes
    path: str


@dataclass(frozen=True, slots=True)
class Dead:
    """A file that no longer counts and may still be there."""

    id: bytes
    kind: int

    @property
    def file(self) -> str:
        return self.id.hex() + (".leaf" if self.kind == DEAD_LEAF else ".state")


@dataclass(frozen=True, slots=True)
class Manifest:
    """What the manifest says; never changed, only replaced. `seals`: the roots of sealed leaves."""

    set: bytes
    generation: int = 0
    leaves: dict[bytes, Identity] = field(default_factory=dict)
    names: dict[str, Name] = field(default_factory=dict)
    bases: dict[bytes, Base] = field(default_factory=dict)
    dead: frozenset[Dead] = frozenset()
    seals: dict[bytes, bytes] = field(default_factory=dict)

    def name(self, name: str) -> Name:
        """Raises Unusable if there is none of this name."""
        if name not in self.names:
            raise Unusable(name, f"there is no such name; there are {', '.join(sorted(self.names)) or 'none'}")
        return self.names[name]

    def with_leaf(self, identity: Identity) -> Manifest:
        return dataclasses.replace(self, leaves={**self.leaves, identity.leaf: identity})

    def with_name(self, name: str, value: Name) -> Manifest:
        return dataclasses.replace(self, names={**self.names, name: value})

    def without_name(self, name: str) -> Manifest:
        names = dict(self.names)
        gone = names.pop(name)
        dead = self.dead | ({Dead(gone.state, DEAD_STATE)} if gone.state != NONE else frozenset())
        return dataclasses.replace(self, names=names, dead=dead)

    def chain(self, leaf: bytes) -> Iterator[Identity]:
        """A leaf and those below it in this set, the leaf first."""
        while leaf != NONE:
            identity = self.leaves[leaf]
            yield identity
            leaf = identity.parent if identity.base == NONE else NONE

    def collected(self) -> Manifest:
        """Without the leaves that no name reaches, which are dead, and without bases that no leaf needs."""
        reached: dict[bytes, Identity] = {}
        for value in self.names.values():
            for identity in self.chain(value.leaf):
                if identity.leaf in reached:
                    break
                reached[identity.leaf] = identity
        leaves = {leaf: identity for leaf, identity in self.leaves.items() if leaf in reached}
        dead = self.dead | {Dead(leaf, DEAD_LEAF) for leaf in self.leaves if leaf not in reached}
        needed = {identity.base for identity in leaves.values()}
        bases = {of: base for of, base in self.bases.items() if of in needed}
        seals = {leaf: seal for leaf, seal in self.seals.items() if leaf in reached}
        return dataclasses.replace(self, leaves=leaves, dead=dead, bases=bases, seals=seals)


def good_name(name: str) -> bool:
    """Whether a head or a snapshot may be called so."""
    length = len(name.encode(errors="replace"))
    return 0 < length <= MAX_NAME and name.isprintable() and not set(name) & {"/", "@"}


def check_tree(manifest: Manifest) -> None:
    """Raises ValueError unless every name leads down to a leaf without a parent here, and heads end alone."""
    parents = set()
    for identity in manifest.leaves.values():
        if identity.base == NONE and identity.parent != NONE:
            if identity.parent not in manifest.leaves:
                raise ValueError(f"leaf {identity.leaf.hex()}: its parent {identity.parent.hex()} is not there")
            parents.add(identity.parent)
    named = [value.leaf for value in manifest.names.values()]
    for name, value in manifest.names.items():
        if value.leaf not in manifest.leaves:
            raise ValueError(f"{name!r} names leaf {value.leaf.hex()}, which is not there")
        if value.writable and (value.leaf in parents or named.count(value.leaf) > 1):
            raise ValueError(f"the head {name!r} shares its leaf {value.leaf.hex()}")
    depth: dict[bytes, int] = {}
    for leaf in manifest.leaves:
        path: list[bytes] = []
        while leaf != NONE and leaf not in depth:
            if len(path) > MAX_CHAIN:
                raise ValueError(f"a chain of parents longer than {MAX_CHAIN}, or in a circle, from {path[0].hex()}")
            path.append(leaf)
            identity = manifest.leaves[leaf]
            leaf = identity.parent if identity.base == NONE else NONE
        below = depth.get(leaf, 0)
        for i, one in enumerate(reversed(path)):
            depth[one] = below + i + 1
            if depth[one] > MAX_CHAIN:
                raise ValueError(f"a chain of parents longer than {MAX_CHAIN}")


def good_path(path: str) -> bool:
    """Whether a base may be at a path."""
    return 0 < len(path.encode()) <= MAX_PATH and path.isprintable() and not path.startswith("/")
