"""Closed forms that measurements are held against."""

import numpy as np
from jaxtyping import Float


def null_retention(
    lr: Float[np.ndarray, " step"], weight_decay: float
) -> Float[np.ndarray, " step"]:
    """Fraction of a weight left after each step if its gradient is always zero.

    AdamW then reduces to w <- w (1 - lr weight_decay) (Loshchilov & Hutter 2019, decoupled decay),
    and so does SGD. Unitless, in (0, 1].

    Raises:
        ValueError: if any lr * weight_decay is outside [0, 1).
    """
    step = np.asarray(lr, dtype=np.float64) * weight_decay
    if np.any(step < 0) or np.any(step >= 1):
        raise ValueError(
            f"weight_decay: lr * weight_decay must be in [0, 1), got up to {np.max(step):g}"
        )
    return np.cumprod(1 - step)
