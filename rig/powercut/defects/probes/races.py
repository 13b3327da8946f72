"""Several requests at once, completed in orders drawn from seeds; after each orderly close, the look of the loops."""

from __future__ import annotations

from pathlib import Path

import msgspec

from powercut.defects.probes import Trouble, loops
from powercut.formats.qcow2.driver.practice import Practice
from powercut.scenario import Scenario

_SEEDS, _DEPTH = 3, 8


def judge(scenario: Scenario, practice: Practice, scratch: Path) -> Trouble | None:
    """What is wrong after some interleaving."""
    for seed in range(_SEEDS):
        workload = msgspec.structs.replace(scenario.workload, depth=_DEPTH, seed=seed)
        trouble = loops.judge(msgspec.structs.replace(scenario, workload=workload), practice, scratch)
        if trouble is not None:
            return trouble
    return None
