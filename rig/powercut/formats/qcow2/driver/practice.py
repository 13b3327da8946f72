"""How a driver goes about its work: as it should, or as QEMU's did at some time; which defects are planted."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Era(enum.Enum):
    """TODAY: tables wait in caches, and are written in an order that no crash can break. APRIL_2009: every change of a
    table is written at once and nothing is ever flushed; a shared L2 table is given up before its copy is made; an
    allocation that comes out at offset 0 is believed. Nobody claims that the latter survives a power cut."""

    TODAY = "today"
    APRIL_2009 = "April 2009"


@dataclass(frozen=True, slots=True)
class Practice:
    """`defects`: names from the catalogue (`powercut.formats.qcow2.defects`)."""

    era: Era = Era.TODAY
    defects: frozenset[str] = frozenset()

    @property
    def through(self) -> bool:
        """Tables are written as soon as they are changed, and nothing waits for anything."""
        return self.era is Era.APRIL_2009

    def has(self, defect: str) -> bool:
        """Whether `defect` is planted."""
        return defect in self.defects
