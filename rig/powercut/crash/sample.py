"""Which crash states to look at where there are too many: those that have found faults before, first of all.

    drop one, keep one   every write in flight survived but one; or only one did
    prefix               the first k writes in the order of issue survived
    pairs                two were dropped, or two kept
    random               each atom by itself: half the time as if nothing had survived

The ways take turns, so that a budget of any size goes to all of them. Writes on atoms that the check was seen to
read, which is where the metadata is, come first in each. Changes of names and of sizes count as writes do.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from powercut.crash.contents import Choice
from powercut.crash.search import Policy, Search


@dataclass(frozen=True, slots=True)
class Sample:
    """One state to look at: the `way` it was chosen by, and the answers that make it."""

    way: str
    policy: Policy


Own = Callable[[int], bool]  # whether what is on the disk with this number is of the recording, not of a recovery


def of_image(disk: int) -> bool:
    """`Own` where there is one file."""
    return disk <= 0


def surviving(events: frozenset[int], own: Own = of_image) -> Policy:
    """Answers as if of all that is in flight just `events` had survived, and of what a recovery did nothing."""

    def chosen(disk: int, choice: Choice) -> int:
        if not own(disk):
            return 0
        return max((i for i, event in enumerate(choice.events) if i and event in events), default=0)

    return chosen


def at_random(rnd: random.Random) -> Policy:
    """Each atom durable or not with the same chance, and any of its other contents if not."""

    def chosen(disk: int, choice: Choice) -> int:
        return rnd.randrange(1, len(choice.contents)) if rnd.random() < 0.5 else 0

    return chosen


def sizes(events: int) -> dict[str, int]:
    """How many states each way has for so many writes; 0: there is no end."""
    pairs = events * (events - 1)
    return {"drop one": events, "keep one": events, "prefix": events + 1, "pairs": pairs, "random": 0}


@dataclass(frozen=True, slots=True)
class Sampled:
    """What was looked at where a budget did not suffice: states `done` of `of` (0: without end) in each way."""

    epochs: int
    seed: int
    done: Counter[str]
    of: Counter[str]


class Looked(Protocol):
    """An epoch that may have been sampled (`powercut.crash.explore.Searched`)."""

    events: int
    sampled: dict[str, int]


def sampled(epochs: Iterable[Looked], seed: int) -> Sampled | None:
    """What was looked at in all `epochs`; None if none was sampled."""
    looked = [epoch for epoch in epochs if epoch.sampled]
    done: Counter[str] = Counter()
    of: Counter[str] = Counter()
    for epoch in looked:
        done.update(epoch.sampled)
        of.update(sizes(epoch.events))
    return Sampled(len(looked), seed, done, of) if looked else None


def look(
    search: Search, whole: Callable[[], None], issued: Sequence[int], seed: int, own: Own = of_image
) -> Iterator[str]:
    """Run `whole` on single states until the budget of `search` is spent (BudgetSpent); yields by which way each was
    chosen. `issued`: the events in flight in the order of issue."""
    for survivors in (frozenset[int](), frozenset(issued)):  # this shows what the check reads
        search.sample(whole, surviving(survivors, own))
    matter = {event for (disk, _), events in search.asked.items() if own(disk) for event in events}
    first = sorted(issued, key=lambda event: event not in matter)
    for sample in samples(issued, first, seed, own):
        search.sample(whole, sample.policy)
        yield sample.way


def samples(issued: Sequence[int], first: Sequence[int], seed: int, own: Own = of_image) -> Iterator[Sample]:
    """States to look at, without end. `issued`: the events in flight in the order of issue; `first`: the same, those
    that matter most first."""
    whole = frozenset(issued)
    turns: dict[str, Iterator[frozenset[int]]] = {
        "prefix": (frozenset(issued[:count]) for count in _outside_in(len(issued) + 1)),
        "drop one": (whole - {event} for event in first),
        "keep one": (frozenset({event}) for event in first),
        "pairs": (
            kept for pair in itertools.combinations(first, 2) for kept in (whole - frozenset(pair), frozenset(pair))
        ),
    }
    rnd = random.Random(seed)
    while True:
        for way, sets in turns.items():
            events = next(sets, None)
            if events is not None:
                yield Sample(way, surviving(events, own))
        yield Sample("random", at_random(rnd))


def _outside_in(count: int) -> list[int]:
    """0, count - 1, and then halves: the ends first, the neighbours of what was seen last."""
    order = [0, count - 1]
    step = count
    while step > 1:
        step = -(-step // 2)
        order += range(step, count, step)
    return list(dict.fromkeys(order))
