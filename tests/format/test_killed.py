"""A process that writes to a set is killed with SIGKILL at a random moment, again and again: nothing acknowledged is
lost, nothing is there that was never written, and the tree is as before or as after.

The writer tells what it does through a pipe, before it does it and after it was acknowledged; what is in a pipe
survives the writer.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import struct
import sys
import time
from pathlib import Path

import pytest

from quire.layout import BLOCK, SECTOR
from quire.sets import Set
from quire.store import RealStore
from support.mounts import FILESYSTEMS, mounted

BLOCKS = 64
SAID = struct.Struct("<BQQ")  # what, block, value
WRITE, FLUSHED, SNAPSHOT, TAKEN, DELETE, DELETED = range(6)


def stamp(value: int) -> bytes:
    return value.to_bytes(8, "little") * (SECTOR // 8)


def write_for_ever(folder: Path, pipe: int, seed: int, value: int) -> None:
    """The writer."""
    chance = random.Random(seed)
    say = lambda *words: os.write(pipe, SAID.pack(*words))  # noqa: E731
    with Set.open(RealStore(folder), write=True) as quire:
        image = quire.image("main")
        for name in [name for name, known in quire.manifest.names.items() if not known.writable]:
            say(DELETE, 0, int(name))
            quire.delete(name)
            say(DELETED, 0, int(name))
        while True:
            for _ in range(chance.randrange(1, 12)):
                value += 1
                block, sector = chance.randrange(BLOCKS), chance.randrange(BLOCK // SECTOR)
                say(WRITE, block * (BLOCK // SECTOR) + sector, value)
                image.write(block * BLOCK + sector * SECTOR, stamp(value))
            image.flush()
            say(FLUSHED, 0, value)
            if chance.random() < 0.1:
                value += 1
                say(SNAPSHOT, 0, value)
                quire.snapshot("main", str(value))
                say(TAKEN, 0, value)


class Truth:
    """What the writers said: the value each sector must have at least, and those it may have."""

    def __init__(self) -> None:
        self.least = dict.fromkeys(range(BLOCKS * BLOCK // SECTOR), 0)
        self.may: dict[int, set[int]] = {sector: {0} for sector in self.least}
        self.snapshots: dict[int, dict[int, int]] = {}  # those that must be there, and what they hold
        self.maybe: set[int] = set()  # those that may be
        self.value = 0

    def hear(self, said: bytes) -> None:
        latest = dict(self.least)
        self.maybe = set()
        for what, sector, value in SAID.iter_unpack(said[: len(said) // SAID.size * SAID.size]):
            self.value = max(self.value, value)
            if what == WRITE:
                latest[sector] = value
                self.may[sector].add(value)
            elif what == FLUSHED:
                self.least = dict(latest)
            elif what == SNAPSHOT:
                self.least = dict(latest)  # it flushes
                self.maybe.add(value)
            elif what == TAKEN:
                self.maybe.discard(value)
                self.snapshots[value] = dict(latest)
            elif what == DELETE:
                self.maybe.add(value)
                self.snapshots.pop(value, None)
            else:
                self.maybe.discard(value)

    def check(self, folder: Path) -> None:
        with Set.open(RealStore(folder)) as quire:
            held = quire.image("main").read(0, BLOCKS * BLOCK)
            for sector in self.least:
                content = bytes(held[sector * SECTOR : (sector + 1) * SECTOR])
                value = int.from_bytes(content[:8], "little")
                assert content == stamp(value), f"sector {sector} is torn"
                assert value in self.may[sector], f"sector {sector} holds {value}, which was never written there"
                assert value >= self.least[sector], (
                    f"sector {sector}: {self.least[sector]} was flushed, {value} is there"
                )
                # The next writer begins from what is there.
                self.least[sector] = value
                self.may[sector] = {value}
            names = {int(name) for name, known in quire.manifest.names.items() if not known.writable}
            assert set(self.snapshots) <= names <= set(self.snapshots) | self.maybe
            for name, content in self.snapshots.items():
                taken = quire.image(str(name)).read(0, BLOCKS * BLOCK)
                assert all(
                    int.from_bytes(taken[s * SECTOR :][:8], "little") == value for s, value in content.items()
                ), f"snapshot {name} changed"


def kill_again_and_again(folder: Path, times: int) -> int:
    """Returns how many of the kills met a writer in its work."""
    folder.mkdir()
    Set.create(RealStore(folder), BLOCKS * BLOCK, slots=8).close()
    truth, chance, met = Truth(), random.Random(1), 0
    for seed in range(times):
        read, write = os.pipe()
        child = os.fork()
        if not child:
            with contextlib.suppress(BaseException):
                os.close(read)
                write_for_ever(folder, write, seed, truth.value)
            os._exit(9)
        os.close(write)
        with open(read, "rb") as pipe:
            said = pipe.read(SAID.size)  # wait until it is at work
            time.sleep(chance.random() * 0.02)
            os.kill(child, signal.SIGKILL)
            said += pipe.read()
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), "the writer ended by itself"
        met += bool(said)
        truth.hear(said)
        truth.check(folder)
    return met


@pytest.mark.skipif(sys.platform != "linux", reason="needs fork and Linux's filesystems")
@pytest.mark.parametrize("filesystem", FILESYSTEMS)
def test_nothing_acknowledged_is_lost(tmp_path, filesystem, figure):
    with mounted(filesystem, tmp_path) as place:
        met = kill_again_and_again(place / "vm.quire", 25)
        figure(f"quire: writers killed on {filesystem} without a loss", met)


@pytest.mark.slow
def test_a_thousand_kills(tmp_path, figure):
    figure("quire: writers killed without a loss", kill_again_and_again(tmp_path / "vm.quire", 1000))


def test_control_a_lost_write_is_noticed(tmp_path, planted):
    """Flushes that do nothing, in a writer whose file is then put back as it was: the check must see that."""
    folder = tmp_path / "vm.quire"
    Set.create(RealStore(folder_made(folder)), BLOCKS * BLOCK, slots=8).close()
    truth = Truth()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    truth.hear(SAID.pack(WRITE, 3, 1) + SAID.pack(FLUSHED, 0, 1))
    with Set.open(RealStore(folder), write=True) as quire:
        quire.image("main").write(3 * SECTOR, stamp(1))
    kept = Truth()
    kept.hear(SAID.pack(WRITE, 3, 1) + SAID.pack(FLUSHED, 0, 1))
    kept.check(folder)
    for name, content in before.items():
        (folder / name).write_bytes(content)
    with pytest.raises(AssertionError, match="was flushed"):
        truth.check(folder)
    planted("quire: a flushed write gone after a kill", True)


def folder_made(folder: Path) -> Path:
    folder.mkdir()
    return folder
