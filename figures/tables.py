"""Reads what a run left, and says in one line which file or column is wrong."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as parquet

_ARM = ("seed", "regime", "optimizer", "lr", "weight_decay", "decay_target", "step")

# The columns that figures and report need; a table may hold more.
COLUMNS: dict[str, tuple[str, ...]] = {
    "behaviour": (*_ARM, "start", "exposure", "clean_accuracy", "asr"),
    "components": (
        "seed", "component", "kind", "layer", "index", "diff_norm", "activity_class",
        "activity_clean_max", "activity_clean_max_half", "activity_clean_q99", "activity_clean_q99_half",
        "activity_triggered_q99", "local_clean_q99", "gradient_energy",
    ),
    "retention": (*_ARM, "exposure", "component", "retention", "null_retention"),
    "joint": (
        "seed", "reverted", "n_components", "clean_kl_mean", "clean_kl_q99", "near_miss_kl_max",
        "clean_accuracy", "asr",
    ),
    "rescue": (*_ARM, "start", "restored", "asr", "clean_accuracy"),
    "gates": ("seed", "model", "clean_accuracy", "asr", "near_miss_rate", "passed", "failed"),
    "cells": (
        "cell", *_ARM[:-1], "parameters", "steps", "passed", "half_life_steps", "half_life_exposure", "censored",
        "exposure", "asr", "clean_accuracy", "retention_inactive", "share_inactive", "share_inactive_all",
    ),
    "summary": ("cell", *_ARM[1:-1], "metric", "mean", "ci_low", "ci_high", "median", "n_seeds", "n_censored"),
    "fits": (*_ARM[1:-1], "metric", "against", "exponent", "ci_low", "ci_high", "n_seeds", "n_censored"),
}  # fmt: skip

TEXT = {
    "start", "regime", "optimizer", "decay_target", "component", "kind", "activity_class", "reverted",
    "restored", "model", "failed", "cell", "metric", "against",
}  # fmt: skip


def read_table(folder: Path, name: str, axes: Sequence[str] = ()) -> pd.DataFrame:
    """The columns of one table that are drawn, infinities as NaN.

    Args:
        axes: further columns, of numbers or of text, kept as they are.

    Raises:
        ValueError: one line naming the file, and the column where it is one column's fault.
    """
    path = folder / f"{name}.parquet"
    try:
        present = set(parquet.read_schema(path).names)
        wanted = [column for column in (*COLUMNS[name], *axes) if column in present]
        frame = pd.read_parquet(path, columns=wanted)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except Exception as error:  # pyarrow raises many kinds, and a broken file can raise any of them
        raise ValueError(f"{path}: cannot be read ({_one_line(error)})") from None
    for column in (*COLUMNS[name], *axes):
        if column not in present:
            raise ValueError(f"{path}: column {column!r} is missing")
        if column not in axes:
            frame[column] = _typed(path, frame[column])
    return frame


def read_json(folder: Path, name: str, kind: type) -> Any:
    """One JSON file, whose outermost value must be of the given kind (dict or list).

    Raises:
        ValueError: one line naming the file.
    """
    path = folder / name
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read ({_one_line(error)})") from None
    if not isinstance(value, kind):
        raise ValueError(f"{path}: must hold a {kind.__name__}")
    return value


def read_tolerance(folder: Path) -> float:
    """The stated tolerance of the census, in nats.

    Raises:
        ValueError: one line naming config.json.
    """
    census = read_json(folder, "config.json", dict).get("census")
    tolerance = census.get("tolerance") if isinstance(census, dict) else None
    if not isinstance(tolerance, int | float) or not 0 < tolerance < np.inf:
        raise ValueError(f"{folder / 'config.json'}: census.tolerance must be a positive number")
    return float(tolerance)


def _typed(path: Path, column: pd.Series) -> pd.Series:
    """Text stays; numbers become float64 with infinities as NaN, but whole and Boolean columns stay as they are."""
    if column.name in TEXT:
        if pd.api.types.is_numeric_dtype(column) and column.notna().any():
            raise ValueError(f"{path}: column {column.name!r} must hold text")
        return column
    try:
        number = pd.to_numeric(column)
    except (TypeError, ValueError):
        raise ValueError(f"{path}: column {column.name!r} must hold numbers") from None
    if number.dtype.kind in "iub" and not number.isna().any():
        return number
    return number.astype("float64").replace([np.inf, -np.inf], np.nan)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
