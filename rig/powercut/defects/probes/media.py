"""One sector of the refcounts is lost (it reads as zeros); the driver goes on, in another run.

What is in use then looks free, and no driver can know better. But the header must survive: a driver that is offered
cluster 0 has been told that something is wrong.
"""

from __future__ import annotations

from pathlib import Path

from powercut.defects.probes import Trouble
from powercut.errors import InputError
from powercut.formats.qcow2 import layout as q
from powercut.formats.qcow2.driver.host import MemoryFile, run
from powercut.formats.qcow2.driver.opening import open_image
from powercut.formats.qcow2.driver.practice import Practice
from powercut.formats.qcow2.header import read_header
from powercut.recording import modelled
from powercut.recording.operations import operations
from powercut.scenario import Scenario, parse_size

_WRITTEN = 4  # clusters at the end of the disk, after the damage


def judge(scenario: Scenario, practice: Practice, scratch: Path) -> Trouble | None:
    """What becomes of the header."""
    backing = None if scenario.backing is None else modelled.Stamped(parse_size(scenario.backing))
    file = MemoryFile(modelled.new_image(scenario))
    try:
        modelled.Drive(file, practice, backing, scenario).all(operations(scenario))
        image = run(open_image(practice, backing), file)
    except (OSError, InputError):
        return None  # found in other ways
    for block in image.refcounts.table:
        for sector in range(block, block + image.cluster, q.SECTOR) if block else ():
            damaged = MemoryFile(bytes(file.content))
            damaged.content[sector : sector + q.SECTOR] = bytes(q.SECTOR)
            _go_on(damaged, practice, image.size, image.cluster)
            if read_header(damaged).header is None:
                return Trouble(f"refcounts at {sector:#x} read as zeros; then the header is overwritten")
    return None


def _go_on(file: MemoryFile, practice: Practice, size: int, cluster: int) -> None:
    try:
        image = run(open_image(practice), file)
        for number in range(1, _WRITTEN + 1):
            run(image.write((size - number * cluster) // q.SECTOR * q.SECTOR, b"x" * q.SECTOR), file)
        run(image.close(), file)
    except (OSError, InputError):
        return
