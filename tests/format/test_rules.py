"""Each rule that the judge applies is broken once on purpose, and the judge says so by its name."""

from __future__ import annotations

from typing import Any

import pytest

from powercut.formats.quire.judge import RULES
from quire.layout import BLOCK
from quire.leaf import Leaf
from support.mutants import MUTANTS, Mutant, plant
from support.quires import HISTORIES, RECORDS, explored

OVERWRITE = ["write main 0 512", "flush main", "write main 0 512", "flush main"]
SNAPSHOT = ["write main 0 512", "snapshot main s", "write main 0 512", "flush main"]


class Swapped:
    """A leaf's file whose first two blocks have changed places."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def read(self, offset: int, length: int) -> bytes:
        data: bytes = self._file.read(_other(offset), length)
        return data

    def write(self, offset: int, data: Any) -> None:
        self._file.write(_other(offset), data)


def _other(offset: int) -> int:
    return offset ^ BLOCK if offset < 2 * BLOCK else offset


def swap(patch: pytest.MonkeyPatch) -> None:
    begin = Leaf.__init__
    patch.setattr(Leaf, "__init__", lambda leaf, file, *rest: begin(leaf, Swapped(file), *rest))


MORE = [
    Mutant(
        "a rename in two steps",
        "quire.sets:Set.rename",
        "self._save(",
        "self._save(self.manifest.without_name(old)); self._save(",
        "",
    ),
    Mutant("a manifest may be short", "quire.copies:_good", "if len(first) < PREFIX.itemsize:", "if False:", ""),
]
FAULTS: dict[str, tuple[str, list[str], str]] = {  # rule: mutant, history, records
    "opens": ("no checkpoint", HISTORIES["checkpoint"], "C"),
    "atomic-tree": ("a rename in two steps", HISTORIES["tree"], "P"),
    "acknowledged": ("a record is not synced", OVERWRITE, "C"),
    "immutable": ("a P record is not synced", SNAPSHOT, "P"),
    "no-leak": ("what a crash left stays", HISTORIES["tree"], "P"),
    "detects": ("a manifest may be short", OVERWRITE, "P"),
    "refuses": ("a second writer is let in", OVERWRITE, "C"),
    "repairs": ("bad copies are not rewritten", OVERWRITE, "C"),
}


@pytest.mark.parametrize("rule", [*FAULTS, "identity"])
def test_a_rule_is_broken_by_name(tmp_path, planted, rule):
    with pytest.MonkeyPatch.context() as patch:
        if rule == "identity":
            swap(patch)
            history, records = OVERWRITE, "C"
        else:
            name, history, records = FAULTS[rule]
            plant(next(mutant for mutant in MUTANTS + MORE if mutant.name == name), patch)
        outcome = explored(tmp_path, history, RECORDS[records])
    broken = {found.problem.rule for found in outcome.findings}
    planted(f"quire: rule {rule}", rule in broken)
    assert rule in broken, (broken, outcome.reasons)


def test_every_rule_has_a_fault():
    assert set(RULES) == {*FAULTS, "identity"}
