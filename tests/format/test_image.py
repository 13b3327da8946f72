"""Images and sets against a dictionary of byte strings: any alignment, holes, parents, sizes, several threads."""

from __future__ import annotations

import os
import random
import threading

import pytest

from powercut.crash.store import in_memory
from quire.errors import Busy, Foreign, ReadOnly, Unusable
from quire.layout import BLOCK
from quire.sets import Set
from quire.store import RealStore
from support.quires import Model

SIZE = 40 * BLOCK + 3 * 512


def test_random_work_reads_as_the_model(tmp_path):
    for seed, store in enumerate((in_memory(), RealStore(tmp_path))):
        chance = random.Random(seed)
        model = Model({"main": bytearray(SIZE)})
        work = Work(store, Set.create(store, SIZE, slots=8), model, chance)
        for _ in range(600):
            work.step()
        work.quire.close()
        store.close()


class Work:
    """Random operations on a set and on the model; whatever can be read is compared."""

    def __init__(self, store, quire, model, chance):
        self.store, self.quire, self.model, self.chance = store, quire, model, chance
        self.names = (f"n{i}" for i in range(10**6))

    def step(self):
        chance, model = self.chance, self.model
        head = chance.choice(sorted(model.heads))
        image = self.quire._images.get(head)
        if image is None or image.closed:
            image = self.quire.image(head)
        size = image.size
        offset = chance.randrange(size)
        length = min(size - offset, chance.choice([1, 512, BLOCK, 9000, 30000]))
        what = chance.choices(["write", "zero", "discard", "flush", "read", "tree", "reopen"], [8, 2, 2, 2, 4, 2, 1])[0]
        if what == "write":
            data = chance.randbytes(length)
            image.write(offset, data, chance.random() < 0.2)
            model.write(head, offset, data)
        elif what == "zero":
            image.zero(offset, length, chance.random() < 0.5)
            model.zero(head, offset, length)
        elif what == "discard":
            image.discard(offset, length)
            model.discard(head, offset, length)
        elif what == "flush":
            image.flush()
        elif what == "read":
            assert image.read(offset, length) == model.heads[head][offset : offset + length]
        elif what == "reopen":
            self.quire.close()
            self.quire = Set.open(self.store, write=True)
            self.compare()
        else:
            self.tree(head, image)

    def tree(self, head, image):
        chance, model, quire = self.chance, self.model, self.quire
        snapshots = sorted(model.snapshots)
        what = chance.choice(["snapshot", "resize"] + ["clone", "revert", "delete", "rename"] * bool(snapshots))
        new = next(self.names)
        if what == "snapshot":
            arguments = (head, new)
        elif what == "resize":
            arguments = (head, chance.randrange(1, 60 * BLOCK // 512) * 512)
        else:
            image.close()
            old = chance.choice([*snapshots, head])
            arguments = {
                "clone": (chance.choice(snapshots), new),
                "revert": (head, chance.choice(snapshots)),
                "delete": (old if old != head or len(model.heads) > 1 else chance.choice(snapshots),),
                "rename": (old, new),
            }[what]
        getattr(quire, what)(*arguments)
        getattr(model, what)(*arguments)

    def compare(self):
        assert set(self.quire.manifest.names) == {*self.model.heads, *self.model.snapshots}
        for name, content in {**self.model.heads, **self.model.snapshots}.items():
            image = self.quire.image(name)
            assert image.read(0, image.size) == content, name
            image.close()
        leaves = [name for name in self.store.names() if name.endswith(".leaf")]
        assert sorted(leaves) == sorted(leaf.file for leaf in self.quire.manifest.leaves.values())


def test_a_full_leaf_cut_at_the_disks_size_is_raw(tmp_path):
    data = random.Random(3).randbytes(SIZE)
    store = RealStore(tmp_path)
    with Set.create(store, SIZE) as quire:
        quire.image("main").write(0, data)
        leaf = quire.manifest.leaves[quire.manifest.names["main"].leaf]
    assert (tmp_path / leaf.file).read_bytes()[:SIZE] == data


def test_threads_with_blocks_that_touch(tmp_path):
    """Each thread owns every fourth sector, so that all of them share every block."""
    store = RealStore(tmp_path)
    with Set.create(store, SIZE, slots=8) as quire:
        image = quire.image("main")
        sectors = SIZE // 512
        last: list[dict[int, bytes]] = [{} for _ in range(4)]
        errors: list[BaseException] = []

        def work(me: int) -> None:
            chance = random.Random(me)
            try:
                for i in range(400):
                    sector = chance.randrange(me, sectors, 4)
                    data = bytes([me + 1]) * 500 + i.to_bytes(12, "big")
                    image.write(sector * 512, data, chance.random() < 0.05)
                    last[me][sector] = data
                    if chance.random() < 0.1:
                        image.flush()
                    assert image.read(sector * 512, 512) == data
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(me,)) for me in range(4)]
        for thread in threads:
            thread.start()
        for i in range(3):
            quire.snapshot("main", f"s{i}")
        for thread in threads:
            thread.join()
        assert not errors
    with Set.open(store) as quire:
        disk = quire.image("main").read(0, SIZE)
        for sector in range(sectors):
            assert disk[sector * 512 : (sector + 1) * 512] == last[sector % 4].get(sector, bytes(512)), sector


