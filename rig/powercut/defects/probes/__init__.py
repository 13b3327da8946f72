"""Ways to look for a defect in the model of the driver: one file each, behind one function.

`judge(scenario, practice, scratch)` runs one scenario in one way and says what is wrong, or None. The same scenarios
are tried in every way, for every defect, the same ones where none is planted.
"""

from __future__ import annotations

import importlib
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import msgspec

from powercut.formats.qcow2.driver.practice import Practice
from powercut.recording.histories import KIB, Shape, scenario
from powercut.recording.operations import possible
from powercut.scenario import Scenario, size_text

METHODS = ("crash", "loops", "races", "errors", "media")
_LONGEST = 8  # operations in a scenario, before it is shrunk
_WEIGHTS = {"write": 8, "flush": 2, "discard": 1, "zero": 1, "reopen": 2, "create": 3, "delete": 1, "apply": 1}


@dataclass(frozen=True, slots=True)
class Trouble:
    """What is wrong, in words, and how many lost atoms it takes (None where nothing is lost)."""

    text: str
    lost: int | None = None


class Judge(Protocol):
    def __call__(self, scenario: Scenario, practice: Practice, scratch: Path) -> Trouble | None: ...


@dataclass(frozen=True, slots=True)
class Hit:
    """Something wrong with the shortest history found that shows it, after so many scenarios and seconds."""

    scenario: Scenario
    trouble: Trouble
    tried: int
    seconds: float


def judge_of(method: str) -> Judge:
    judge: Judge = importlib.import_module(f"powercut.defects.probes.{method}").judge
    return judge


def scenarios(seed: int) -> Iterator[Scenario]:
    """Short histories at the edges of small images: of L2 tables, of what a refcount block counts. One image in ten has
    an L1 table larger than that."""
    rnd = random.Random(seed)
    small = Shape(512, (32 * KIB,), (("cluster_size", "512"),))
    block = Shape(512, (32 * KIB, 128 * KIB), (("cluster_size", "512"),))
    medium = Shape(4 * KIB, (64 * KIB,), (("cluster_size", "4k"),))
    while True:
        shape = rnd.choices((small, block, medium), (5, 3, 2))[0]
        lazy = {"lazy_refcounts": "on"} if rnd.random() < 0.3 else {}
        backing = shape.size if rnd.random() < 0.2 else None
        lines = [_line(rnd, shape) for _ in range(rnd.randint(2, _LONGEST))]
        drawn = scenario("qcow2", shape, lines, rnd.choice((1, 4)), backing)
        size = drawn.size
        if rnd.random() < 0.1:
            size, drawn = "768M", msgspec.structs.replace(drawn, backing=None)
        yield possible(msgspec.structs.replace(drawn, size=size, options=dict(shape.options) | lazy))


def _line(rnd: random.Random, shape: Shape) -> str:
    verb = rnd.choices(list(_WEIGHTS), list(_WEIGHTS.values()))[0]
    if verb in ("flush", "reopen"):
        return verb
    if verb in ("create", "delete", "apply"):
        return f"snapshot {verb} {rnd.choice(('s1', 's2'))}"
    offset, length = rnd.choice(shape.offsets), rnd.choice(shape.lengths)
    return f"{verb} {size_text(offset)} {size_text(min(length, shape.size - offset))}"


def search(
    method: str, practice: Practice, seed: int, most: int, limit: float, scratch: Path
) -> tuple[Hit | None, int]:
    """Try up to `most` scenarios, for about `limit` seconds, until something is wrong. Returns it, if anything was, and
    how many were tried."""
    judge, begin, tried = judge_of(method), time.monotonic(), 0
    for candidate in scenarios(seed):
        if tried == most or time.monotonic() - begin > limit:
            break
        if not candidate.workload.history:
            continue
        tried += 1
        trouble = judge(candidate, practice, scratch)
        if trouble is not None:
            smaller, trouble = _shrunk(judge, candidate, trouble, practice, scratch)
            return Hit(smaller, trouble, tried, time.monotonic() - begin), tried
    return None, tried


def _shrunk(
    judge: Judge, found: Scenario, trouble: Trouble, practice: Practice, scratch: Path
) -> tuple[Scenario, Trouble]:
    """Leave out one line after the other, as long as anything is wrong."""
    at = len(found.workload.history) - 1
    while at >= 0:
        lines = found.workload.history
        workload = msgspec.structs.replace(found.workload, history=lines[:at] + lines[at + 1 :])
        smaller = possible(msgspec.structs.replace(found, workload=workload))
        less = judge(smaller, practice, scratch) if smaller.workload.history else None
        if less is not None:
            found, trouble = smaller, less
        at = min(at, len(found.workload.history)) - 1
    return found, trouble
