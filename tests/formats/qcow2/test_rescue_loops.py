"""The loops of 2009 on the model of the driver, `savevm; quit`, until the header is gone: every VM state comes back."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

from formats.qcow2.images import needs_qemu, qemu_check
from powercut.formats.qcow2.driver import snapshots
from powercut.formats.qcow2.driver.create import create
from powercut.formats.qcow2.driver.host import MemoryFile, run
from powercut.formats.qcow2.driver.opening import open_image
from powercut.formats.qcow2.driver.practice import Era, Practice
from powercut.inspection import inspect
from powercut.rescue import Known, rescue

OF_2009 = Practice(Era.APRIL_2009, frozenset({"l2-free-unswapped"}))


def loops(states: list[bytes]) -> bytes:
    file = MemoryFile(create(1 << 20, cluster_bits=12, version=2))
    for number, state in enumerate(states):
        image = run(open_image(OF_2009), file)
        for at in range(0, len(state), 32768):
            run(image.write_vmstate(at, state[at : at + 32768]), file)
        run(snapshots.create(image, f"x{number}", len(state)), file)
        run(image.close(), file)
    return bytes(file.content)


@needs_qemu
def test_every_vm_state_comes_back(tmp_path: Path, planted: Callable[[str, bool], None]) -> None:
    """121, 121 and 122 clusters, as measured. Two entries of the table over the header are the header's fields."""
    states = [random.Random(loop).randbytes(clusters * 4096) for loop, clusters in enumerate((121, 121, 122))]
    path, saved = tmp_path / "a.qcow2", tmp_path / "saved.qcow2"
    path.write_bytes(loops(states))
    told = inspect(str(path), None)
    assert "an L2 table: 122 entries" in told.text
    assert "bytes 60 to 71 hold the snapshot count 3 and offset 0x177000" in told.text
    result = rescue(str(path), str(saved), Known(size=1 << 20))
    assert result.exit_code == 0, result.text
    assert result.text.count("overwritten entry") == 2
    assert qemu_check(saved).exit_code == 0
    file = MemoryFile(saved.read_bytes())
    for number, state in enumerate(states):
        image = run(open_image(), file)
        run(snapshots.apply(image, f"x{number}"), file)
        found = run(image.read_vmstate(0, len(state)), file)
        assert found == state, f"x{number}"
        run(image.close(), file)
    planted("the loops of 2009: a VM state over the header", True)
