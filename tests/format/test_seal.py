"""Seals and scrub: any change of a sealed leaf is found, and metadata is mended from its other copy."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from powercut.crash.store import in_memory
from quire.cli import main
from quire.errors import Damaged, Unusable
from quire.layout import BLOCK, PAGE
from quire.scrub import scrub
from quire.seal import UNIT, levels
from quire.sets import Set
from quire.store import RealStore

SIZE = 40 * UNIT


def run(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two sealed leaves under a snapshot, and a head."""
    place = tmp_path / "vm.quire"
    place.mkdir()
    chance = random.Random(1)
    with Set.create(RealStore(place), SIZE, slots=4) as quire:
        image = quire.image("main")
        for number in range(60):
            image.write(chance.randrange(SIZE // BLOCK) * BLOCK, bytes([number + 1]) * BLOCK)
        quire.snapshot("main", "one", state=[b"ram" * 5000])
        image.zero(5 * UNIT, 3 * BLOCK)
        for number in range(9):
            image.write(chance.randrange(SIZE // BLOCK) * BLOCK, bytes([number + 101]) * BLOCK)
        quire.snapshot("main", "two")
        quire.seal("two")
        image.write(0, b"head" * 1024)
    return place


def test_a_sealed_set_is_as_it_should_be(folder):
    assert run("verify", f"{folder}@two") == (0, "2 leaves, 80 units of 65,536 bytes: nothing bad\n")
    assert run("scrub", folder) == (0, "all is as it should be\n")
    leaves = [path for path in folder.glob("*.leaf") if path.with_suffix(".seal").exists()]
    assert len(leaves) == 2
    assert all(path.stat().st_mode & 0o777 == 0o444 for leaf in leaves for path in (leaf, leaf.with_suffix(".seal")))
    code, output = run("verify", f"{folder}@main")
    assert (code, "is not sealed" in output) == (2, True)


def test_any_change_of_a_sealed_leaf_is_found(folder, tmp_path, planted):
    """One bit, one lost write, one misdirected write, in data and in the map, one at a time."""
    chance = random.Random(2)
    leaf = next(path for path in sorted(folder.glob("*.leaf")) if path.with_suffix(".seal").exists())
    with Set.open(RealStore(folder)) as quire:
        opened = quire.leaf(bytes.fromhex(leaf.stem))
        held = [start for start, _, state in opened.states.runs(0, SIZE // BLOCK) if state == 1]
    original = leaf.read_bytes()
    leaf.chmod(0o644)
    elsewhere = original[held[0] * BLOCK :][:BLOCK]
    cases = {
        "a flipped bit": lambda raw, at: raw.__setitem__(at + 77, raw[at + 77] ^ 4),
        "a zeroed sector": lambda raw, at: raw.__setitem__(slice(at + 512, at + 1024), bytes(512)),
        "a misdirected write": lambda raw, at: raw.__setitem__(slice(at, at + BLOCK), elsewhere),
    }
    for what, damage in cases.items():
        found = []
        for block in chance.sample(held[1:], 8):
            raw = bytearray(original)
            damage(raw, block * BLOCK)
            leaf.write_bytes(raw)
            code, output = run("verify", f"{folder}@two", "--json")
            bad = json.loads(output)["bad"]
            found.append(code == 1 and [leaf.name, block * BLOCK // UNIT * UNIT] in [one[:2] for one in bad])
            with Set.open(RealStore(folder), verify=True) as quire:
                image = quire.image("one" if leaf == first_leaf(folder) else "two")
                with pytest.raises(Damaged):
                    image.read(0, image.size)
        planted(f"sealed data: {what}", all(found))
        assert all(found)
    leaf.write_bytes(original)
    assert run("verify", f"{folder}@two")[0] == 0


def first_leaf(folder: Path) -> Path:
    with Set.open(RealStore(folder)) as quire:
        return folder / quire.manifest.leaves[quire.manifest.names["one"].leaf].file


def test_seal_pages_are_served_from_their_other_copy_and_mended(folder, planted):
    for seal in sorted(folder.glob("*.seal")):
        good = seal.read_bytes()
        seal.chmod(0o644)
        for place in range(0, len(good), PAGE):
            seal.write_bytes(good[:place] + b"\xee" + good[place + 1 :])
            code, output = run("verify", f"{folder}@two")
            assert (code, "one copy" in output) == (1, True)
            code, output = run("scrub", folder)
            assert (code, "mended" in output) == (0, True), output
            assert seal.read_bytes() == good
        both = bytearray(good)
        both[0] ^= 1
        both[len(both) // 2] ^= 1
        seal.write_bytes(both)
        assert "bad in both copies" in run("verify", f"{folder}@two")[1]
        assert run("scrub", folder)[0] == 1
        seal.write_bytes(good)
    planted("a page of a seal, in one copy and in both", True)


def test_scrub_mends_each_page_of_metadata(folder, tmp_path, planted):
    mended = 0
    for path in sorted(folder.glob("*.leaf")):
        good = path.read_bytes()
        path.chmod(0o644)
        for place in range(SIZE, len(good), PAGE):
            if not any(good[place : place + PAGE]):
                continue
            path.write_bytes(good[:place] + bytes(PAGE) + good[place + PAGE :])
            code, output = run("scrub", folder)
            assert code == 0, (path, place, output)
            mended += path.read_bytes()[place : place + PAGE] == good[place : place + PAGE]
            path.write_bytes(good)
    planted("scrub: a zeroed page of metadata", mended > 10)
    assert mended > 10


def test_scrub_tells_what_it_cannot_mend(folder, planted):
    state = next(folder.glob("*.state"))
    raw = bytearray(state.read_bytes())
    raw[100] ^= 1
    state.write_bytes(raw)
    code, output = run("scrub", folder)
    assert code == 1
    assert "guest's state" in output
    planted("scrub: a flipped bit in a guest's state", True)


def test_scrub_gives_back_what_was_never_recorded(tmp_path):
    store = RealStore(tmp_path)
    with Set.create(store, SIZE, slots=4) as quire:
        quire.image("main").write(0, b"x" * BLOCK)
        file = tmp_path / quire.manifest.leaves[quire.manifest.names["main"].leaf].file
    with open(file, "r+b") as raw:
        raw.seek(7 * UNIT)
        raw.write(b"never recorded" * 1000)
    with Set.open(store, write=True) as quire:
        found = scrub(quire)
        assert [one.mended for one in found] == [True]
        assert "16384 bytes were written and never recorded" in found[0].what
    with Set.open(store, write=True) as quire:
        assert scrub(quire) == []
        assert quire.image("main").read(0, BLOCK) == b"x" * BLOCK


def test_an_interrupted_seal_is_a_stranger(folder):
    with Set.open(RealStore(folder), write=True) as quire:
        quire.snapshot("main", "three")
        leaf = quire.manifest.names["three"].leaf.hex()
    (folder / f"{leaf}.seal").write_bytes(b"half")
    assert run("list", folder)[0] == 0
    assert (folder / f"{leaf}.seal").exists(), "a reader changes nothing"
    assert run("snapshot", folder, "four")[0] == 0
    assert not (folder / f"{leaf}.seal").exists()
    assert len(list(folder.glob("*.seal"))) == 2


def test_a_deleted_leaf_takes_its_seal_along(folder):
    for name in ("main", "two", "one"):
        assert run("delete", f"{folder}@{name}")[0] == 0
    assert list(folder.glob("*.seal")) == []


def test_heads_are_not_sealed(folder):
    with Set.open(RealStore(folder), write=True) as quire, pytest.raises(Unusable):
        quire.seal("main")


@given(size=st.integers(1, 1 << 44))
def test_levels(size):
    counts = levels(size)
    assert counts[-1] == 1
    assert counts[0] * 256 >= -(-size // UNIT) > (counts[0] - 1) * 256
    assert all(below <= above * 256 and above < max(below, 2) for below, above in itertools.pairwise(counts))


@settings(max_examples=25)
@given(blocks=st.dictionaries(st.integers(0, 1 << 20), st.integers(0, 2), max_size=12), flip=st.integers(0, 11))
def test_seals_of_large_sparse_disks(blocks, flip):
    """A disk of several levels, in memory: what was sealed is verified, and one changed byte is told by its unit."""
    store = in_memory()
    with Set.create(store, (1 << 20) * BLOCK + BLOCK, slots=4) as quire:
        image = quire.image("main")
        for block, value in blocks.items():
            image.write(block * BLOCK, bytes([value]) * BLOCK)
        quire.snapshot("main", "s")
        quire.seal("s")
        leaf = quire.leaf(quire.manifest.names["s"].leaf)
        seal = quire.seal_of(leaf)
        assert len(levels(leaf.size)) == 3
        quiet = lambda done, of: None  # noqa: E731
        assert list(seal.verify_all(quiet)) == []
        if blocks:
            block = sorted(blocks)[flip % len(blocks)]
            store.open(leaf.identity.file, write=True).write(block * BLOCK, b"\x7f")
            assert list(seal.verify_all(quiet)) == [block * BLOCK // UNIT * UNIT]
        seal.close()
