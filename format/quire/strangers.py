"""What lies in a set and is named by nothing: removed at each writable open, if it cannot matter.

A leaf that the manifest does not name is what a crash left of a leaf that was being made, and nothing but its first
record was ever written to it. If there is more in it, the manifest is an older one than the leaf: then the set is
refused, rather than that it shows how things were.
"""

from __future__ import annotations

import contextlib
import re

from quire.errors import Damaged, Foreign
from quire.identity import parse
from quire.journal import Journal
from quire.layout import DATA_ALIGN, HEADER_MAGIC, PAGE, read_page
from quire.manifest import Manifest
from quire.store import File, Store

_OURS = re.compile(r"([0-9a-f]{32})\.(leaf|state|seal)")


def check(store: Store, manifest: Manifest) -> list[str]:
    """The names of files that nothing needs. Raises Damaged if the manifest is not the last one."""
    dead = {item.file for item in manifest.dead}
    states = {value.state for value in manifest.names.values()}
    found = []
    for name in store.names():
        ours = _OURS.fullmatch(name)
        if ours is None:
            continue
        id, kind = bytes.fromhex(ours[1]), ours[2]
        if name not in dead:
            if id in {"leaf": manifest.leaves, "state": states, "seal": manifest.seals}[kind]:
                continue
            if kind == "leaf" and _holds_something(store, name, id):
                raise Damaged(store.path, f"the manifest is older than {name}, of which it knows nothing")
        found.append(name)
    return found


def remove(store: Store, names: list[str]) -> None:
    """Remove files; what cannot be removed is found again next time."""
    for name in names:
        with contextlib.suppress(OSError):
            store.unlink(name)


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
