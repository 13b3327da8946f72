"""The judge of Quire's promises: on a crash state it opens the set as anybody would, looks, repairs, goes on, looks.

    opens          the set and every disk in it open, for reading and for writing
    atomic-tree    the tree is as before the line that was running, or as after it
    acknowledged   every sector of a head holds what was flushed, or something written since
    immutable      every sector of a snapshot holds what it held
    no-leak        after opening for writing no file is left that the manifest does not name
    detects        whatever an opener meets in a crash state, it answers with an error of its own or not at all
    identity       what a disk reads in a block of data lies at the same offset of the leaf's file
    refuses        beside a writer a second one is refused, at once
    repairs        once recovered, either copy of all metadata may be lost: the same is read, and the copy is mended

After each recovery the judge goes on like a user: it writes, flushes, and then leaves a witness, a file whose name is
durable. A crash state inside that is judged with it: what came before the witness must be there.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator
from itertools import groupby

import xxhash

from powercut.formats.quire.history import content, repeatable
from powercut.formats.quire.mends import Mends
from powercut.formats.quire.promises import Promises, World
from powercut.stores import Case
from powercut.trace import SECTOR
from powercut.verdict import Problem, Severity
from quire.errors import Busy, QuireError
from quire.image import Image
from quire.layout import BLOCK, DATA, PARENT
from quire.leaf import Leaf
from quire.seal import file_name
from quire.sets import Set

RULES = (
    "opens", "atomic-tree", "acknowledged", "immutable", "no-leak", "detects", "identity", "refuses", "repairs"
)  # fmt: skip
_LATER = 9000  # what the judge writes is told from what the history wrote by this


class Quire:
    """Judges the states of a recorded history. `touch`: the sectors of each head that the judge writes after a
    recovery."""

    def __init__(self, promises: Promises, touch: range = range(2)) -> None:
        self._promises = promises
        self._touch = touch
        self._mends = Mends()

    def promise(self, position: int) -> bytes:
        """What the verdict rests on besides the state, in a few bytes."""
        legal = self._promises.worlds(position)
        worlds = [(sorted(world.names.items()), sorted(world.disks.items())) for world in legal]
        return xxhash.xxh3_128_digest(repr((self._touch, worlds)).encode())

    def __call__(self, case: Case) -> None:
        worlds = [self._seen_since(case, world) for world in self._promises.worlds(case.position)]
        with repeatable(1000 * (case.level + 1)):
            if not case.level:  # deeper down, opening for writing reads the same and more
                self._look(case, worlds, write=False)
            self._look(case, worlds, write=True)
            if not case.level and all(world.names for world in worlds):
                with self._guarded(case, worlds):
                    self._mends.check(case)

    def _look(self, case: Case, worlds: list[World], *, write: bool) -> None:
        """Open, compare, and when writing go on."""
        with self._guarded(case, worlds), contextlib.ExitStack() as stack:
            quire = stack.enter_context(Set.open(case.store, write=write, verify=True))
            world = self._same_tree(case, worlds, quire)
            if world is None:
                return
            for name, (_, writable) in sorted(world.names.items()):
                image = quire.image(name)
                self._compare(case, world, image, "acknowledged" if writable else "immutable")
            if write:
                self._alone(case)
                self._nothing_left(case, quire)
                self._go_on(case, quire, world)

    @contextlib.contextmanager
    def _guarded(self, case: Case, worlds: list[World]) -> Iterator[None]:
        """Whatever is raised breaks a rule, unless there may be no set yet."""
        try:
            yield
        except QuireError as error:
            if all(world.names for world in worlds):
                report(case, "opens", "refused", Severity.UNOPENABLE, str(error))
        except (OSError, ValueError, LookupError, TypeError, AssertionError, struct.error) as error:
            kind = type(error).__name__
            report(case, "detects", kind, Severity.UNOPENABLE, f"{kind} instead of an error of the format: {error}")

    def _same_tree(self, case: Case, worlds: list[World], quire: Set) -> World | None:
        names = {name: (value.leaf.hex(), value.writable) for name, value in quire.manifest.names.items()}
        for world in worlds:
            known = {name: (leaf or names.get(name, ("", 0))[0], head) for name, (leaf, head) in world.names.items()}
            if known == names:
                return world
        legal = " or ".join(str(sorted(world.names)) for world in worlds)
        report(case, "atomic-tree", "tree", Severity.CORRUPT, f"the names are {sorted(names)}; legal: {legal}")
        return None

    def _compare(self, case: Case, world: World, image: Image, rule: str) -> None:
        """Hold every sector against what it may be. Sectors that can be only one thing are read together; each other
        one is a part of its own, so that what they may hold adds up and does not multiply."""
        disk = world.disks[image.name]
        if image.size != len(disk) * SECTOR:
            report(
                case, rule, "size", Severity.SILENT, f"{image.name} has {image.size} bytes, not {len(disk) * SECTOR}"
            )
            return

        def look(first: int, count: int) -> None:
            data = image.read(first * SECTOR, count * SECTOR)
            self._at_home(case, image, first, data)
            for i in range(count):
                self._sector(case, image.name, rule, first + i, bytes(data[i * SECTOR : (i + 1) * SECTOR]), disk)

        for open_, sectors in groupby(range(len(disk)), lambda sector: len(disk[sector]) > 1):
            some = list(sectors)
            for first, count in [(sector, 1) for sector in some] if open_ else [(some[0], len(some))]:
                case.explore(lambda first=first, count=count: look(first, count))  # type: ignore[misc]

    def _sector(
        self, case: Case, name: str, rule: str, sector: int, data: bytes, disk: list[tuple[bytes, ...]]
    ) -> None:
        if data in disk[sector]:
            return
        silent = f"sector {sector} of {name} holds {told(data)}; legal: {', '.join(map(told, disk[sector]))}"
        report(case, rule, f"{name}-{told(data)}", Severity.SILENT, silent, sector)

    def _at_home(self, case: Case, image: Image, first: int, data: bytes | bytearray) -> None:
        """Compare what a disk reads with the files of the leaves that have it, block by block."""
        store, begin, end = case.again(), first * SECTOR, first * SECTOR + len(data)
        for block in range(begin // BLOCK, -(-end // BLOCK)):
            leaf: Leaf | None = image.leaf
            low, high = max(begin, block * BLOCK), min(end, (block + 1) * BLOCK)
            while leaf is not None and leaf.states[block] == PARENT and high <= leaf.size:
                leaf = leaf.parent
            if leaf is None or high > leaf.size or leaf.states[block] != DATA:
                continue
            if store.open(leaf.identity.file, write=False).read(low, high - low) != data[low - begin : high - begin]:
                text = f"what {image.name} reads at {low} does not lie there in {leaf.identity.file}"
                report(case, "identity", image.name, Severity.CORRUPT, text, low // SECTOR)

    def _alone(self, case: Case) -> None:
        """A second writer beside the one that is open."""
        try:
            Set.open(case.store, write=True).close()
        except Busy:
            return
        report(case, "refuses", "writer", Severity.CORRUPT, "a second writer was let in")

    def _nothing_left(self, case: Case, quire: Set) -> None:
        named = {identity.file for identity in quire.manifest.leaves.values()}
        named |= {file_name(leaf) for leaf in quire.manifest.seals}
        kinds = (".leaf", ".state", ".seal")
        left = [name for name in quire.store.names() if name.endswith(kinds) and name not in named]
        if left:
            report(case, "no-leak", "file", Severity.LEAK, f"after opening for writing {left[0]} is still there")

    # ---- going on

    def _go_on(self, case: Case, quire: Set, world: World) -> None:
        """Write into each head, flush, leave a witness; close, so that the end is proven too."""
        for head in sorted(name for name, (_, writable) in world.names.items() if writable):
            image = quire.opened(head)
            assert image is not None
            for sector in self._range(world, head):
                image.write(sector * SECTOR, content(_LATER + case.level, sector))
            image.flush()
        case.store.create(_witness(case.level)).close()
        case.store.sync_dir()

    def _range(self, world: World, head: str) -> list[int]:
        return [sector for sector in self._touch if sector < len(world.disks[head])]

    def _seen_since(self, case: Case, world: World) -> World:
        """A world after what the judge did at lower levels."""
        if not case.level:
            return world
        names = set(case.store.names())
        later = World(world.names, {name: list(disk) for name, disk in world.disks.items()})
        for level in range(case.level):
            for head in (name for name, (_, writable) in world.names.items() if writable):
                disk = later.disks[head]
                for sector in self._range(world, head):
                    wrote = content(_LATER + level, sector)
                    disk[sector] = (wrote,) if _witness(level) in names else (*disk[sector], wrote)
        return later


def _witness(level: int) -> str:
    return f"witness-{level}"


def report(case: Case, rule: str, kind: str, severity: Severity, text: str, where: int = 0) -> None:
    """Report a broken rule."""
    case.report(Problem(rule, kind, where, severity, text))


def told(data: bytes) -> str:
    """A sector in words."""
    if not any(data):
        return "zeros"
    if data == data[:16] * (SECTOR // 16) and data[:16].strip().replace(b" ", b"").isdigit():
        stamp, sector = int(data[:8]), int(data[8:16])
        whose = f"the judge's write at level {stamp - _LATER}" if stamp >= _LATER else f"write {stamp}"
        return f"{whose}, sector {sector}"
    return f"garbage ({data[:8].hex()}...)"
