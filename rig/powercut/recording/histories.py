"""Histories to try: short lists of operations whose places and lengths lie on the edges of what a format does.

Edges are where one cluster, the reach of an L2 table, of a refcount block or of a refcount table of one cluster ends
and the next begins, and the ends of the disk; one sector and one cluster to either side of each. Lengths run from a
sector to some clusters, to such a reach, and to the whole disk.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from powercut.recording.operations import possible
from powercut.scenario import Errors, Recording, Scenario, Workload, size_text
from powercut.trace import SECTOR

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

KINDS = {  # besides what all have
    "qcow2": ("zero", "discard", "snapshot", "resize", "commit"),
    "raw": ("zero", "discard"),
}
KIB, MIB = 1 << 10, 1 << 20
MOST = 12  # operations in a history that is drawn
_LARGEST = 5 * MIB  # guest's disk: what has its edges farther out is tried without them
_CLUSTERS = (64 * KIB, 4 * KIB, 512, 16 * KIB, 1 * KIB)
_EXTENDED = 16 * KIB  # the smallest cluster that extended L2 entries allow


@dataclass(frozen=True, slots=True)
class Shape:
    """An image to try: its cluster size, how many bytes its tables reach (an L2 table, a refcount block, a refcount
    table of one cluster), options for qemu-img create, and the size of the guest's disk."""

    cluster: int
    reaches: tuple[int, ...]
    options: tuple[tuple[str, str], ...] = ()

    @property
    def size(self) -> int:
        twice = [2 * reach for reach in self.reaches if 2 * reach + 4 * self.cluster <= _LARGEST]
        return max([16 * self.cluster, *twice]) + 4 * self.cluster

    @property
    def offsets(self) -> list[int]:
        """Places to try, the simplest first."""
        edges = {0, self.cluster, 2 * self.cluster, *self.reaches, 2 * self.reaches[0], self.size}
        near = (0, -SECTOR, SECTOR, -self.cluster, self.cluster)
        places = {edge + by for edge in edges for by in near if edge <= self.size}
        return sorted(place for place in places if 0 <= place < self.size)

    @property
    def lengths(self) -> list[int]:
        """Lengths to try, the simplest first."""
        cluster = self.cluster
        some = [cluster, SECTOR, 2 * cluster, cluster - SECTOR, cluster + SECTOR, 5 * cluster, *self.reaches]
        return [length for length in dict.fromkeys([*some, self.size]) if 0 < length <= self.size]

    @property
    def sizes(self) -> list[int]:
        """Sizes to give the disk, the simplest first."""
        near = (self.cluster, -self.cluster, SECTOR, -SECTOR, 0)
        edges = (self.size, self.reaches[0], 2 * self.reaches[0], self.cluster)
        sizes = dict.fromkeys(edge + by for edge in edges for by in near)
        return [size for size in sizes if 0 < size <= _LARGEST]

    @property
    def refused(self) -> frozenset[str]:
        """What QEMU does not do to such an image: a refcount of one bit cannot count a snapshot."""
        return frozenset({"snapshot"} if dict(self.options).get("refcount_bits") == "1" else ())


