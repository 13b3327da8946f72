"""What a number of loops proves about the rate at which a loop fails. Loops are taken to be independent and alike.

A hundred loops without a failure prove only that fewer than 3 in 100 fail (95 % confidence). A fault that strikes
6.5 times in 1,000 takes 460 loops to be met with that confidence.

Intervals are Clopper and Pearson's ("The use of confidence or fiducial limits illustrated in the case of the
binomial", Biometrika 26, 1934), exact at every number of loops. The sequential test is Wald's (Sequential Analysis,
1947) with the limits 1/`alarm` and `miss`, which by Ville's inequality keep both errors within what was asked for,
however often one looks; Wald's own limits do so only about.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass

CONFIDENCE = 0.95


def interval(failures: int, loops: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """The lowest and the highest rate of failure that `failures` in `loops` are compatible with, two-sided."""
    _check(failures, loops, confidence)
    from scipy.stats import binomtest

    ends = binomtest(failures, loops).proportion_ci(confidence, "exact")
    return float(ends.low), float(ends.high)


def bound(failures: int, loops: int, confidence: float = CONFIDENCE) -> float:
    """With `confidence` the rate of failure is below this (one-sided): 0.00299 for no failure in 1,000 loops."""
    _check(failures, loops, confidence)
    if not failures:  # the closed form of the same bound, so that the usual case need not wait for SciPy
        return -math.expm1(math.log1p(-confidence) / loops)
    from scipy.stats import binomtest

    return float(binomtest(failures, loops, alternative="less").proportion_ci(confidence, "exact").high)


def loops_needed(rate: float, confidence: float = CONFIDENCE) -> int:
    """How many loops it takes to meet a fault that strikes at `rate` at least once, with `confidence`. As many without
    a failure prove, with the same confidence, that the rate is below `rate`."""
    if not 0 < rate < 1 or not 0 < confidence < 1:
        raise ValueError(f"rate {rate} and confidence {confidence} must lie between 0 and 1")
    return math.ceil(math.log1p(-confidence) / math.log1p(-rate))


def sentence(failures: int, loops: int, confidence: float = CONFIDENCE) -> str:
    """What `failures` in `loops` prove, for people."""
    if not loops:
        return "no loops, so nothing is known of the failure rate"
    seen = f"{failures:,} of {loops:,} loops failed: with {confidence * 100:g} % confidence the failure rate is"
    if not failures:
        return f"{seen} below {percent(bound(0, loops, confidence))}"
    low, high = interval(failures, loops, confidence)
    return f"{seen} between {percent(low)} and {percent(high)}"


def percent(rate: float) -> str:
    """ "0.299 %"."""
    return f"{rate * 100:.3g} %"


def _check(failures: int, loops: int, confidence: float) -> None:
    if not 0 <= failures <= loops or not loops or not 0 < confidence < 1:
        raise ValueError(f"{failures} failures in {loops} loops at confidence {confidence}: not possible")


class Decision(enum.StrEnum):
    GOOD = "good"
    BAD = "bad"


@dataclass(frozen=True, slots=True)
class Sequential:
    """A test that stops as soon as the loops so far tell a rate of at most `good` from one of at least `bad`.

    `alarm`: at most this often (as a fraction) is `good` taken for bad; `miss`: `bad` for good. `good` may be 0: then
    one failure decides, and `loops_needed(bad, 1 - miss)` loops without one do.
    """

    good: float
    bad: float
    alarm: float = 1 - CONFIDENCE
    miss: float = 1 - CONFIDENCE

    def __post_init__(self) -> None:
        if not 0 <= self.good < self.bad < 1 or not 0 < self.alarm < 1 or not 0 < self.miss < 1:
            raise ValueError(f"{self}: rates must ascend within 0 and 1, and errors lie between 0 and 1")

    def decide(self, failures: int, loops: int) -> Decision | None:
        """What `failures` in the first `loops` decide; None: go on."""
        if failures and not self.good:
            return Decision.BAD
        ratio = (loops - failures) * (math.log1p(-self.bad) - math.log1p(-self.good))
        if failures:
            ratio += failures * math.log(self.bad / self.good)
        if ratio >= -math.log(self.alarm):
            return Decision.BAD
        return Decision.GOOD if ratio <= math.log(self.miss) else None
