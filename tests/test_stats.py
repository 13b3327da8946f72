"""What loops prove: published figures, exact coverage on small cases, error rates of the sequential test simulated."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from powercut.stats import Decision, Sequential, bound, interval, loops_needed, sentence


def binomial(k: int, n: int, p: float) -> float:
    return math.comb(n, k) * p**k * (1 - p) ** (n - k)


def test_known_figures() -> None:
    assert bound(0, 1000) == pytest.approx(0.00299, abs=0.000005)
    assert bound(0, 100) == pytest.approx(0.0295, abs=0.00005)
    assert loops_needed(0.0065) == 460
    assert loops_needed(0.005) == 598
    low, high = interval(4, 20)  # Clopper-Pearson, 95 %: 0.0573 to 0.4366
    assert (low, high) == (pytest.approx(0.0573, abs=0.0001), pytest.approx(0.4366, abs=0.0001))
    assert sentence(0, 1000) == "0 of 1,000 loops failed: with 95 % confidence the failure rate is below 0.299 %"
    assert sentence(4, 20).endswith("between 5.73 % and 43.7 %")
    assert "nothing" in sentence(0, 0)


@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_ends_are_where_the_tails_weigh_what_is_left(case: tuple[int, int]) -> None:
    """Clopper and Pearson's definition, with the tails added up term by term."""
    failures, loops = case
    low, high = interval(failures, loops)
    if failures:
        assert sum(binomial(k, loops, low) for k in range(failures, loops + 1)) == pytest.approx(0.025, abs=1e-6)
    if failures < loops:
        assert sum(binomial(k, loops, high) for k in range(failures + 1)) == pytest.approx(0.025, abs=1e-6)
        one_sided = bound(failures, loops)
        assert sum(binomial(k, loops, one_sided) for k in range(failures + 1)) == pytest.approx(0.05, abs=1e-6)
        assert one_sided < high
    assert 0 <= low <= failures / loops <= high <= 1


def test_the_interval_covers_the_truth_often_enough() -> None:
    for loops in (5, 20, 60):
        ends = [interval(k, loops) for k in range(loops + 1)]
        for rate in np.linspace(0.01, 0.99, 33).tolist():
            covered = sum(binomial(k, loops, rate) for k, (low, high) in enumerate(ends) if low <= rate <= high)
            assert covered >= 0.95 - 1e-9


@given(st.floats(0.001, 0.9), st.floats(0.5, 0.999))
def test_loops_needed_is_the_least(rate: float, confidence: float) -> None:
    loops = loops_needed(rate, confidence)
    assert 1 - (1 - rate) ** loops >= confidence - 1e-9
    assert 1 - (1 - rate) ** (loops - 1) < confidence + 1e-9
    assert bound(0, loops, confidence) <= rate + 1e-9


def run(test: Sequential, rate: float, runs: int, seed: int) -> tuple[dict[Decision, int], float]:
    """How often `test` decides what if loops fail at `rate`, and after how many loops on average."""
    rng = np.random.default_rng(seed)
    decided, total = dict.fromkeys(Decision, 0), 0
    for _ in range(runs):
        failures = loops = 0
        decision = None
        for fails in iter(lambda: rng.random() < rate, None):
            loops, failures = loops + 1, failures + fails
            if (decision := test.decide(failures, loops)) is not None:
                break
        assert decision is not None
        decided[decision] += 1
        total += loops
    return decided, total / runs


def test_the_sequential_test_errs_no_more_than_it_may_and_stops_early() -> None:
    test, runs = Sequential(0.02, 0.1, alarm=0.05, miss=0.1), 1500
    good, loops_if_good = run(test, 0.02, runs, seed=1)
    bad, loops_if_bad = run(test, 0.1, runs, seed=2)
    slack = 3 * math.sqrt(0.1 * 0.9 / runs)
    assert good[Decision.BAD] / runs <= 0.05 + slack
    assert bad[Decision.GOOD] / runs <= 0.1 + slack
    # A test of fixed size with these errors needs at least so many loops (found by trying each).
    fixed = next(
        n
        for n in range(10, 1000)
        if any(
            sum(binomial(k, n, 0.02) for k in range(c, n + 1)) <= 0.05
            and sum(binomial(k, n, 0.1) for k in range(c)) <= 0.1
            for c in range(1, 20)
        )
    )
    assert loops_if_good < fixed
    assert loops_if_bad < fixed


def test_control_limits_that_are_too_wide_are_caught_by_the_same_simulation() -> None:
    """A test that promises 5 % but stops as for 40 % is seen to err."""
    careless, runs = Sequential(0.02, 0.1, alarm=0.4, miss=0.4), 1500
    assert run(careless, 0.02, runs, seed=1)[0][Decision.BAD] / runs > 0.05 + 3 * math.sqrt(0.1 * 0.9 / runs)


def test_with_a_faultless_hypothesis_one_failure_decides() -> None:
    test = Sequential(0.0, 0.0065)
    assert test.decide(1, 3) is Decision.BAD
    assert test.decide(0, 458) is None
    assert test.decide(0, 460) is Decision.GOOD


def test_nonsense_is_refused() -> None:
    for call in (
        lambda: interval(2, 1),
        lambda: bound(0, 0),
        lambda: bound(-1, 5),
        lambda: loops_needed(0),
        lambda: loops_needed(1),
        lambda: Sequential(0.1, 0.1),
        lambda: Sequential(0.0, 0.1, miss=0),
    ):
        with pytest.raises(ValueError):
            call()


def test_scipy_is_imported_late() -> None:
    code = "import sys, powercut.stats as s; s.bound(0, 1000); s.loops_needed(.01); sys.exit('scipy' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
