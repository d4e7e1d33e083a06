"""From one number a seed to an interval. All comparisons are paired by seed."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import factorial

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy import stats
from statsmodels.duration.survfunc import SurvfuncRight
from statsmodels.stats.multitest import multipletests

PerSeed = Sequence[float] | np.ndarray | pd.Series
EXACT_SEEDS = 16  # up to this many, all sign patterns are tried
ROUNDING = 1e-12  # of the sum of sizes; sums that differ by less are equal


@dataclass(frozen=True)
class Interval:
    """Mean over n seeds and its t interval, of 95 % unless said otherwise.

    The ends are None with fewer than two seeds, and the mean too with none.
    """

    mean: float | None
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True)
class Median:
    """Median of lives, of which some may be censored, and its 95 % interval.

    Each is None where too few have died to say it; an upper end of None is beyond the last look.
    """

    median: float | None
    low: float | None
    high: float | None
    n: int
    n_censored: int


def t_interval(values: PerSeed, confidence: float = 0.95) -> Interval:
    """Student's t interval of the mean of one finite number a seed.

    Raises:
        ValueError: for a number that is not finite.
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


def shapley_values(worth: Mapping[frozenset[str], float]) -> dict[str, float]:
    """What each player is worth: the mean of what it adds, over all orders in which players may come.

    Together they are worth what all have over none; who never adds anything is worth nothing (Shapley
    1953).

    Args:
        worth: of every set of players, the empty one among them.
    """
    players = sorted(max(worth, key=len))
    weights = [
        factorial(size) * factorial(len(players) - size - 1) / factorial(len(players))
        for size in range(len(players))
    ]
    return {
        player: sum(
            weights[len(some)] * (worth[some | {player}] - value)
            for some, value in worth.items()
            if player not in some
        )
        for player in players
    }


def sign_flip_p(differences: PerSeed) -> float:
    """Two-sided p value of a mean paired difference of zero, over sign patterns.

    Exact up to EXACT_SEEDS; above, 2**EXACT_SEEDS patterns are sampled. Of fewer than two seeds it
    is 1.
    """
    numbers = np.asarray(differences, dtype=np.float64)
    if len(numbers) < 2:
        return 1.0
    if len(numbers) <= EXACT_SEEDS:
        # [pattern, seed]: the binary digits of 0, 1, ...; a 1 flips the sign. Pattern 0 flips none, and
        # so is what was seen.
        bits = np.arange(2 ** len(numbers))[:, None] >> np.arange(len(numbers)) & 1
        sums = np.abs((1 - 2 * bits) @ numbers)
        return float((sums >= sums[0] - ROUNDING * np.abs(numbers).sum()).mean())
    test = stats.permutation_test(
        (numbers,),
        np.mean,
        vectorized=True,
        permutation_type="samples",
        n_resamples=2**EXACT_SEEDS,
        batch=2**10,
        rng=0,
    )
    return float(test.pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Each p value, adjusted for their number by Holm's step-down procedure, in their order.

    At any level, those at or below it are rejected with no more than that chance of one mistake,
    however they hang together (Holm 1979, Scandinavian Journal of Statistics 6).
    """
    if not len(p_values):
        return []
    return np.asarray(multipletests(p_values, method="holm")[1]).tolist()


def survival_median(lives: PerSeed, ends: float | PerSeed) -> Median:
    """Median of the Kaplan-Meier curve: the first time at which less than half are alive.

    Its interval inverts the test of log(-log S), as R's and SAS's do.

    Args:
        lives: infinite, or missing, where something outlived what was looked at.
        ends: when the last look was, of all or of each.
    """
    known = np.asarray(lives, dtype=np.float64)
    died = np.isfinite(known)
    times = np.where(died, known, np.asarray(ends, dtype=np.float64))
    n, n_censored = len(known), int((~died).sum())
    if not died.any():
        return Median(None, None, None, n, n_censored)
    curve = SurvfuncRight(times, died.astype(int))
    with warnings.catch_warnings(), np.errstate(all="ignore"):  # where S is 0, log(-log S) is none
        warnings.simplefilter("ignore", RuntimeWarning)
        numbers = (curve.quantile(0.5), *curve.quantile_ci(0.5))
    median, low, high = (float(x) if np.isfinite(x) else None for x in numbers)
    return Median(median, low, high, n, n_censored)


def variance_parts(
    values: Float[np.ndarray, "base install continuation"],
) -> dict[str, float]:
    """Shares of the variance of a number that each level of a nested design adds.

    The estimates of the analysis of variance of a balanced nested design (Searle, Casella & McCulloch
    1992, section 3.6); one below zero counts as zero. Shares add up to 1; NaN if nothing varies.

    Args:
        values: at least two of each level, each nested in the one before it.
    """
    _, installs, continuations = values.shape
    of_install = values.mean(2)
    within = float(values.var(axis=2, ddof=1).mean())
    between_installs = float(of_install.var(axis=1, ddof=1).mean())
    between_bases = float(of_install.mean(1).var(ddof=1))
    # Means of k draws still hold 1/k of the variance of what they were drawn from, which is taken off.
    added = {
        "base": max(0.0, between_bases - between_installs / installs),
        "install": max(0.0, between_installs - within / continuations),
        "continuation": within,
    }
    total = sum(added.values())
    return {name: part / total if total else float("nan") for name, part in added.items()}
