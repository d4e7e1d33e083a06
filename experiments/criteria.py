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


def side(size: Interval, bound: float, yes: str = "yes", no: str = "no") -> str:
    """On which side of the bound the whole interval lies."""
    if size.low is None or size.high is None:
        return "undecided"
    return yes if size.low > bound else no if size.high < bound else "undecided"


def per_seed(table: pd.DataFrame, measure: Callable[[pd.DataFrame], float]) -> pd.Series:
    """One number a seed."""
    return pd.Series({seed: measure(own) for seed, own in table.groupby("seed")}, dtype=float)


def by_arm(table: pd.DataFrame, decaying: bool) -> Iterator[tuple[str, pd.DataFrame]]:
    """Each arm with a gradient, or with decay, by a short name."""
    for key, own in table.groupby(ARM, sort=False):
        regime, optimizer, lr, weight_decay, target = cast(tuple[str, str, float, float, str], key)
        if weight_decay > 0 or not decaying:
            plain = [f"wd {weight_decay:g}", *([f"to {target}"] if weight_decay and target != "zero" else [])]
            extra = [optimizer] if optimizer != "adamw" else []
            several = table.loc[table["regime"] == regime, "lr"].nunique() > 1
            yield f"{regime}, {', '.join([*plain, *extra, *([f'lr {lr:g}'] if several else [])])}", own
