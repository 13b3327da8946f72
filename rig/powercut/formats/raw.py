"""raw: guest sector n is host sector n. There is no metadata to break, so only `acknowledged` can."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from powercut.crash.disk import Deciding
from powercut.crash.explore import Report
from powercut.disk import Disk
from powercut.formats import Recording
from powercut.formats.reader import prove, suspects
from powercut.stamp import SECTOR


class Raw:
    """A raw image. Source: none is needed; it has no structure."""

    def __init__(self, recording: Recording) -> None:
        self._recording = recording
        self._fresh = True

    @staticmethod
    def host_size(size: int) -> int:
        return size

    @staticmethod
    def roles(disk: Disk) -> Callable[[int], str]:
        return lambda offset: f"guest data at sector {offset // SECTOR}"

    def judge(self, disk: Deciding, report: Report, enough: Callable[[str], bool]) -> None:
        promise, image = self._recording.promise, self._recording.image
        if promise is None:
            return

        def locate(sector: int) -> tuple[Disk, int]:
            return disk, sector

        # Everything once, then what the last epoch changed.
        ranges = [(0, promise.size // SECTOR)] if self._fresh else image.touched + promise.tightened
        at = np.unique(np.concatenate([np.arange(*span) for span in ranges])) if ranges else np.zeros(0, np.int64)
        bad = suspects(self._recording, image, at[at < promise.sectors], at[at < promise.sectors])
        prove(self._recording, disk, bad, locate, report, enough)
        if not len(bad):
            self._fresh = False
            image.touched.clear()
            promise.tightened.clear()