def _qcow2(cluster: int, extended: bool, bits: int, compat: str, lazy: bool) -> Shape:
    options = {}
    if cluster != 64 * KIB:
        options["cluster_size"] = size_text(cluster)
    if compat == "0.10":  # which has none of the others
        extended, bits, lazy = False, 16, False
        options["compat"] = compat
    extended = extended and cluster >= _EXTENDED
    options |= {"extended_l2": "on"} if extended else {}
    options |= {"refcount_bits": str(bits)} if bits != 16 else {}
    options |= {"lazy_refcounts": "on"} if lazy else {}
    table, block = cluster * (cluster // (16 if extended else 8)), cluster * (cluster * 8 // bits)
    return Shape(cluster, (table, block, block * (cluster // 8)), tuple(options.items()))


_PLAIN = Shape(4 * KIB, (64 * KIB,))  # of a format without options: pages, and what others call clusters


def _lines(shape: Shape, kinds: tuple[str, ...]) -> SearchStrategy[str]:
    from hypothesis import strategies as st

    sizes = range(0, shape.size + 1, SECTOR)

    def placed(verb: str, after: str = "") -> SearchStrategy[str]:
        def line(offset: int, length: int) -> str:
            return f"{verb} {size_text(offset)} {size_text(min(length, sizes[-1] - offset))}{after}"

        return st.builds(line, st.sampled_from(shape.offsets), st.sampled_from(shape.lengths))

    write, flush = placed("write"), st.just("flush")
    others = [placed("zero"), placed("zero", " unmap")] if "zero" in kinds else []
    others += [placed("discard")] if "discard" in kinds else []
    if "snapshot" in kinds:
        names = st.sampled_from(("s1", "s2"))
        others += [names.map(f"snapshot {verb} {{}}".format) for verb in ("create", "apply", "delete")]
    others += [st.sampled_from(shape.sizes).map(size_text).map("resize {}".format)] if "resize" in kinds else []
    others += [st.just("commit")] if "commit" in kinds else []
    return st.one_of(write, flush, *others, write, flush, *others, write, st.just("reopen"))


def drawn(format: str, kinds: tuple[str, ...], lie: tuple[str, ...] = ()) -> SearchStrategy[Scenario]:
    """Scenarios of at most `MOST` operations: writes, flushes, reopens, and what `kinds` names (of `KINDS`), from an
    image that is fresh, has a snapshot, or a backing file. `lie` as in a scenario's recording."""
    from hypothesis import assume
    from hypothesis import strategies as st

    @st.composite
    def scenarios(draw: Any) -> Scenario:
        backing, shape = None, _PLAIN
        if format == "qcow2":
            shape = _qcow2(
                draw(st.sampled_from(_CLUSTERS)),
                draw(st.booleans()),
                draw(st.sampled_from((16, 64, 1))),
                draw(st.sampled_from(("1.1", "1.1", "1.1", "0.10"))),
                draw(st.booleans()),
            )
            shorter = (shape.reaches[0] if shape.reaches[0] < shape.size else shape.cluster) + SECTOR
            backing = draw(st.sampled_from((None, None, shape.size, shorter)))
        depth = draw(st.sampled_from((1, 4)))
        wanted = tuple(kind for kind in kinds if kind not in shape.refused)
        before = []
        if "snapshot" in wanted and draw(st.sampled_from((False, False, True))):
            before = [f"write 0 {size_text(2 * shape.cluster)}", "snapshot create s0"]
        history = draw(st.lists(_lines(shape, wanted), min_size=1, max_size=MOST))
        drawn_scenario = possible(scenario(format, shape, [*before, *history], depth, backing, lie))
        assume(drawn_scenario.workload.history)
        return drawn_scenario

    return scenarios()


def scenario(
    format: str, shape: Shape, history: list[str], depth: int, backing: int | None = None, lie: tuple[str, ...] = ()
) -> Scenario:
    """The scenario that tries `history` on an image of this shape."""
    return Scenario(
        about="",
        expect="HOLDS",
        format=format,
        size=size_text(shape.size),
        options=dict(shape.options),
        backing=None if backing is None else size_text(backing),
        workload=Workload(depth=depth, history=tuple(history)),
        record=Recording(lie=lie),  # type: ignore[arg-type]
    )


def alphabet(kinds: tuple[str, ...]) -> list[str]:
    """The operations of the systematic mode, for clusters of 4 KiB: a cluster, a part of it, its neighbour, and two
    clusters under two L2 tables."""
    lines = ["write 0 4k", "write 512 512", "write 4k 4k", "write 2044k 8k", "flush", "reopen"]
    lines += ["zero 0 4k", "zero 0 4k unmap"] if "zero" in kinds else []
    lines += ["discard 0 4k"] if "discard" in kinds else []
    lines += [f"snapshot {verb} s1" for verb in ("create", "apply", "delete")] if "snapshot" in kinds else []
    return lines + (["resize 4k", "resize 6M"] if "resize" in kinds else [])


def every(format: str, kinds: tuple[str, ...], longest: int, lie: tuple[str, ...] = ()) -> Iterator[Scenario]:
    """All histories of 1 to `longest` operations over the alphabet that make sense, one request at a time, the
    shortest first."""
    shape = _qcow2(4 * KIB, False, 16, "1.1", False) if format == "qcow2" else Shape(4 * KIB, (2 * MIB,))
    for length in range(1, longest + 1):
        for history in itertools.product(alphabet(kinds), repeat=length):
            tried = scenario(format, shape, list(history), 1, None, lie)
            if possible(tried) == tried:
                yield tried


def operations(history: tuple[str, ...]) -> frozenset[str]:
    """The kinds of operations in a history, beyond writes and flushes: {"zero unmap", "snapshot create"}."""
    kinds = {" ".join(word for word in line.split() if word.isalpha()) for line in history}
    return frozenset(kinds - {"write", "flush"})


def toml(scenario: Scenario) -> str:
    """The scenario as the text of a file."""
    import tomlkit

    keys, plain = msgspec.to_builtins(scenario), msgspec.to_builtins(Scenario(about="", expect="HOLDS"))
    changed = {key: value for key, value in keys.items() if value != plain[key] or key in ("about", "expect")}
    for part in ("record", "explore"):
        if part in changed:
            changed[part] = {key: value for key, value in changed.pop(part).items() if value != plain[part][key]}
    if scenario.errors:
        defaults = msgspec.to_builtins(Errors())
        changed["errors"] = {key: value for key, value in changed["errors"].items() if value != defaults[key]}
    changed.pop("workload", None)
    changed |= {"workload": {"depth": scenario.workload.depth, "history": list(scenario.workload.history)}}
    return tomlkit.dumps(changed)
