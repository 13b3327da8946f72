"""What a resize cuts off is judged no more; what comes back when the disk grows again may be as it was."""

from __future__ import annotations

import pytest

from powercut import fuzz
from powercut.scenario import from_options
from powercut.verdict import Verdict
from support.qemu import needs_qemu

pytestmark = needs_qemu


@pytest.mark.parametrize("backing", [None, "128k"])
@pytest.mark.parametrize(
    "history",
    [
        ["write 0 64k", "resize 65024", "flush"],
        ["write 0 64k", "flush", "resize 65024", "flush", "resize 128k", "flush"],
        ["write 0 64k", "resize 65024", "resize 256k", "write 64k 128k", "flush"],
    ],
)
def test_smaller_and_larger_again(history, backing, planted):
    options = {"about": "", "expect": "HOLDS", "size": "128k", "backing": backing}
    options["workload"] = {"depth": 1, "history": history}
    assert fuzz.look(from_options(options))[0].verdict is Verdict.HOLDS
    lied = fuzz.look(from_options(options | {"record": {"lie": ["flush"]}}))[0].verdict
    planted(f"flushes that lied around a resize, backing {backing}", lied is Verdict.BROKEN)
    assert lied is Verdict.BROKEN
