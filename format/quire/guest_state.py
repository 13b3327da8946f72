"""The state of a guest (memory and devices) that belongs to a snapshot: a file of its own, written once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import TypedDict

import xxhash

from quire.errors import Damaged, opening
from quire.manifest import Name
from quire.store import Store

_PIECE = 1 << 20


class Kept(TypedDict):
    """What a name says of its state."""

    state: bytes
    state_size: int
    state_check: int


def write_state(store: Store, id: bytes, pieces: Iterable[bytes]) -> Kept:
    """Write and sync a state. Its name is not durable before `store.sync_dir`."""
    file = store.create(state_file(id))
    digest, size = xxhash.xxh3_64(), 0
    try:
        for piece in pieces:
            file.write(size, piece)
            digest.update(piece)
            size += len(piece)
        file.sync()
    except BaseException:
        with contextlib.suppress(OSError):
            store.unlink(state_file(id))
        raise
    finally:
        file.close()
    return Kept(state=id, state_size=size, state_check=digest.intdigest())


def read_state(store: Store, name: Name) -> Iterator[bytes]:
    """The state in pieces. Raises Damaged, at the end, if it is not what was written."""
    with opening(state_file(name.state)):
        file = store.open(state_file(name.state), write=False)
    try:
        digest = xxhash.xxh3_64()
        for place in range(0, name.state_size, _PIECE):
            piece = file.read(place, min(_PIECE, name.state_size - place))
            digest.update(piece)
            yield piece
        if digest.intdigest() != name.state_check:
            raise Damaged(file.name, "the guest's state is not what was written")
    finally:
        file.close()


def state_file(id: bytes) -> str:
    """The name of a state's file."""
    return id.hex() + ".state"
