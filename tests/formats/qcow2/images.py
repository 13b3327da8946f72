"""Images for the checker's tests: made by QEMU in every shape, mutated, and judged by `qemu-img check`."""

from __future__ import annotations

import json
import random
import shutil
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

needs_qemu = pytest.mark.skipif(
    not (shutil.which("qemu-img") and shutil.which("qemu-io")), reason="qemu-img or qemu-io is not installed"
)

TIMEOUT = 30


@dataclass(frozen=True)
class Outcome:
    """What a checker says. Without counts: it gave up, or did not open the image."""

    exit_code: int
    corruptions: int = 0
    leaks: int = 0
    check_errors: int = 0
    counted: bool = True
    message: str = field(default="", compare=False)


def qemu_check(path: Path) -> Outcome:
    command = ["qemu-img", "check", "--output=json", "-f", "qcow2", str(path)]
    done = subprocess.run(command, capture_output=True, timeout=TIMEOUT, check=False)
    message = done.stderr.decode(errors="replace")
    try:
        counts = json.loads(done.stdout)
    except ValueError:
        return Outcome(done.returncode, counted=False, message=message)
    return Outcome(
        done.returncode,
        counts.get("corruptions", 0),
        counts.get("leaks", 0),
        counts["check-errors"],
        message=message,
    )


def qemu_img(*arguments: str | Path) -> bool:
    done = subprocess.run(["qemu-img", *map(str, arguments)], capture_output=True, timeout=TIMEOUT, check=False)
    return done.returncode == 0


def qemu_io(path: Path, *commands: str, options: tuple[str, ...] = ()) -> None:
    """Failing commands are as good as others: they too leave an image behind."""
    words = ["qemu-io", "-f", "qcow2", *options, *(w for c in commands for w in ("-c", c)), str(path)]
    subprocess.run(words, capture_output=True, timeout=TIMEOUT, check=False)


@dataclass(frozen=True)
class Shape:
    version: int = 3
    cluster: int = 65536
    refcount_bits: int = 16
    extended_l2: bool = False
    lazy: bool = False
    data_file: bool = False
    backing: bool = False

    @property
    def name(self) -> str:
        flags = [n for n in ("extended_l2", "lazy", "data_file", "backing") if getattr(self, n)]
        return "-".join([f"v{self.version}", str(self.cluster), f"{self.refcount_bits}bit", *flags])

    def create(self, path: Path, size: int) -> bool:
        options = [f"compat={'1.1' if self.version == 3 else '0.10'}", f"cluster_size={self.cluster}"]
        if self.version == 3:
            options.append(f"refcount_bits={self.refcount_bits}")
            options += [o for o, on in (("lazy_refcounts=on", self.lazy), ("extended_l2=on", self.extended_l2)) if on]
            if self.data_file:
                options.append(f"data_file={path.with_suffix('.data')}")
        more: list[str | Path] = []
        if self.backing:
            below = path.with_suffix(".below")
            if not below.exists() and not qemu_img("create", "-q", "-f", "raw", below, str(size)):
                return False
            more = ["-b", below, "-F", "raw"]
        return qemu_img("create", "-q", "-f", "qcow2", "-o", ",".join(options), *more, path, str(size))


def shapes() -> Iterator[Shape]:
    """Every combination that qcow2 allows, of few values each."""
    for cluster in (512, 4096, 65536, 2 << 20):
        yield Shape(2, cluster)
        for bits in (1, 2, 4, 8, 16, 32, 64):
            yield Shape(3, cluster, bits)
        yield Shape(3, cluster, lazy=True)
        yield Shape(3, cluster, data_file=True)
        yield Shape(3, cluster, backing=True)
        yield Shape(2, cluster, backing=True)
    for cluster in (16384, 65536, 2 << 20):
        for bits in (1, 16, 64):
            yield Shape(3, cluster, bits, extended_l2=True)
        yield Shape(3, cluster, extended_l2=True, lazy=True)
        yield Shape(3, cluster, extended_l2=True, data_file=True)
        yield Shape(3, cluster, extended_l2=True, backing=True)
    for cluster in (1024, 8192, 1 << 18, 1 << 20):
        yield Shape(2, cluster)
        yield Shape(3, cluster)


