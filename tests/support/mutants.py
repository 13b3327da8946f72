"""Deliberate faults in Quire's protocol. Each is a change of a few characters in one function, made for one test.

`proof` names what has to notice it (see test_mutants.py).
"""

from __future__ import annotations

import importlib
import inspect
import sys
import textwrap
from typing import Any, NamedTuple

import pytest


class Mutant(NamedTuple):
    """In `where` ("module:name" or "module:Class.name"), `old` becomes `new`."""

    name: str
    where: str
    old: str
    new: str
    proof: str


FLUSH, APPEND = "quire.commit:Commit.flush", "quire.commit:Commit._append"
LOAD, SAVE = "quire.journal:Journal.load", "quire.pages:MapPages.save"

MUTANTS = [
    # ---- a flush
    Mutant(
        "data is not synced before its P record",
        FLUSH,
        "self.file.sync()\n                    self._write_pending",
        "self._write_pending",
        "over a parent, P",
    ),
    Mutant("a record is not synced", APPEND, "self.file.sync()\n", "pass\n", "overwrite, C"),
    Mutant("a P record is not synced", APPEND, "self.file.sync()\n", "pass\n", "overwrite, P"),
    Mutant("checks of what was there before", FLUSH, "self._checks(pending))", "[1] * len(pending))", "overwrite, C"),
    Mutant(
        "writes to a block go on while its record syncs",
        FLUSH,
        "self._unproven |= data or set()",
        "pass",
        "race to the same block, C",
    ),
    Mutant(
        "a block of the unproven tail is written without a mark",
        "quire.commit:Commit.unproven",
        "tail = self._unproven",
        "tail: set[int] = set()",
        "overwrite, C",
    ),
    Mutant(
        "the mark is not synced before the write it allows",
        "quire.commit:Commit.prove",
        "self._append(M, [[]])",
        "self.journal.write(M), self._unproven.clear()",
        "overwrite, C",
    ),
    Mutant(
        "a flush borrows a sync that began before it",
        FLUSH,
        "self._synced = mark",
        "self._synced = self.writes",
        "race to another block, P",
    ),
    Mutant(
        "the same with C records",
        FLUSH,
        "self._synced = mark",
        "self._synced = self.writes",
        "race to another block, C",
    ),
    Mutant(
        "a flush forgets what it did not commit",
        "quire.commit:Commit.change",
        "self._touched.append((start, count))",
        "pass",
        "overwrite, P",
    ),
    Mutant(
        "a punch is not cancelled by a later write",
        "quire.commit:Commit._punch",
        "if state == ZERO:",
        "if True:",
        "race to a discarded block, P",
    ),
    Mutant(
        "a discarded block shows the parent again",
        "quire.leaf:Leaf.zero",
        "self.change(start, count, ZERO)",
        "self.change(start, count, PARENT)",
        "over a parent, P",
    ),
    Mutant(
        "the rest of a new block is not taken along",
        "quire.leaf:Leaf._filled",
        "bytes(self.read(begin, inside))",
        "bytes(inside)",
        "beside a parent's data, P",
    ),
    Mutant(
        "a longer leaf below a shorter one shows through",
        "quire.below:Below.__init__",
        "list(itertools.accumulate((size for _, size in layers), min))",
        "[1 << 60 for _ in layers]",
        "cut and grown, P",
    ),
    # ---- opening
    Mutant(
        "a C that is the tail is not verified",
        "quire.commit:Commit._verified",
        "if said != seen",
        "if False",
        "over a parent, C",
    ),
    Mutant(
        "a tail that was not verified is marked as proven",
        "quire.commit:Commit.resolve",
        "self._append(R, [self._dropped])",
        "self._append(M, [[]])",
        "over a parent, recovery, C",
    ),
    Mutant(
        "what was dropped is applied again",
        "quire.commit:Commit.replay",
        "if following is None or following.kind == R else",
        "if following is None else",
        "over a parent, recovery, C",
    ),
    Mutant(
        "nothing is said about the tail when opening", "quire.leaf:Leaf.open", "leaf.resolve()", "pass", "recovery, C"
    ),
    Mutant(
        "a record need not know the one before it",
        LOAD,
        "if one and one[0].previous == expected",
        "if one",
        "a batch cut in two, P",
    ),
    Mutant(
        "what a killed program left in the cache is trusted",
        "quire.leaf:Leaf.open",
        "file.sync()\n                file.drop_cache()",
        "file.drop_cache()",
        "killed, C",
    ),
    Mutant("a lost record is not missed", LOAD, "if prefix.generation > number]", "if False]", "both copies"),
    Mutant(
        "closing does not prove the tail",
        "quire.commit:Commit.finish",
        "if self.journal.kind != M:",
        "if False:",
        "both copies",
    ),
    Mutant(
        "a file that is too short is not noticed",
        "quire.identity:Identity.check",
        "file.size() != place.end",
        "False",
        "a short file",
    ),
    # ---- copies
    Mutant(
        "records are written once",
        "quire.journal:Journal.write",
        "for copy in (0, 1):",
        "for copy in (0,):",
        "one copy",
    ),
    Mutant(
        "the second copy of the journal is never read",
        LOAD,
        "[self._slots(copy) for copy in (0, 1)]",
        "[self._slots(0), {}]",
        "one copy",
    ),
    Mutant(
        "bad copies are not rewritten", "quire.leaf:Leaf.repair", "self.file.write(offset, raw)", "pass", "one copy"
    ),
    Mutant(
        "checksums are not verified",
        "quire.layout:read_page",
        "prefix.checksum == checksum(memoryview(raw)[8:])",
        "True",
        "one copy",
    ),
    Mutant("the older copy of a page counts", "quire.pages:_choose", "max(good, key", "min(good, key", "one copy"),
    Mutant(
        "a map page older than the index says is believed",
        "quire.pages:_load_map",
        "if prefix.generation < found.generations[number]:",
        "if False:",
        "both copies",
    ),
    # ---- the checkpoint
    Mutant(
        "both copies of the map in one sync",
        SAVE,
        "file.write(place.map(number, 0), raw)\n        file.sync()",
        "file.write(place.map(number, 0), raw)",
        "checkpoint, P",
    ),
    Mutant(
        "no checkpoint", "quire.commit:Commit._checkpoint", "self._pages.save(", "print if 1 else (", "checkpoint, C"
    ),
    Mutant("slots are used again too early", APPEND, "> self.place.slots:", "> self.place.slots + 1:", "checkpoint, C"),
    Mutant(
        "the map forgets what a record changed",
        "quire.commit:Commit._apply",
        "self._dirty.update(pages_of(start, count))",
        "pass",
        "checkpoint, C",
    ),
    # ---- the tree
    Mutant(
        "both copies of the manifest before a sync",
        "quire.copies:Copies.save",
        "for file in self._files:\n                file.write(0, raw)\n                file.sync()",
        "for file in self._files:\n                file.write(0, raw)\n"
        "            for file in self._files:\n                file.sync()",
        "tree, P",
    ),
    Mutant(
        "a manifest is acknowledged after one copy",
        "quire.copies:Copies.save",
        "for file in self._files:\n                file.write",
        "for file in self._files[:1]:\n                file.write",
        "one copy",
    ),
    Mutant("the older manifest counts", "quire.copies:Copies._open", "max(good, key", "min(good, key", "one copy"),
    Mutant(
        "the directory is not synced before the manifest",
        "quire.sets:Set._save_or_remove",
        "self.store.sync_dir()\n",
        "pass\n",
        "tree, P",
    ),
    Mutant(
        "a new leaf is not synced before the manifest",
        "quire.leaf:Leaf.create",
        "file.sync()\n            journal.synced()",
        "journal.synced()",
        "tree, P",
    ),
    Mutant("a snapshot without a flush", "quire.sets:Set._paused", "image.leaf.finish()", "pass", "tree, P"),
    Mutant(
        "files go before the manifest says so",
        "quire.sets:Set._save",
        "there = set(self.store.names())",
        "[self.store.unlink(i.file) for i in manifest.dead]; there = {i.file for i in manifest.dead}",
        "revert, P",
    ),
    Mutant(
        "the dead are not listed",
        "quire.manifest:Manifest.collected",
        "dead = self.dead | {",
        "dead = self.dead & {",
        "revert, P",
    ),
    Mutant("what a crash left stays", "quire.strangers:remove", "store.unlink(name)", "pass", "tree, P"),
    Mutant(
        "writing goes on in the old head after a manifest failed",
        "quire.sets:Set._save",
        "image.leaf.stop(",
        "print if 1 else (",
        "errors, tree",
    ),
    Mutant(
        "a failed sync is tried again",
        "quire.commit:Commit._no_way_back",
        "self._stopped = f",
        "_ = f",
        "errors, data",
    ),
    Mutant("a second writer is let in", "quire.writer:take", "if not file.lock():", "if False:", "two writers"),
    Mutant(
        "a base is taken for another",
        "quire.sets:Set._base",
        "if base.manifest.set != of:",
        "if False:",
        "a wrong base",
    ),
]


