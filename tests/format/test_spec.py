"""SPEC.md and the code say the same: its tables against the types, and its examples, written by hand, decoded."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from quire import layout
from quire.identity import Identity, parse
from quire.journal import Journal
from quire.layout import PAGE, Geometry, read_page
from quire.manifest import Dead, Name
from quire.rows import decode
from quire.states import States

SPEC = (Path(__file__).parents[2] / "format" / "SPEC.md").read_text("utf-8")
LEAF = bytes.fromhex("00112233445566778899aabbccddeeff")
SET = bytes.fromhex("a0a1a2a3a4a5a6a7a8a9aaabacadaeaf")
OTHER = LEAF[::-1]

_PAYLOAD = {"states": [("states", "V4032")], "generations": [("generations", "V4032")]}
TYPES = {  # the first field of a table -> its type, and where it begins in its page
    "checksum": (layout.PREFIX, 0),
    "version slots": (layout.HEADER, 64),
    "states": (np.dtype(_PAYLOAD["states"]), 64),
    "generations": (np.dtype(_PAYLOAD["generations"]), 64),
    "start": (layout.ENTRY, 0),
    "version leaves": (layout.MANIFEST, 64),
    "leaf": (layout.LEAF_ROW, 0),
    "kind": (layout.NAME_ROW, 0),
    "set": (layout.BASE_ROW, 0),
    "id": (layout.DEAD_ROW, 0),
}

Row = tuple[int, int, str]


def tables(text: str) -> dict[str, list[Row]]:
    """Every table of fields, by its first field (and its second, where that is "version")."""
    found = {}
    for table in re.findall(r"\| offset \| size \| field \| meaning \|\n\| --- .*\n((?:\|.*\n)+)", text):
        rows = [
            (int(offset), int(size), field)
            for offset, size, field in re.findall(r"^\| (\d+) \| (\d+) \| (\w+) \|", table, re.MULTILINE)
        ]
        assert len(rows) == table.count("\n"), table
        name = " ".join(field for _, _, field in rows[: 1 + (rows[0][2] == "version")])
        assert name not in found
        found[name] = rows
    return found


def rows_of(dtype: np.dtype, begin: int) -> list[Row]:
    return [(begin + dtype.fields[name][1], dtype.fields[name][0].itemsize, name) for name in dtype.names]


def example(name: str) -> bytes:
    """The bytes of an example; a page is filled up with zeros."""
    block = re.search(rf"^\*\*{name}\.\*\* .*\n\n((?:    .*\n)+)", SPEC, re.MULTILINE)
    assert block, name
    raw = bytearray(PAGE)
    for line in block[1].splitlines():
        offset, *values = line.split()
        data = bytes.fromhex("".join(values))
        raw[int(offset, 16) : int(offset, 16) + len(data)] = data
    return bytes(raw)


def test_every_table_is_the_type():
    found = tables(SPEC)
    assert found.keys() == TYPES.keys()
    for name, (dtype, begin) in TYPES.items():
        assert found[name] == rows_of(dtype, begin), name


def test_control_a_table_that_differs_is_seen(planted):
    changed = SPEC.replace("| 40 | 8 | size | as in the header |", "| 40 | 4 | size | as in the header |")
    assert changed != SPEC
    caught = tables(changed)["leaf"] != rows_of(layout.LEAF_ROW, 0)
    planted("a field of another size in SPEC.md", caught)
    assert caught


def test_numbers_in_the_text():
    for number in (
        layout.BLOCKS_PER_PAGE,
        layout.PAGES_PER_INDEX,
        layout.DATA_ALIGN,
        layout.MAX_ENTRIES,
        layout.MAX_CHECKED,
        layout.MAX_VERIFIED,
        layout.SLOTS[1],
    ):
        assert re.search(rf"\b{number}\b", SPEC), number
    assert layout.MAX_SIZE == 1 << 56
    assert "up to 2^56" in SPEC


def test_the_header_by_hand():
    raw = example("Header")
    assert read_page(raw, b"QHDR", LEAF)
    assert parse(raw, "example", 0) == (Identity(LEAF, SET, 4 << 20, 64, OTHER), 0)


def test_the_map_page_by_hand():
    raw = example("Map page")
    prefix = read_page(raw, b"QMAP", LEAF)
    assert prefix
    assert (prefix.number, prefix.generation) == (0, 9)
    states = States(1)
    states.set_page(0, raw[64:])
    assert [states[block] for block in range(7)] == [1, 1, 2, 0, 2, 1, 0]


def test_the_index_page_by_hand():
    raw = example("Index page")
    prefix = read_page(raw, b"QIDX", LEAF)
    assert prefix
    assert (prefix.number, prefix.generation, prefix.previous) == (0, 9, 0x0123456789ABCDEF)
    assert np.frombuffer(raw, "<u8", offset=64).tolist() == [9] + [0] * 503


def test_the_record_by_hand():
    raw = example("Record")
    prefix = read_page(raw, b"QREC", LEAF)
    assert prefix
    assert (prefix.number, prefix.generation, prefix.previous) == (10, 10, 0x0123456789ABCDEF)
    journal = Journal(None, Geometry.of(4 << 20, 64), LEAF)  # type: ignore[arg-type]
    record = journal._decode(prefix, raw)
    assert (record.kind, record.entries) == (layout.P, [(3, 2, layout.DATA), (7, 1, layout.ZERO)])


def test_the_manifest_by_hand():
    raw = example("Manifest")
    length = int.from_bytes(raw[32:40], "little")
    assert layout.checksum(raw[8:length]) == int.from_bytes(raw[:8], "little")
    manifest = decode(raw[:length], "example")
    assert (manifest.set, manifest.generation) == (SET, 7)
    assert manifest.leaves == {LEAF: Identity(LEAF, SET, 4 << 20, 64)}
    assert manifest.names == {"main": Name(LEAF, True, 123456789)}
    assert manifest.dead == {Dead(OTHER, layout.DEAD_LEAF)}


@pytest.mark.parametrize(("size", "slots"), [(512, 4), (64 << 10, 4), ((1 << 40) + 512, 4096), (1 << 56, 65536)])
def test_places_as_the_spec_says(size, slots):
    place = Geometry.of(size, slots)
    blocks = (size + 4095) // 4096
    pages = (blocks + 16127) // 16128
    indexes = (pages + 503) // 504
    n = 1 + indexes + pages + slots
    data = (size + 65535) // 65536 * 65536
    assert (place.blocks, place.map_pages, place.index_pages, place.pages) == (blocks, pages, indexes, n)
    assert [place.header(0), place.index(0, 0), place.map(0, 0), place.slot(0, 0)] == [
        data,
        data + 4096,
        data + 4096 * (1 + indexes),
        data + 4096 * (1 + indexes + pages),
    ]
    assert [place.index(0, 1), place.map(0, 1), place.slot(0, 1), place.header(1)] == [
        data + 4096 * n,
        data + 4096 * (n + indexes),
        data + 4096 * (n + indexes + pages),
        data + 4096 * (2 * n - 1),
    ]
    assert place.end == data + 8192 * n
    assert place.slot(slots + 3, 0) == place.slot(3, 0)
