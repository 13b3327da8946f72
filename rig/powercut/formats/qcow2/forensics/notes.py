"""What an investigation says, and how sure it is."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Certainty(enum.StrEnum):
    RECOVERED = "recovered"  # the structures that are left say so
    GUESSED = "guessed"  # likely, and something else would fit too
    LOST = "lost"


@dataclass(frozen=True, slots=True)
class Note:
    certainty: Certainty
    what: str  # one word or two: "cluster size", "L2 table"
    text: str


def recovered(what: str, text: str) -> Note:
    return Note(Certainty.RECOVERED, what, text)


def guessed(what: str, text: str) -> Note:
    return Note(Certainty.GUESSED, what, text)


def lost(what: str, text: str) -> Note:
    return Note(Certainty.LOST, what, text)


def guest_range(start: int, stop: int) -> str:
    """Guest bytes in words."""
    return f"guest bytes {start:#x} to {stop - 1:#x}"
