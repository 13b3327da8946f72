"""Errors below the disk of a real guest: werror decides who hears of them, and nothing is lost but what is ignored."""

from __future__ import annotations

import pytest

from powercut.faults import sweep
from powercut.faults.blkdebug import Injection
from powercut.faults.injection import Case
from powercut.faults.powered import PoweredRig
from powercut.faults.target import Target
from powercut.guest.workload import Operation
from powercut.trace import Kind
from powercut.verdict import Verdict
from support.guests import hardware

pytestmark = pytest.mark.guest
SIZE = 8 << 20
HISTORY = (Operation(Kind.WRITE, 0, 4096), Operation(Kind.WRITE, 65536, 8192), Operation(Kind.FLUSH))


@pytest.mark.parametrize(
    ("werror", "error", "heard", "stopped"),
    [
        ("report", "EIO", 1, 0),
        ("stop", "EIO", 0, 1),
        ("enospc", "EIO", 1, 0),
        ("enospc", "ENOSPC", 0, 1),
        ("ignore", "EIO", 0, 0),
    ],
)
def test_werror_decides_who_hears_of_an_error(werror, error, heard, stopped, planted):
    hardware()
    with PoweredRig(Target("raw", SIZE), werror) as rig:
        ran = rig.run(Case(HISTORY, Injection("pwritev", 2, error)))
    assert (ran.seen.errors, ran.seen.stops, ran.seen.given_up) == (heard, stopped, [])
    if werror == "ignore":
        planted("werror=ignore: an error that nobody hears of", ran.faults != [])
        assert [fault.kind for fault in ran.faults] == ["reopened-zeros"]
    else:
        assert ran.faults == []


def test_an_error_for_good_ends_in_time_and_loses_nothing_that_was_flushed():
    hardware()
    history = (HISTORY[0], HISTORY[2], HISTORY[1], HISTORY[2])
    for werror in ("report", "stop"):
        with PoweredRig(Target("qcow2", SIZE), werror) as rig:
            flushed = rig.count(history[:2], "pwritev")
            ran = rig.run(Case(history, Injection("pwritev", flushed + 1, "EIO", None)))
            assert ran.opened
            assert ran.faults == []
            assert (ran.seen.stops > 0) == (werror == "stop")


def test_the_sweep_takes_a_machine():
    hardware()
    work = {"depth": 1, "history": ["write 0 4k", "flush"]}
    errors = {"event": "pwritev", "werror": "enospc", "error": ["ENOSPC"], "lasting": ["once"]}
    result = sweep.run(sweep.scenario_of("raw", {}, size="8M", workload=work, errors=errors))
    assert (result.verdict, result.runs, result.stopped, result.absorbed) == (Verdict.HOLDS, 2, 1, 1)