def test_a_base_in_another_set(tmp_path):
    (tmp_path / "golden").mkdir()
    (tmp_path / "vm").mkdir()
    golden, vm = RealStore(tmp_path / "golden"), RealStore(tmp_path / "vm")
    with Set.create(golden, SIZE) as quire:
        quire.image("main").write(0, b"golden" * 1000)
        quire.snapshot("main", "v1")
        quire.image("main", write=False)
    with Set.create(vm, base="../golden", snapshot="v1") as quire:
        image = quire.image("main")
        assert image.size == SIZE
        image.write(3, b"mine")
        assert image.read(0, 12) == b"golmineldeng"[:3] + b"mine" + b"olden"
    with Set.open(golden, write=True) as quire:
        quire.delete("v1")
        quire.delete("main")
    with pytest.raises(Foreign, match="has no snapshot"), Set.open(vm) as quire:
        quire.image("main")
    os.rename(tmp_path / "golden", tmp_path / "gone")
    with pytest.raises(Foreign, match="builds on"), Set.open(vm) as quire:
        quire.image("main")


def test_the_state_of_a_guest_is_kept_with_a_snapshot():
    store = in_memory()
    pieces = [b"memory" * 100, b"", b"devices"]
    with Set.create(store, SIZE) as quire:
        quire.snapshot("main", "running", state=iter(pieces))
        assert b"".join(quire.guest_state("running")) == b"".join(pieces)
        with pytest.raises(Unusable, match="no guest state"):
            list(quire.guest_state("main"))
        quire.delete("running")
    assert not [name for name in store.names() if name.endswith(".state")]


def test_the_second_writer_is_refused_and_told_who_the_first_is(tmp_path):
    store = RealStore(tmp_path)
    with Set.create(store, SIZE):
        with pytest.raises(Busy, match=f"pid {os.getpid()} on "):
            Set.open(RealStore(tmp_path), write=True)
        with Set.open(RealStore(tmp_path)) as reader:
            assert list(reader.manifest.names) == ["main"]
    Set.open(RealStore(tmp_path), write=True).close()


def test_what_cannot_be_is_refused_in_words():
    store = in_memory()
    with pytest.raises(Foreign, match="not a quire"):
        Set.open(store)
    with pytest.raises(Foreign, match="not a quire"):
        Set.open(store, write=True)
    assert store.names() == []
    for size in (0, 511, 513, 1 << 57):
        with pytest.raises(Unusable, match="cannot be"):
            Set.create(store, size)
    with Set.create(store, SIZE) as quire:
        quire.snapshot("main", "s")
        image = quire.image("main")
        for wrong in (
            lambda: Set.create(store, SIZE),
            lambda: image.read(SIZE - 1, 2),
            lambda: image.write(-1, b"x"),
            lambda: image.discard(0, SIZE + 1),
            lambda: quire.snapshot("main", "s"),
            lambda: quire.snapshot("s", "t"),
            lambda: quire.snapshot("main", "a/b"),
            lambda: quire.snapshot("main", "x" * 121),
            lambda: quire.clone("main", "t"),
            lambda: quire.clone("nobody", "t"),
            lambda: quire.resize("main", 100),
        ):
            with pytest.raises(Unusable):
                wrong()
        for busy in (lambda: quire.image("main"), lambda: quire.delete("main"), lambda: quire.revert("main", "s")):
            with pytest.raises(Busy):
                busy()
        with pytest.raises(ReadOnly):
            quire.image("s").write(0, b"x")
        assert sorted(quire.manifest.names) == ["main", "s"]
    with Set.open(store) as quire:
        for refused in (
            lambda: quire.image("main").write(0, b"x"),
            lambda: quire.image("main", write=True),
            lambda: quire.snapshot("main", "t"),
        ):
            with pytest.raises(ReadOnly):
                refused()