def size_for(shape: Shape) -> int:
    """Some L2 tables' worth, as far as that stays small; not a whole number of clusters."""
    table = shape.cluster * (shape.cluster // (16 if shape.extended_l2 else 8))
    return max(min(3 * table, 64 << 20), 2 * shape.cluster) + 7 * 512


def _writes(rng: random.Random, shape: Shape, size: int, count: int, verbs: tuple[str, ...]) -> list[str]:
    commands = []
    for _ in range(count):
        length = max(512, rng.choice((512, 4096, shape.cluster, 3 * shape.cluster)) // 512 * 512)
        if length > size:
            length = 512
        start = rng.randrange((size - length) // 512 + 1) * 512
        if rng.random() < 0.6:
            start -= start % shape.cluster
        commands.append(f"{rng.choice(verbs)} {start} {length}")
    return commands


WRITE, ZERO, UNMAP, DISCARD = "write -P 7", "write -z", "write -z -u", "discard"


def recipes() -> tuple[str, ...]:
    return ("fresh", "writes", "mixed", "compressed", "snapshots", "bitmaps", "vmstate", "killed")


def make(path: Path, shape: Shape, recipe: str, seed: int) -> bool:
    """One image; False where QEMU cannot make it."""
    rng = random.Random(f"{shape.name} {recipe} {seed}")
    size = size_for(shape)
    if not shape.create(path, size):
        return False
    if recipe == "fresh":
        return True
    everything = (WRITE, WRITE, ZERO, UNMAP, DISCARD)
    first = _writes(rng, shape, size, 12, (WRITE,) if recipe == "writes" else everything)
    if recipe == "compressed":
        first += [
            f"write -c -P {n} {rng.randrange(size // shape.cluster) * shape.cluster} {shape.cluster}" for n in range(9)
        ]
    if recipe == "vmstate":
        first.append("write -b -P 9 0 131072")
    if recipe == "killed":
        first.append("sigraise 9")  # dirty where refcounts are lazy, leaks elsewhere
    qemu_io(path, *first, options=("-d", "unmap"))
    if recipe in ("snapshots", "vmstate"):
        qemu_img("snapshot", "-c", "one", path)
        qemu_io(path, *_writes(rng, shape, size, 6, everything), options=("-d", "unmap"))
        qemu_img("snapshot", "-c", "two", path)
        qemu_io(path, *_writes(rng, shape, size, 6, everything))
        if rng.random() < 0.5:
            qemu_img("snapshot", rng.choice(("-d", "-a")), "one", path)
    if recipe == "bitmaps":
        qemu_img("bitmap", "--add", "-g", rng.choice(("512", "64k", "1M")), path, "a")
        qemu_img("bitmap", "--add", path, "b" * rng.randrange(1, 90))
        qemu_io(path, *_writes(rng, shape, size, 6, everything))
        if rng.random() < 0.3:
            qemu_io(path, f"write 0 {512}", "sigraise 9")  # leaves bitmaps in use
        elif rng.random() < 0.3:
            qemu_img("bitmap", "--remove", path, "a")
    return True


class Mutator:
    """Breaks an image in a few places. What is where comes from the header alone, read here by hand."""

    def __init__(self, image: bytes) -> None:
        self.image = image
        self.bits = struct.unpack_from(">I", image, 20)[0]
        self.cluster = 1 << self.bits
        self.clusters = -(-len(image) // self.cluster)
        self.version = struct.unpack_from(">I", image, 4)[0]
        self.l1_size, self.l1 = struct.unpack_from(">IQ", image, 36)
        self.reftable, self.reftable_clusters, self.snapshots_count, self.snapshots = struct.unpack_from(
            ">QIIQ", image, 48
        )
        mask = 0x00FFFFFFFFFFFE00
        self.l2 = [o & mask for o in self._words(self.l1, self.l1_size) if o & mask]
        self.blocks = [o for o in self._words(self.reftable, self.reftable_clusters * self.cluster // 8) if o]
        self.extended = self.version == 3 and image[79] & 0x10

    def _words(self, offset: int, count: int) -> tuple[int, ...]:
        return struct.unpack_from(f">{count}Q", self.image, offset)

    def mutate(self, rng: random.Random) -> bytes:
        out = bytearray(self.image)
        for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
            rng.choice(self.KINDS)(self, out, rng)
        return bytes(out)

    def _put(self, out: bytearray, offset: int, data: bytes) -> None:
        if offset + len(data) <= len(out):
            out[offset : offset + len(data)] = data

    def _some_entry(self, rng: random.Random, old: int) -> int:
        near = rng.randrange(self.clusters + 2) * self.cluster
        return rng.choice(
            (
                near,
                near | 1 << 63,
                near | 1 << 63 | 1,
                near | 1,
                near + 512 * rng.randrange(8) | 1 << 63,
                old ^ 1 << 63,
                old ^ 1 << rng.randrange(64),
                1 << 62 | near | rng.randrange(1 << 10) | rng.randrange(4) << 58,
                rng.getrandbits(64),
                rng.getrandbits(64) & 0x80FFFFFFFFFFFE00,
                rng.getrandbits(48) & ~(self.cluster - 1) | 1 << 63,
                1 << 63,
                0,
            )
        )

    def _entry(self, out: bytearray, rng: random.Random, offset: int) -> None:
        if offset + 8 <= len(out):
            old = struct.unpack_from(">Q", out, offset)[0]
            struct.pack_into(">Q", out, offset, self._some_entry(rng, old))

    def l2_entry(self, out: bytearray, rng: random.Random) -> None:
        if self.l2:
            used = rng.choice((64, self.cluster))  # the low slots are those in use
            self._entry(out, rng, rng.choice(self.l2) + rng.randrange(min(used, self.cluster) // 8) * 8)

    def l2_copy(self, out: bytearray, rng: random.Random) -> None:
        """Two slots for one cluster, the way a lost update makes them."""
        if self.l2:
            size = 16 if self.extended else 8
            a, b = (rng.choice(self.l2) + rng.randrange(self.cluster // size) * size for _ in "ab")
            self._put(out, b, bytes(out[a : a + size]))

    def l1_entry(self, out: bytearray, rng: random.Random) -> None:
        if self.l1_size:
            self._entry(out, rng, self.l1 + rng.randrange(self.l1_size) * 8)

    def refcount(self, out: bytearray, rng: random.Random) -> None:
        if self.blocks:
            at = rng.choice(self.blocks) + rng.randrange(min(self.cluster, rng.choice((32, 512, self.cluster))))
            self._put(out, at, bytes([rng.choice((0, 1, 2, 3, 255, rng.randrange(256)))]))

    def refcount_table(self, out: bytearray, rng: random.Random) -> None:
        count = self.reftable_clusters * self.cluster // 8
        self._entry(out, rng, self.reftable + rng.randrange(rng.choice((1, 4, count))) * 8)

    def header_field(self, out: bytearray, rng: random.Random) -> None:
        offset, size = rng.choice(
            ((4, 4), (8, 8), (16, 4), (20, 4), (24, 8), (32, 4), (36, 4), (40, 8), (48, 8), (56, 4), (60, 4), (64, 8))
            + (((72, 8), (80, 8), (88, 8), (96, 4), (100, 4), (104, 1)) if self.version == 3 else ())
        )
        old = int.from_bytes(out[offset : offset + size], "big")
        near = rng.randrange(self.clusters + 2) * self.cluster
        new = rng.choice(
            (0, 1, 2, 3, old + 1, old - 1, old ^ 1 << rng.randrange(size * 8), near, near + 512, rng.getrandbits(64))
        )
        self._put(out, offset, (new % (1 << size * 8)).to_bytes(size, "big"))

    def extension(self, out: bytearray, rng: random.Random) -> None:
        self._put(out, rng.randrange(72, min(700, self.cluster)), bytes([rng.randrange(256)]))

    def snapshot_table(self, out: bytearray, rng: random.Random) -> None:
        if self.snapshots_count:
            at = self.snapshots + rng.randrange(120)
            self._put(out, at, rng.choice((bytes([rng.randrange(256)]), bytes(8), b"\0\0\0\0")))

    def any_byte(self, out: bytearray, rng: random.Random) -> None:
        self._put(out, rng.randrange(len(out)), bytes([rng.randrange(256)]))

    def zero_cluster(self, out: bytearray, rng: random.Random) -> None:
        places = [*self.l2, *self.blocks, self.l1, self.reftable]
        at = rng.choice(places)
        out[at : at + self.cluster] = bytes(len(out[at : at + self.cluster]))

    def random_sector(self, out: bytearray, rng: random.Random) -> None:
        at = rng.choice([*self.l2, *self.blocks, self.l1, self.reftable])
        self._put(out, at + rng.randrange(self.cluster // 512) * 512, rng.randbytes(512))

    def truncate(self, out: bytearray, rng: random.Random) -> None:
        del out[max(512, len(out) - rng.randrange(12 * self.cluster)) :]

    KINDS = (
        *(l2_entry,) * 6, *(l2_copy,) * 2, *(l1_entry,) * 3, *(refcount,) * 4, *(refcount_table,) * 2,
        *(header_field,) * 3, extension, *(snapshot_table,) * 2, any_byte, zero_cluster, random_sector, truncate,
    )  # fmt: skip
