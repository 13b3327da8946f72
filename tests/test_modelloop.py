"""The loop of 2009 on the model of the driver, served over NBD: the header goes, and the story says when and why."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from powercut.defects import modelloop
from powercut.errors import EnvironmentFault
from powercut.guest.kernel import kernel
from powercut.report import modelloop as report
from powercut.scenario import Scenario, from_options


def scenario(guest: str, defects: list[str], era: str = "April 2009", **others: Any) -> Scenario:
    old = {"cluster_size": "4k", "compat": "0.10"} if era != "today" else {"cluster_size": "4k"}
    model = {"era": era, "defects": defects, "guest": guest, **others}
    described = {"about": "", "expect": "BROKEN", "size": "1M", "options": old, "model": model}
    return from_options({**described, "workload": {"operations": 60}})


def check_story(outcome: modelloop.Outcome) -> None:
    assert outcome.word == "BROKEN"
    assert outcome.fell is not None
    assert outcome.gone is not None
    assert outcome.fell < outcome.gone, "the damage comes a loop before what the guest sees of it"
    told = report.text(outcome)
    assert re.search(rf"loop {outcome.fell}: the refcount of cluster 0, .* falls to 0 by a write of .* made for ", told)
    assert "offset 0x80000000000000, far behind the end of the file: 0x8000 with its bytes in reverse" in told
    assert re.search(rf"loop {outcome.gone}: the header is overwritten by a write of 4,096 bytes at 0x0", told)
    assert "at offset 0 lies an L2 table" in told
    assert report.document(outcome)["header_gone"] == outcome.gone


def test_the_header_goes_and_the_story_says_when_and_why(planted: Callable[[str, bool], None]) -> None:
    outcome = modelloop.Loops(scenario("client", ["l2-free-unswapped"])).run()
    planted("2009: loops over NBD", outcome.gone is not None)
    check_story(outcome)


@pytest.mark.parametrize("era", ["April 2009", "today"])
def test_without_the_defect_every_loop_is_clean(era: str) -> None:
    outcome = modelloop.Loops(scenario("client", [], era, loops=4)).run()
    assert (outcome.word, outcome.story, outcome.loops) == ("CLEAN", [], 4)
    assert "0 of 4 loops failed" in outcome.why


@pytest.mark.guest
def test_the_same_with_a_real_guest(planted: Callable[[str, bool], None]) -> None:
    try:
        kernel()
    except EnvironmentFault as fault:
        pytest.skip(str(fault))
    outcome = modelloop.Loops(scenario("machine", ["l2-free-unswapped"], loops=20)).run()
    planted("2009: loops of a real guest", outcome.gone is not None)
    check_story(outcome)
