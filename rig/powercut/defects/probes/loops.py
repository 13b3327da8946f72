"""Run, close, look, open again: what `powercut loop` does with a guest, on the model and in this process.

After each orderly close the image must be clean, leaks included, and its content what was written.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from powercut import stamp
from powercut.defects.probes import Trouble
from powercut.disk import Bytes
from powercut.errors import InputError
from powercut.formats.qcow2.check import check
from powercut.formats.qcow2.driver.host import File, MemoryFile, run
from powercut.formats.qcow2.driver.opening import open_image
from powercut.formats.qcow2.driver.practice import Practice
from powercut.recording import modelled
from powercut.recording.histories import MIB
from powercut.recording.operations import operations
from powercut.scenario import Scenario, parse_size
from powercut.stamp import SECTOR, ZERO

_COMPARED = 4 * MIB  # bytes of the guest's disk


class Wrong(Exception):
    """Something is wrong."""


def judge(scenario: Scenario, practice: Practice, scratch: Path) -> Trouble | None:
    """What is wrong after one of the scenario's closes, or while it runs."""
    backing = None if scenario.backing is None else modelled.Stamped(parse_size(scenario.backing))
    file = MemoryFile(modelled.new_image(scenario))

    def closed() -> None:
        verify_structure(file)
        verify_content(file, practice, drive)

    drive = modelled.Drive(file, practice, backing, scenario, closed=closed)
    try:
        drive.all(operations(scenario))
    except (Wrong, InputError) as wrong:
        return Trouble(str(wrong))
    except OSError as error:
        return Trouble(f"the driver fails: {error.strerror}")
    return None


def verify_structure(file: MemoryFile, *, leaks: bool = True) -> None:
    """The image is clean. Raises Wrong."""
    result = check(file, trust_dirty=leaks)
    if result.problems:
        raise Wrong(f"structure: {result.problems[0].text}")
    if leaks and result.leaks:
        raise Wrong(f"leaks: {result.leaks} clusters after an orderly close")


def verify_content(file: File, practice: Practice, drive: modelled.Drive) -> None:
    """The guest reads what it wrote. Raises Wrong, and InputError if the image cannot be opened."""
    content = drive.content
    size = min(content.size, _COMPARED)
    image = run(open_image(practice, drive.image.backing), file)
    raw: Bytes = np.frombuffer(run(image.read(0, size), file), dtype=np.uint8)
    found = stamp.decode(raw.reshape(-1, SECTOR))
    count = size // SECTOR
    good = found.op == content.op[:count]
    good &= (found.op == ZERO) | (found.sector == np.arange(count))
    good |= content.hint[:count] & (found.op == ZERO)
    good |= drive.uncertain[:count]
    if not good.all():
        sector = int(np.flatnonzero(~good)[0])
        held, wanted = (_words(int(op[sector])) for op in (found.op, content.op))
        raise Wrong(f"content: guest sector {sector} holds {held}, not {wanted}")


def _words(op: int) -> str:
    return "zeros" if op == ZERO else "bytes that no operation wrote" if op < 0 else f"what operation {op} wrote"
