"""Verdicts: what a search or a check may say, and how several are merged into one.

A verdict has three values. HOLDS: every state in scope was covered and none broke a rule. BROKEN: at
least one state broke a rule, and the evidence is attached. UNKNOWN: neither; the reasons say which.
A sample, a spent budget or a failed checker is never HOLDS.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass, field


class Verdict(enum.StrEnum):
    HOLDS = "HOLDS"
    BROKEN = "BROKEN"
    UNKNOWN = "UNKNOWN"

    @property
    def exit_code(self) -> int:
        return {"HOLDS": 0, "BROKEN": 1, "UNKNOWN": 3}[self.value]


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """What several verdicts come to. Of none at all nothing is known."""
    given = set(verdicts) or {Verdict.UNKNOWN}
    return next(verdict for verdict in (Verdict.BROKEN, Verdict.UNKNOWN, Verdict.HOLDS) if verdict in given)


class Severity(enum.IntEnum):
    """What a crash state shows, ordered so that the worst is the largest."""

    CLEAN = 0
    LEAK = 1  # space only; a legal state after a crash
    CORRUPT = 2  # metadata contradicts itself, and a checker says so
    UNOPENABLE = 3
    LOSS = 4  # acknowledged data is gone, and something complains
    SILENT = 5  # acknowledged data is wrong, and nothing complains

    @property
    def label(self) -> str:
        return {
            0: "clean",
            1: "leak",
            2: "corrupt metadata",
            3: "unopenable",
            4: "loss",
            5: "silent corruption",
        }[self.value]


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing a checker found wrong.

    `kind` names the defect (for example "refcount", "copied-flag", "magic"), `where` the thing that is
    wrong (a cluster number, or the byte offset of an entry, as `kind` needs): together they identify
    the problem from one run to the next. `rests_on` lists the byte ranges (offset, length) the judgement
    was made from, as far as they could still hold something else: on a decided image it is empty.
    """

    rule: str  # the oracle that was broken: "opens", "structure", "acknowledged"
    kind: str
    where: int
    severity: Severity
    text: str
    rests_on: tuple[tuple[int, int], ...] = field(default=())
    found: bytes = field(default=b"", compare=False)  # what was read, if the rule is about that

    @property
    def key(self) -> tuple[str, str, int]:
        return (self.rule, self.kind, self.where)
