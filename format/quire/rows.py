"""The manifest's bytes: encoding, and decoding with every check that can be made without looking at a leaf."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quire.errors import Damaged, Foreign, Unusable
from quire.identity import Identity
from quire.layout import (
    BASE_ROW,
    DEAD_LEAF,
    DEAD_ROW,
    DEAD_STATE,
    HEAD,
    LEAF_ROW,
    MANIFEST,
    MANIFEST_MAGIC,
    MAX_MANIFEST,
    NAME_ROW,
    NONE,
    PREFIX,
    PREFIX_STRUCT,
    SEALED,
    SNAPSHOT,
    VERSION,
    Prefix,
    page,
)
from quire.manifest import Base, Dead, Manifest, Name, check_tree, good_name, good_path

_COUNTS = ("leaves", "names", "bases", "dead")
_ROWS = (LEAF_ROW, NAME_ROW, BASE_ROW, DEAD_ROW)


def encode(manifest: Manifest) -> bytes:
    """The bytes of a manifest file. Raises Unusable if they are too many."""
    bases = list(manifest.bases.values())
    numbers = {base.set: i + 1 for i, base in enumerate(bases)}
    rows = [
        _rows(
            LEAF_ROW,
            (
                {
                    "leaf": leaf.leaf,
                    "parent": leaf.parent,
                    "base": numbers.get(leaf.base, 0),
                    "slots": leaf.slots,
                    "size": leaf.size,
                    "flags": SEALED if leaf.leaf in manifest.seals else 0,
                    "seal": manifest.seals.get(leaf.leaf, NONE),
                }
                for leaf in manifest.leaves.values()
            ),
        ),
        _rows(
            NAME_ROW,
            (
                {
                    "kind": HEAD if value.writable else SNAPSHOT,
                    "length": len(name.encode()),
                    "leaf": value.leaf,
                    "state": value.state,
                    "state_size": value.state_size,
                    "state_check": value.state_check,
                    "created": value.created,
                    "name": name.encode(),
                }
                for name, value in manifest.names.items()
            ),
        ),
        _rows(BASE_ROW, ({"set": b.set, "length": len(b.path.encode()), "path": b.path.encode()} for b in bases)),
        _rows(DEAD_ROW, ({"id": dead.id, "kind": dead.kind} for dead in sorted(manifest.dead, key=lambda d: d.id))),
    ]
    head = np.zeros((), MANIFEST)
    head["version"] = VERSION
    for field_name, part, dtype in zip(_COUNTS, rows, _ROWS, strict=True):
        head[field_name] = len(part) // dtype.itemsize
    payload = head.tobytes() + b"".join(rows)
    length = PREFIX.itemsize + len(payload)
    if length > MAX_MANIFEST:
        raise Unusable("manifest", f"would be {length} bytes long; {MAX_MANIFEST} is the most")
    return page(MANIFEST_MAGIC, manifest.set, payload, number=length, generation=manifest.generation)


def _rows(dtype: np.dtype[Any], values: Iterable[dict[str, Any]]) -> bytes:
    listed = list(values)
    rows = np.zeros(len(listed), dtype)
    for row, value in zip(rows, listed, strict=True):
        for name, content in value.items():
            raw = isinstance(content, bytes)
            row[name] = np.void(content.ljust(dtype[name].itemsize, b"\0")) if raw else content
    return rows.tobytes()


def decode(raw: bytes, file: str) -> Manifest:
    """A manifest from the bytes of a file whose prefix is good. Raises Damaged or Foreign."""
    prefix = Prefix._make(PREFIX_STRUCT.unpack_from(raw))
    head = np.frombuffer(raw, MANIFEST, 1, PREFIX.itemsize)[0]
    if head["version"] != VERSION:
        raise Foreign(file, f"version {head['version']}; this program knows {VERSION}", PREFIX.itemsize)
    if head["incompatible"]:
        raise Foreign(file, f"incompatible features {int(head['incompatible']):#x} that are not known here", 88)
    place = PREFIX.itemsize + MANIFEST.itemsize
    if sum(int(head[name]) * dtype.itemsize for name, dtype in zip(_COUNTS, _ROWS, strict=True)) != len(raw) - place:
        raise Damaged(file, f"{len(raw)} bytes do not fit its counts", PREFIX.itemsize)
    parts: list[NDArray[np.void]] = []
    for name, dtype in zip(_COUNTS, _ROWS, strict=True):
        parts.append(np.frombuffer(raw, dtype, int(head[name]), place))
        place += parts[-1].nbytes
    try:
        return _assemble(prefix, *parts)
    except (ValueError, UnicodeDecodeError) as error:
        raise Damaged(file, str(error)) from None


def _assemble(
    prefix: Prefix, leaves: NDArray[np.void], names: NDArray[np.void], bases: NDArray[np.void], dead: NDArray[np.void]
) -> Manifest:
    """Rows made into a manifest. Raises ValueError if they contradict each other."""
    listed = [Base(row["set"].tobytes(), _text(row["path"], int(row["length"]))) for row in bases]
    for base in listed:
        if not good_path(base.path):
            raise ValueError(f"a base at {base.path!r}, which is not a relative path")
    found: dict[bytes, Identity] = {}
    seals: dict[bytes, bytes] = {}
    for row in leaves:
        number = int(row["base"])
        if number > len(listed):
            raise ValueError(f"base {number} of {len(listed)}")
        base_id = listed[number - 1].set if number else NONE
        leaf, parent = row["leaf"].tobytes(), row["parent"].tobytes()
        identity = Identity(leaf, prefix.owner, int(row["size"]), int(row["slots"]), parent, base_id)
        if leaf in found or leaf == NONE or not identity.possible or int(row["flags"]) & ~SEALED:
            raise ValueError(f"leaf {leaf.hex()}: twice, or with size {identity.size} and {identity.slots} slots")
        found[leaf] = identity
        if int(row["flags"]) & SEALED:
            seals[leaf] = row["seal"].tobytes()
    named: dict[str, Name] = {}
    for row in names:
        name, kind = _text(row["name"], int(row["length"])), int(row["kind"])
        if not good_name(name) or name in named or kind not in (HEAD, SNAPSHOT):
            raise ValueError(f"the name {name!r} of kind {kind}")
        named[name] = Name(
            row["leaf"].tobytes(),
            kind == HEAD,
            int(row["created"]),
            row["state"].tobytes(),
            int(row["state_size"]),
            int(row["state_check"]),
        )
    gone = frozenset(Dead(row["id"].tobytes(), int(row["kind"])) for row in dead)
    if any(item.kind not in (DEAD_LEAF, DEAD_STATE) for item in gone):
        raise ValueError("a dead row of no known kind")
    manifest = Manifest(prefix.owner, prefix.generation, found, named, {b.set: b for b in listed}, gone, seals)
    check_tree(manifest)
    return manifest


def _text(field_value: Any, length: int) -> str:
    raw: bytes = field_value.tobytes()
    if length > len(raw) or any(raw[length:]):
        raise ValueError("a text that is longer than its field, or not followed by zeros")
    return raw[:length].decode()
