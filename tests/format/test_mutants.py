"""Every deliberate fault in Quire's protocol is noticed by the proof, and without it the same proof is content."""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from powercut.crash.store import in_memory
from powercut.verdict import Verdict
from quire import commit
from quire.errors import Busy, Foreign
from quire.layout import BLOCK, CHECKED_RECORDS
from quire.sets import Set
from quire.store import RealStore
from support.errors import ERRORS, with_errors
from support.mutants import MUTANTS, Mutant, plant
from support.quires import HISTORIES, SIZE, one_by_one
from support.shelf import Shelf, both_copies, one_copy

BESIDE = ["write main 0 512", "snapshot main s", "write main 512 512", "flush main"]
Proof = Callable[[Path], "str | None"]

PARENT = ["write main 0 512", "snapshot main s", "write main 0 512", "flush main", "discard main 0 4k", "flush main"]
OVERWRITE = ["write main 0 512", "flush main", "write main 0 512", "flush main"]


def crash(history: Sequence[str], records: str, depth: int = 0, touch: range = range(2)) -> Proof:
    """What is broken after a crash, or None."""

    def proof(folder: Path) -> str | None:
        for outcome in one_by_one(folder, history, CHECKED_RECORDS if records == "C" else 0, depth, touch):
            if outcome.verdict is not Verdict.HOLDS:
                return str([*map(str, outcome.findings[:1]), *outcome.reasons])
        return None

    return proof


def media(check: Callable[[Shelf], object]) -> Proof:
    def proof(folder: Path) -> str | None:
        return next((str(wrong) for wrong in check(Shelf()) if wrong), None)  # type: ignore[attr-defined]

    return proof


def errors(name: str) -> Proof:
    def proof(folder: Path) -> str | None:
        for struck, outcome in with_errors(folder, ERRORS[name], 0, errno.EIO):
            if outcome.verdict is Verdict.BROKEN:
                return f"{struck}: {[*map(str, outcome.findings[:1]), *outcome.reasons]}"
        return None

    return proof


def batch(folder: Path) -> str | None:
    """Records of one entry each: a crash can leave the second of a batch without the first."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(commit, "MAX_ENTRIES", 1)
        lines = ["write main 4k 512", "flush main", "write main 0 512", "discard main 4k 4k", "flush main"]
        return crash(lines, "P", 1, range(8, 10))(folder)


def short(folder: Path) -> str | None:
    """A file cut off in its second copy."""
    store = in_memory()
    with Set.create(store, SIZE, slots=4) as quire:
        leaf = next(iter(quire.manifest.leaves.values()))
    file = store.open(leaf.file, write=True)
    file.truncate(file.size() - BLOCK // 2)
    with Set.open(store) as quire:
        try:
            quire.image("main")
        except OSError:
            return None
    return "a file that was cut off opens"


def writers(folder: Path) -> str | None:
    store = RealStore(folder)
    with Set.create(store, SIZE):
        try:
            Set.open(RealStore(folder), write=True).close()
        except Busy:
            return None
    return "two writers"


def base(folder: Path) -> str | None:
    for name in ("golden", "vm"):
        (folder / name).mkdir()
    with Set.create(RealStore(folder / "golden"), SIZE) as quire:
        quire.snapshot("main", "s")
    Set.create(RealStore(folder / "vm"), base="../golden", snapshot="s").close()
    (folder / "golden").rename(folder / "old")
    (folder / "golden").mkdir()
    Set.create(RealStore(folder / "golden"), SIZE).close()
    with Set.open(RealStore(folder / "vm")) as quire:
        try:
            quire.image("main")
        except Foreign as error:
            return None if error.what.startswith("is set ") else "refused for another reason"
    return "another set was taken for the base"


PROOFS: dict[str, Proof] = {
    "over a parent, P": crash(PARENT, "P"),
    "over a parent, C": crash(PARENT[:4], "C"),
    "over a parent, recovery, C": crash(PARENT[:4], "C", 1),
    "overwrite, P": crash(OVERWRITE, "P"),
    "overwrite, C": crash(OVERWRITE, "C"),
    "race to the same block, C": crash(["write main 0 512", "race main 0 512", "flush main"], "C"),
    "race to another block, P": crash(["write main 0 512", "race main 4k 512", "flush main"], "P"),
    "race to another block, C": crash(["write main 0 512", "race main 4k 512", "flush main"], "C"),
    "race to a discarded block, P": crash(
        ["write main 0 512", "flush main", "discard main 0 4k", "race main 0 512", "flush main"], "P"
    ),
    "beside a parent's data, P": crash(
        ["write main 0 512", "snapshot main s", "write main 512 512", "flush main"], "P"
    ),
    "cut and grown, P": crash(["write main 8k 512", "resize main 4k", "resize main 16k", "snapshot main s"], "P"),
    "recovery, C": crash(["write main 0 512", "flush main"], "C", 1),
    "a batch cut in two, P": batch,
    "killed, C": crash(HISTORIES["killed"], "C"),
    "checkpoint, P": crash(HISTORIES["checkpoint"], "P"),
    "checkpoint, C": crash(HISTORIES["checkpoint"], "C"),
    "tree, P": crash(HISTORIES["tree"], "P"),
    "revert, P": crash(HISTORIES["revert"], "P"),
    "one copy": media(one_copy),
    "both copies": media(lambda shelf: (wrong for _, wrong in both_copies(shelf))),
    "errors, data": errors("data"),
    "errors, tree": errors("tree"),
    "a short file": short,
    "two writers": writers,
    "a wrong base": base,
}
_killed: set[str] = set()


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_is_killed(tmp_path, planted, mutant: Mutant):
    with pytest.MonkeyPatch.context() as patch:
        plant(mutant, patch)
        try:
            why = PROOFS[mutant.proof](tmp_path)
        except (OSError, AssertionError) as error:  # it did not even get through the history
            why = f"{type(error).__name__}: {error}"
    planted(f"quire: {mutant.name}", why is not None)
    assert why is not None
    _killed.add(mutant.name)


def controls():
    """The proofs that are not tests of their own elsewhere (test_crash, test_media, test_errors); those of crashes in
    recoveries take longer."""
    for proof in sorted({mutant.proof for mutant in MUTANTS}):
        if proof.split(",")[0] not in {*HISTORIES, "one copy", "both copies", "errors"}:
            long = "recovery" in proof or "batch" in proof
            yield pytest.param(proof, marks=pytest.mark.slow if long else ())


@pytest.mark.parametrize("proof", list(controls()))
def test_control_without_a_mutant_the_proof_is_content(tmp_path, proof):
    assert PROOFS[proof](tmp_path) is None


def test_the_score(figure):
    figure("quire, mutants killed", f"{len(_killed)}/{len(MUTANTS)}")
    assert len(MUTANTS) >= 30
