"""Intervals cover what they should; sign flips are exact."""

import numpy as np
import pytest

from analysis.statistics import sign_flip_p, t_interval


def test_t_interval_by_hand():
    interval = t_interval([1.0, 2.0, 3.0])
    assert interval.mean == 2.0 and interval.n == 3
    half = 4.302652729911275 / np.sqrt(3)
    assert interval.low == pytest.approx(2 - half) and interval.high == pytest.approx(2 + half)


def test_few_seeds_have_no_interval_and_infinite_ones_are_refused():
    assert t_interval([]).mean is None
    assert t_interval([0.5]).low is None and t_interval([0.5]).mean == 0.5
    with pytest.raises(ValueError, match="finite"):
        t_interval([1.0, float("inf")])


def test_coverage_with_eight_seeds_is_nominal_and_a_percentile_bootstrap_falls_short_with_four():
    rng = np.random.default_rng(0)

    def covered(n: int, interval) -> float:
        hits = [
            low <= 0 <= high for low, high in (interval(rng.normal(size=n)) for _ in range(2000))
        ]
        return float(np.mean(hits))

    def student(values):
        interval = t_interval(values)
        return interval.low, interval.high

    def percentile(values):
        means = rng.choice(values, (400, len(values))).mean(1)
        return np.quantile(means, 0.025), np.quantile(means, 0.975)

    assert covered(8, student) == pytest.approx(0.95, abs=0.015)
    assert covered(4, percentile) < 0.88


def test_sign_flip_is_exact():
    assert sign_flip_p(np.arange(1, 9)) == pytest.approx(2 / 2**8)
    assert sign_flip_p([1.0, -1.0]) == 1.0
    assert sign_flip_p([3.0]) == 1.0
    values = np.array([0.3, -0.1, 0.4, 0.2, 0.5])
    signs = np.array(np.meshgrid(*[[-1, 1]] * 5)).reshape(5, -1).T
    expected = np.mean(np.abs((signs * values).mean(1)) >= abs(values.mean()) - 1e-12)
    assert sign_flip_p(values) == pytest.approx(expected)
