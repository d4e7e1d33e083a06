"""Intervals cover what they should; sign flips are exact; Holm and Kaplan-Meier by hand."""

import numpy as np
import pytest

from analysis.statistics import EXACT_SEEDS, holm, sign_flip_p, survival_median, t_interval


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
    assert sign_flip_p(-np.arange(1, 17)) == pytest.approx(2 / 2**16), "of a full study too"
    assert sign_flip_p([1.0, -1.0]) == 1.0
    assert sign_flip_p([0.1, 0.2, -0.3]) == 1.0, "rounding makes no difference of a mean of zero"
    assert sign_flip_p([3.0]) == 1.0
    values = np.array([0.3, -0.1, 0.4, 0.2, 0.5])
    signs = np.array(np.meshgrid(*[[-1, 1]] * 5)).reshape(5, -1).T
    expected = np.mean(np.abs((signs * values).mean(1)) >= abs(values.mean()) - 1e-12)
    assert sign_flip_p(values) == pytest.approx(expected)


def test_sampled_sign_flips_are_near_the_exact_ones():
    values = np.random.default_rng(1).normal(0.3, 1, EXACT_SEEDS + 1)
    bits = np.arange(2 ** len(values))[:, None] >> np.arange(len(values)) & 1
    exact = np.mean(np.abs((1 - 2 * bits) @ values) >= abs(values.sum()) - 1e-12)
    assert 0.01 < exact < 0.5 and sign_flip_p(values) == pytest.approx(exact, abs=0.01)


def test_holm_by_hand():
    # Sorted .01, .03, .04 times 3, 2, 1 is .03, .06, .04; none may be below the one before it.
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([0.02]) == [0.02] and holm([]) == []


def test_a_family_of_questions_without_any_effect_rarely_says_anything():
    """Negative control: seven questions, ten seeds, nothing there."""
    rng = np.random.default_rng(0)
    p = np.array([[sign_flip_p(rng.normal(size=10)) for _ in range(7)] for _ in range(500)])
    assert min(holm(p[0].tolist())) == pytest.approx(min(1, 7 * p[0].min())), (
        "what the first step asks"
    )
    assert np.mean(7 * p.min(1) < 0.05) < 0.07
    assert np.mean(p < 0.05) == pytest.approx(0.05, abs=0.01), "nor is one alone too strict"


def test_a_median_of_lives_by_hand():
    # Five lives, those of 12 and 14 cut off: alive are 4/5 after 10, 4/5 * 1/2 = 2/5 after 20.
    cut = np.array([10.0, np.inf, np.nan, 20.0, 30.0])
    ends = np.array([99.0, 12.0, 14.0, 99.0, 99.0])
    life = survival_median(cut, ends)
    assert life.median == 20.0 and (life.n, life.n_censored) == (5, 2)
    assert life.low == 10.0 and life.high == 30.0
    assert survival_median(np.arange(1.0, 8.0), 99.0).median == 4.0


def test_a_median_beyond_the_last_look_is_not_made_up():
    mostly_alive = survival_median(np.array([10.0, 20.0, np.inf, np.inf, np.inf]), 100.0)
    assert mostly_alive.median is None and mostly_alive.high is None and mostly_alive.low == 10.0
    all_alive = survival_median(np.full(4, np.inf), 100.0)
    assert (all_alive.median, all_alive.low, all_alive.n_censored) == (None, None, 4)
