"""An overlay committed into its backing file: both files are recorded, and crash together."""

from __future__ import annotations

import msgspec
import pytest

from powercut import fuzz
from powercut.errors import InputError
from powercut.recording import record
from powercut.recording.operations import operations
from powercut.scenario import Recording, from_options
from powercut.verdict import Verdict
from support.qemu import needs_qemu


def scenario(*history: str, backing: str = "256k"):
    options = {"about": "", "expect": "HOLDS", "size": "256k", "backing": backing}
    return from_options(options | {"workload": {"depth": 1, "history": list(history)}})


COMMITTED = scenario("write 0 64k", "flush", "commit", "write 128k 64k", "flush", "commit")


@needs_qemu
@pytest.mark.parametrize("backing", ["256k", "320k"])
def test_a_commit_loses_nothing(backing):
    seen, _ = fuzz.look(msgspec.structs.replace(COMMITTED, backing=backing))
    assert seen.verdict is Verdict.HOLDS, seen


@needs_qemu
def test_a_backing_file_whose_flushes_lie_is_found(monkeypatch, planted):
    """Only what was written into the backing file may be lost, and the overlay is empty by then."""
    served = record._served

    def lying(path, writer, file, told):
        lie = Recording(lie=("flush",)) if path.name == "base" else Recording()
        return served(path, writer, file, msgspec.structs.replace(told, record=lie))

    monkeypatch.setattr(record, "_served", lying)
    seen, outcome = fuzz.look(COMMITTED)
    planted("flushes of a backing file that lied at a commit", seen.verdict is Verdict.BROKEN)
    assert seen.verdict is Verdict.BROKEN
    assert {rule for rule, _ in seen.broken} == {"acknowledged"}, outcome


@pytest.mark.parametrize(
    ("history", "backing", "says"),
    [
        (["commit"], "128k", "cannot grow"),
        (["resize 512k", "commit"], "256k", "cannot grow"),
        (["commit", "resize 64k"], "256k", "after a commit"),
        (["snapshot create s", "commit", "snapshot apply s"], "256k", "after a commit"),
    ],
)
def test_what_cannot_be_committed_or_judged_is_refused(history, backing, says):
    with pytest.raises(InputError, match=says):
        operations(scenario(*history, backing=backing))
    operations(scenario("commit", "snapshot create s", "snapshot delete s"))
