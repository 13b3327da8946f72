"""What lies in a set and is named by nothing: found at each writable open, and removed if it cannot matter.

The manifest that was read may be an old one that somebody put back. So a leaf that it does not name is only removed if
no record but its first was ever written to it: then nothing in it was ever flushed.
"""

from __future__ import annotations

import contextlib
import re

from quire.errors import Foreign
from quire.identity import parse
from quire.journal import Journal
from quire.layout import DATA_ALIGN, HEADER_MAGIC, PAGE, read_page
from quire.manifest import Manifest
from quire.store import File, Store

_OURS = re.compile(r"([0-9a-f]{32})\.(leaf|state|seal)")


def collect(store: Store, manifest: Manifest) -> list[str]:
    """Remove what a crash or a deletion left; returns the names of leaves that nobody names and that hold something."""
    dead = {item.file for item in manifest.dead}
    states = {value.state for value in manifest.names.values()}
    left = []
    for name in store.names():
        ours = _OURS.fullmatch(name)
        if ours is None:
            continue
        id, kind = bytes.fromhex(ours[1]), ours[2]
        if name not in dead:
            if id in {"leaf": manifest.leaves, "state": states, "seal": manifest.seals}[kind]:
                continue
            if kind == "leaf" and _holds_something(store, name, id):
                left.append(name)
                continue
        with contextlib.suppress(OSError):  # it stays a stranger, found again next time
            store.unlink(name)
    return left


def _holds_something(store: Store, name: str, leaf: bytes) -> bool:
    try:
        file = store.open(name, write=False)
    except OSError:  # not a file, or not ours to read
        return True
    try:
        raw = _header(file, leaf)
        if raw is None:
            return False
        try:
            identity, _ = parse(raw, name, 0)
        except Foreign:
            return True
        return not identity.possible or Journal(file, identity.geometry, leaf).highest() > 1
    finally:
        file.close()


def _header(file: File, leaf: bytes) -> bytes | None:
    """A good header: the one at the end, or one anywhere that a first copy may be."""
    size = file.size()
    raw = file.read(max(0, size - PAGE), PAGE)
    if read_page(raw, HEADER_MAGIC, leaf):
        return raw
    for start, length in file.data_ranges(0, size):
        for place in range(-(-start // DATA_ALIGN) * DATA_ALIGN, start + length, DATA_ALIGN):
            raw = file.read(place, PAGE)
            if read_page(raw, HEADER_MAGIC, leaf):
                return raw
    return None
