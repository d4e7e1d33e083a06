"""From one number a seed to an interval. All comparisons are paired by seed."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

PerSeed = Sequence[float] | np.ndarray | pd.Series
EXACT_SEEDS = 14  # up to this many, all sign patterns are tried


@dataclass(frozen=True)
class Interval:
    """Mean over seeds and its 95 % t interval; the ends are None with fewer than two seeds."""

    mean: float | None
    low: float | None
    high: float | None
    n: int


def t_interval(values: PerSeed, confidence: float = 0.95) -> Interval:
    """Student's t interval of the mean of one finite number a seed.

    Raises ValueError for a value that is not.
    """
    numbers = np.asarray(values, dtype=np.float64)
    if not np.isfinite(numbers).all():
        raise ValueError("t_interval: every seed must give a finite number")
    if len(numbers) == 0:
        return Interval(None, None, None, 0)
    mean = float(numbers.mean())
    if len(numbers) == 1:
        return Interval(mean, None, None, 1)
    half = float(stats.sem(numbers) * stats.t.ppf((1 + confidence) / 2, len(numbers) - 1))
    return Interval(mean, mean - half, mean + half, len(numbers))


def sign_flip_p(differences: PerSeed) -> float:
    """Two-sided p value of a mean paired difference of zero, over sign patterns.

    Exact up to EXACT_SEEDS; above, 2**EXACT_SEEDS patterns are sampled. Of fewer than two seeds it
    is 1.
    """
    numbers = np.asarray(differences, dtype=np.float64)
    if len(numbers) < 2:
        return 1.0
    test = stats.permutation_test(
        (numbers,),
        np.mean,
        permutation_type="samples",
        n_resamples=2 ** min(len(numbers), EXACT_SEEDS),
        rng=0,
    )
    return float(test.pvalue)