def plant(mutant: Mutant, patch: pytest.MonkeyPatch) -> None:
    """Change the function, until `patch` is undone."""
    module_name, _, path = mutant.where.partition(":")
    module = importlib.import_module(module_name)
    *owner_path, name = path.split(".")
    owner: Any = module
    for part in owner_path:
        owner = getattr(owner, part)
    found = inspect.getattr_static(owner, name)
    source = textwrap.dedent(inspect.getsource(inspect.unwrap(getattr(found, "__func__", found))))
    old, new = (textwrap.dedent(text) for text in (mutant.old, mutant.new))
    if owner_path:  # a method's lines stood four spaces further in
        old, new = (text.replace("\n    ", "\n") for text in (mutant.old, mutant.new))
    assert source.count(old) >= 1, f"{mutant.name}: {mutant.where} does not contain {old!r}"
    scope: dict[str, Any] = {}
    exec(compile(source.replace(old, new, 1), f"<mutant of {mutant.where}>", "exec"), vars(module), scope)
    if owner_path:
        patch.setattr(owner, name, scope[name])
        return
    for other in [m for n, m in sys.modules.items() if n.partition(".")[0] == "quire"]:  # whoever imported it by name
        if getattr(other, name, None) is found:
            patch.setattr(other, name, scope[name])
