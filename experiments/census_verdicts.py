"""Verdicts on the census: how much is always inactive, and whether it is so together too."""

from collections.abc import Iterator

import numpy as np
import pandas as pd

from analysis.reversion import ALIVE
from analysis.statistics import t_interval
from experiments.criteria import SHARE_BOUND, Tables, Verdict, mapped, per_seed, side, verdict

OTHER_TOLERANCES = (0.01, 0.1, 10.0)  # multiples of the stated one


def matters(components: pd.DataFrame, tolerance: float) -> pd.Series:
    """Which diffs matter when triggered: their graft moves more than 1 % of triggered answers beyond the tolerance."""
    return (components["diff_norm"] > 0) & (components["activity_triggered_q99"] > tolerance)


def share_verdicts(tables: Tables, tolerance: float) -> Iterator[Verdict]:
    """The share that is always inactive, whether the sample is large enough for it, and what gradients say."""
    components = tables["components"][tables["components"]["diff_norm"] > 0]
    relevant = components[matters(components, tolerance)]

    def share(table: pd.DataFrame, column: str = "activity_clean_q99", at: float = tolerance) -> pd.Series:
        return per_seed(table, lambda own: float((own[column] <= at).mean()))

    for id, table, which in (
        ("share_inactive", relevant, "the diffs that matter when triggered"),
        ("share_inactive_all", components, "all diffs"),
    ):
        size = t_interval(share(table))
        narrower = share(table[table["kind"] != "unembed"]).mean()
        count = len(table) / max(1, table["seed"].nunique())
        yield verdict(
            id,
            f"Of {which}, is the larger part always inactive on clean inputs?",
            side(size, 0.5),
            size,
            "of diffs",
            f"KL on the answer at most {tolerance:g} nats on at least 99 % of clean inputs; matters: above it on more "
            f"than 1 % of triggered ones; {count:.0f} such diffs a seed; without unembedding rows: {narrower:.2f}",
        )
    for factor in OTHER_TOLERANCES:
        at = factor * tolerance
        size = t_interval(share(relevant, at=at))
        yield verdict(
            f"share_inactive_at/{at:g}",
            f"And with the line drawn at {at:g} nats?",
            side(size, 0.5),
            size,
            "of diffs",
            f"the same diffs; how far the answer hangs on the tolerance of {tolerance:g} nats",
        )
    size = t_interval(per_seed(relevant, lambda own: float((own["activity_class"] == "sometimes_active").mean())))
    yield verdict(
        "share_sometimes",
        "What share of the diffs that matter is active on some clean inputs but not on all?",
        "measured",
        size,
        "of diffs",
        "the rest is active on at least 99 % of clean inputs",
    )
    for id, column, which in (
        ("share_stable", "q99", "the share that is inactive on 99 % of clean inputs"),
        ("share_stable_max", "max", "the share that is inactive on every clean input sampled"),
    ):
        half, whole = (share(components, f"activity_clean_{column}{part}") for part in ("_half", ""))
        moved = half - whole
        size = t_interval(moved)
        within = side(size, -SHARE_BOUND) == "yes" and side(size, SHARE_BOUND) == "no"
        beyond = side(size, -SHARE_BOUND) == "no" or side(size, SHARE_BOUND) == "yes"
        yield verdict(
            id,
            f"Does {which} move by less than {SHARE_BOUND:g} when the inputs are doubled?",
            "yes" if within else "no" if beyond else "undecided",
            size,
            "of diffs",
            f"share on half of the inputs, {half.mean():.3f}, less share on all, {whole.mean():.3f}",
        )
    inactive = relevant[relevant["activity_class"] == "always_inactive"]
    size = t_interval(per_seed(inactive, lambda own: float((own["gradient_energy"] == 0).mean())))
    yield verdict(
        "inactive_without_gradient",
        "Of the always-inactive diffs that matter, is the larger part also without any gradient of the clean loss?",
        side(size, 0.5),
        size,
        "of diffs",
        "gradient energy of the clean loss exactly zero on the inputs sampled, at the start",
    )


def joint_verdicts(tables: Tables, tolerance: float) -> Iterator[Verdict]:
    """What the reversion of a whole class does."""
    joint = tables["joint"]
    inactive = joint[joint["reverted"] == "always_inactive"]
    largest = t_interval(np.log10(np.maximum(inactive["clean_kl_q99"], 1e-12)))
    size = mapped(lambda log: 10**log, largest)
    yield verdict(
        "joint_inactive",
        "Are the always-inactive diffs inactive on clean inputs also when all are reverted at once?",
        side(size, tolerance, yes="no", no="yes"),
        size,
        "nats",
        f"KL that 99 % of clean inputs do not exceed, geometric mean over seeds; each alone at most {tolerance:g}",
    )
    for name, what in (("always_inactive", "always-inactive"), ("sometimes_active", "sometimes-active")):
        size = t_interval(joint.loc[joint["reverted"] == name, "asr"])
        yield verdict(
            f"joint_asr_{name}",
            f"Does the backdoor survive the reversion of all {what} diffs?",
            side(size, ALIVE),
            size,
            "ASR",
            f"all {what} diffs grafted back to the base's at once",
        )
