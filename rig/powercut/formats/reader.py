"""What is the same for every format when a guest's sectors are judged: where they are read from, as arrays.

A format says for runs of guest sectors from which host sectors they are read; this module compares all that
those may hold with what the guest was promised, and proves or dismisses each suspicion on a decided disk.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from powercut.crash.contents import Contents
from powercut.crash.disk import Deciding
from powercut.crash.explore import Report
from powercut.formats import Recording
from powercut.oracles.acknowledged import Locate, confirm

Sectors = NDArray[np.int64]


def suspects(recording: Recording, contents: Contents, at: Sectors, host: Sectors) -> Sectors:
    """The guest sectors of `at` for which some content that their `host` sector in `contents` may have is illegal."""
    assert recording.promise is not None
    index, op, stamped = contents.candidates(host, recording.tokens)
    legal = recording.promise.legal(at[index], op, stamped)
    return np.unique(at[index[~legal]])


def prove(
    recording: Recording,
    disk: Deciding,
    sectors: Sectors,
    locate: Locate,
    report: Report,
    enough: Callable[[str], bool],
) -> None:
    """Judge each suspected guest sector by itself, for every way the reads that lead to it can turn out."""
    promise = recording.promise
    assert promise is not None

    for sector in sectors.tolist():

        def part(sector: int = sector) -> None:
            problem = confirm(promise, sector, locate)
            if problem is not None:
                report(problem)

        if enough("acknowledged"):
            return
        disk.explore(part)
