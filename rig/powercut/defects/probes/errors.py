"""Each request to the file fails once, or it and every later write do; the driver goes on.

The guest may see errors. The image must not be damaged (leaks are legal), and whatever the guest was told is done must
be there after an orderly close.
"""

from __future__ import annotations

import errno
from pathlib import Path

from powercut.defects.probes import Trouble
from powercut.defects.probes.loops import Wrong, verify_content, verify_structure
from powercut.errors import InputError
from powercut.formats.qcow2.driver.host import Failing, MemoryFile
from powercut.formats.qcow2.driver.practice import Practice
from powercut.recording import modelled
from powercut.recording.operations import operations
from powercut.scenario import Scenario, parse_size

_MOST = 24  # requests of a scenario that are made to fail, spread evenly


def judge(scenario: Scenario, practice: Practice, scratch: Path) -> Trouble | None:
    """What is wrong after some request failed."""
    count, _ = _run(scenario, practice, -1, False)
    for at in range(0, count, max(1, -(-count // _MOST))):
        for full in (False, True):
            _, trouble = _run(scenario, practice, at, full)
            if trouble is not None:
                how = "and every later write fail: the disk is full" if full else "fails once"
                return Trouble(f"request {at} to the file {how}; then {trouble}")
    return None


def _run(scenario: Scenario, practice: Practice, at: int, full: bool) -> tuple[int, str | None]:
    """How many requests there were, and what is wrong in the end."""
    backing = None if scenario.backing is None else modelled.Stamped(parse_size(scenario.backing))
    file = MemoryFile(modelled.new_image(scenario))
    failing = Failing(file, at, full, errno.ENOSPC if full else errno.EIO)
    orderly = False
    try:
        drive = modelled.Drive(failing, practice, backing, scenario)
        for number, operation in enumerate(operations(scenario), 1):
            drive.one(number, operation)
        drive.close()
        orderly = True
    except OSError:
        pass  # of what the host did to the image, or its close: it is left as a killed process would leave it
    except InputError as error:
        return failing.asked, str(error)
    try:
        verify_structure(file, leaks=False)
        if orderly:
            verify_content(file, practice, drive)
    except (Wrong, InputError) as wrong:
        return failing.asked, str(wrong)
    return failing.asked, None
