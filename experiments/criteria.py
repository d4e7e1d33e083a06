"""What every verdict is made of: per-seed numbers, arms by name, bounds, and which side of one an interval lies on."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import pandas as pd

from analysis.statistics import Interval

Verdict = dict[str, Any]
Tables = Mapping[str, pd.DataFrame]

ARM = ["regime", "optimizer", "lr", "weight_decay", "decay_target"]
NULL_BOUND = 0.05  # an inactive diff follows the null law if its median retention is within this of it
SHARE_BOUND = 0.02  # the share may move by less than this when the inputs are doubled
EQUAL_LIVES = (0.8, 1.25)  # ratios of half-lives that are told from 1 by less than this are no difference
RETENTION_BOUND = 0.02  # smaller differences of retention between classes are no difference


def verdict(id: str, question: str, answer: str, size: Interval, unit: str, evidence: str) -> Verdict:
    """One row of verdicts.json."""
    return {
        "id": id,
        "question": question,
        "answer": answer,
        "estimate": size.mean,
        "ci_low": size.low,
        "ci_high": size.high,
        "n_seeds": size.n,
        "unit": unit,
        "evidence": evidence,
    }


def mapped(function: Callable[[float], float], size: Interval) -> Interval:
    """The interval with an increasing function applied to its mean and ends."""
    mean, low, high = (None if value is None else function(value) for value in (size.mean, size.low, size.high))
    return Interval(mean, low, high, size.n)


def told(size: Interval) -> str:
    """The mean and its interval, as a reader wants them."""
    if size.mean is None or size.low is None or size.high is None:
        return "no interval"
    return f"{size.mean:.2f} ({size.low:.2f} to {size.high:.2f})"


def side(
    size: Interval, bound: float, yes: str = "yes", no: str = "no", equal: tuple[float, float] | None = None
) -> str:
    """On which side of the bound the whole interval lies.

    Args:
        equal: an interval that holds the bound, but lies within these two, is "no difference".
    """
    if size.low is None or size.high is None:
        return "undecided"
    if size.low > bound or size.high < bound:
        return yes if size.low > bound else no
    return "no difference" if equal and equal[0] < size.low and size.high < equal[1] else "undecided"


def per_seed(table: pd.DataFrame, measure: Callable[[pd.DataFrame], float]) -> pd.Series:
    """One number a seed."""
    return pd.Series({seed: measure(own) for seed, own in table.groupby("seed")}, dtype=float)


def with_arm_names(table: pd.DataFrame) -> pd.DataFrame:
    """The table with a column `arm`: each arm's short name, which says no more than tells the arms apart."""
    arms = table[ARM].drop_duplicates()
    names = []
    for key in arms.itertuples(index=False, name=None):
        regime, optimizer, lr, weight_decay, target = cast(tuple[str, str, float, float, str], key)
        words = [f"{regime}, wd {weight_decay:g}", *([f"to {target}"] if weight_decay and target != "zero" else [])]
        several = table.loc[table["regime"] == regime, "lr"].nunique() > 1
        words += ([optimizer] if optimizer != "adamw" else []) + ([f"lr {lr:g}"] if several else [])
        names.append(", ".join(words))
    return table.merge(arms.assign(arm=names), on=ARM, how="left")


def by_arm(table: pd.DataFrame, decaying: bool = False) -> Iterator[tuple[str, pd.DataFrame]]:
    """Each arm (with decay) and its name, in order of appearance."""
    for name, own in table[(table["weight_decay"] > 0) | (not decaying)].groupby("arm", sort=False):
        yield str(name), own
