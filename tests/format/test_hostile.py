"""Sets that somebody made to hurt: each is refused with a sentence, or read right, in bounded time and memory."""

from __future__ import annotations

import dataclasses
import os
import random
import shutil
import time
import tracemalloc
from pathlib import Path

import pytest

from quire import copies
from quire.errors import QuireError
from quire.layout import BLOCK, HEADER_MAGIC, INDEX_MAGIC, MAP_MAGIC, PAGE, RECORD_MAGIC, checksum
from quire.manifest import Base
from quire.rows import encode
from quire.sets import Set
from quire.store import RealStore

SIZE = 24 * BLOCK
MEMORY = 64 << 20  # bytes that opening and reading such a small set may take at most
SECONDS = 20.0


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A set with two leaves, and something in every structure."""
    place = tmp_path / "vm.quire"
    place.mkdir()
    with Set.create(RealStore(place), SIZE, slots=4) as quire:
        image = quire.image("main")
        for number in range(9):
            image.write(number * BLOCK, bytes([number + 1]) * BLOCK)
            image.flush()
        quire.snapshot("main", "before", state=[b"ram" * 1000])
        image.write(3 * BLOCK, b"new" * 100)
        image.zero(5 * BLOCK, BLOCK)
        image.flush()
    return place


def everything(place: Path, *, write: bool) -> dict[str, bytes]:
    """What all heads and snapshots hold."""
    with Set.open(RealStore(place), write=write) as quire:
        found = {}
        for name in quire.manifest.names:
            image = quire.image(name, write=False)
            assert image.size <= 1 << 40
            found[name] = bytes(image.read(0, min(image.size, 1 << 20)))
        if write:
            image = quire.image("main")
            image.write(0, b"x" * 512)
            image.flush()
        return found


def refused_or_read(place: Path, *, write: bool = False) -> dict[str, bytes] | None:
    """None if it was refused, with a sentence that names something. Anything but an OSError goes through."""
    tracemalloc.start()
    begin = time.monotonic()
    try:
        return everything(place, write=write)
    except OSError as error:
        said = error
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < MEMORY, f"{peak:,} bytes"
        assert time.monotonic() - begin < SECONDS
    assert str(said)
    assert not isinstance(said, QuireError) or said.file
    return None


def leaf_of(place: Path) -> Path:
    return sorted(place.glob("*.leaf"))[0]


@pytest.mark.parametrize("victim", ["manifest-0", "manifest-1", "leaf", "state", "lock"])
@pytest.mark.parametrize("what", ["fifo", "directory", "dangling", "outside", "device", "empty", "short"])
def test_something_else_in_place_of_a_file(folder, tmp_path, victim, what):
    path = {"leaf": leaf_of(folder), "state": next(folder.glob("*.state"))}.get(victim, folder / victim)
    content = path.read_bytes()
    before = everything(folder, write=False)
    path.unlink()
    if what == "fifo":
        os.mkfifo(path)
    elif what == "directory":
        path.mkdir()
    elif what == "dangling":
        path.symlink_to("nowhere")
    elif what == "outside":
        (tmp_path / "outside").write_bytes(content)
        path.symlink_to(tmp_path / "outside")
    elif what == "device":
        try:
            os.mknod(path, 0o600 | 0o020000, os.makedev(1, 5))  # /dev/zero
        except PermissionError:
            pytest.skip("making a device needs root")
    else:
        path.write_bytes(content[: len(content) // 2] if what == "short" else b"")
    for write in (False, True):
        found = refused_or_read(folder, write=write)
        if found is not None:
            assert found == before or write
    if what == "outside":
        assert (tmp_path / "outside").read_bytes() == content, "a link is never followed"


def test_parents_in_a_circle(folder, tmp_path):
    with Set.open(RealStore(folder)) as quire:
        manifest = quire.manifest
    one, other = manifest.leaves.values()
    circle = {
        one.leaf: dataclasses.replace(one, parent=other.leaf),
        other.leaf: dataclasses.replace(other, parent=one.leaf),
    }
    put(folder, dataclasses.replace(manifest, leaves=circle, generation=99))
    assert refused_or_read(folder) is None


def test_sets_that_are_each_others_base(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    with Set.create(RealStore(tmp_path / "a"), SIZE, slots=4) as quire:
        quire.snapshot("main", "s")
    Set.create(RealStore(tmp_path / "b"), None, slots=4, base="../a", snapshot="s").close()
    with Set.open(RealStore(tmp_path / "b"), write=True) as quire:
        quire.snapshot("main", "s")
        there, leaf = quire.manifest.set, quire.manifest.names["s"].leaf
    with Set.open(RealStore(tmp_path / "a")) as quire:
        manifest = quire.manifest
    bottom = next(one for one in manifest.leaves.values() if one.parent == bytes(16))
    leaves = {**manifest.leaves, bottom.leaf: dataclasses.replace(bottom, parent=leaf, base=there)}
    put(tmp_path / "a", dataclasses.replace(manifest, leaves=leaves, bases={there: Base(there, "../b")}, generation=99))
    assert refused_or_read(tmp_path / "a") is None
    assert refused_or_read(tmp_path / "b") is None


@pytest.mark.parametrize("path", ["/etc", "", "x" * 237, "a\nb"])
def test_a_base_somewhere_else(folder, path):
    with Set.open(RealStore(folder)) as quire:
        manifest = quire.manifest
    bottom = next(one for one in manifest.leaves.values() if one.parent == bytes(16))
    other = os.urandom(16)
    leaves = {**manifest.leaves, bottom.leaf: dataclasses.replace(bottom, parent=os.urandom(16), base=other)}
    try:
        put(folder, dataclasses.replace(manifest, leaves=leaves, bases={other: Base(other, path)}, generation=99))
    except (ValueError, OSError):
        return  # such a row cannot even be written
    assert refused_or_read(folder) is None


def put(place: Path, manifest) -> None:
    """Write a manifest past every check."""
    for name in copies.FILES:
        (place / name).write_bytes(encode(manifest))


def test_random_damage_is_refused_or_repaired(folder, tmp_path, figure):
    """Bytes changed anywhere, checksums left as they were: nothing wrong is ever read."""
    truth, chance = everything(folder, write=False), random.Random(4)
    outcomes = {"refused": 0, "right": 0}
    for number in range(150):
        copy = tmp_path / str(number)
        shutil.copytree(folder, copy)
        for _ in range(chance.randrange(1, 5)):
            path = chance.choice(sorted(p for p in copy.iterdir() if p.name != "lock"))
            raw = bytearray(path.read_bytes())
            begin = 65536 * (-(-SIZE // 65536)) if path.suffix == ".leaf" else 0  # data of a leaf is not checked
            at = chance.randrange(begin, len(raw))
            raw[at : at + 8] = chance.randbytes(len(raw[at : at + 8]))
            path.write_bytes(raw)
        found = refused_or_read(copy, write=bool(number % 2))
        assert found is None or found == truth
        outcomes["refused" if found is None else "right"] += 1
        shutil.rmtree(copy)
    figure("quire: sets with random damage", ", ".join(f"{count} {what}" for what, count in outcomes.items()))
    assert outcomes["right"]
    assert outcomes["refused"]


def test_forged_metadata_is_refused_or_read_in_bounds(folder, tmp_path, figure):
    """Fields changed and checksums made right again, as somebody would who knows the format."""
    chance = random.Random(5)
    refused = 0
    rounds = 250
    for number in range(rounds):
        copy = tmp_path / str(number)
        shutil.copytree(folder, copy)
        for _ in range(chance.randrange(1, 4)):
            forge(chance.choice(sorted(p for p in copy.iterdir() if p.name != "lock")), chance)
        refused += refused_or_read(copy, write=bool(number % 2)) is None
        shutil.rmtree(copy)
    figure("quire: sets with forged metadata", f"{refused} refused, {rounds - refused} read within bounds")
    assert refused


VALUES = (0, 1, 2, 3, 255, 1 << 31, (1 << 32) - 1, 1 << 56, (1 << 64) - 1, 4096)


def forge(path: Path, chance: random.Random) -> None:
    raw = bytearray(path.read_bytes())
    if path.suffix == ".leaf":
        magics = (HEADER_MAGIC, INDEX_MAGIC, MAP_MAGIC, RECORD_MAGIC)
        places = [p for p in range(0, len(raw), PAGE) if bytes(raw[p + 8 : p + 12]) in magics]
        place, length = chance.choice(places), PAGE
    else:
        place, length = 0, len(raw)
    if length < 64:
        return
    width = chance.choice([1, 2, 4, 8])
    at = place + chance.randrange(8, length - width)
    at -= at % width
    value = chance.choice([*VALUES, chance.getrandbits(64)]) % (1 << 8 * width)
    raw[at : at + width] = value.to_bytes(width, "little")
    raw[place : place + 8] = checksum(bytes(raw[place + 8 : place + length])).to_bytes(8, "little")
    path.write_bytes(raw)
