"""Which diffs are active on which inputs, and how the share of inactive ones depends on where the line is drawn."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from figures.style import (
    BLACK,
    GREY,
    GRID,
    KIND_COLOURS,
    KIND_LABELS,
    KIND_MARKERS,
    KINDS,
    PALE_GREY,
    VERMILLION,
    counted,
    empty_figure,
    floored,
    log_floor,
    mark_decades,
    mark_floor,
    note_empty,
    ordered,
    styled,
)

# Measures of activity on clean inputs: column, panel's title, axis label with unit.
MEASURES = (
    ("activity_clean_q99", "causal: graft, on 99 % of clean inputs", "tolerance (KL, nats)"),
    ("activity_clean_max", "causal: graft, on every clean input sampled", "tolerance (KL, nats)"),
    ("local_clean_q99", "local: own write, on 99 % of clean inputs", "tolerance (relative to the residual stream)"),
    ("gradient_energy", "gradient energy on clean loss", "tolerance (mean squared gradient, nats²)"),
)
# Measures whose share on half of the inputs is known too.
HALVED = (
    ("activity_clean_q99", "on 99 % of inputs"),
    ("activity_clean_max", "on every input"),
)
POPULATIONS: dict[str, dict[str, Any]] = {
    "all diffs": {"color": BLACK, "ls": "-"},
    "diffs that matter when triggered": {"color": VERMILLION, "ls": (0, (5, 1.2))},
}
GRID_POINTS = 160
# The share may move by this much when the number of inputs is doubled.
ALLOWED_MOVE = 0.02


@styled
def activity_figure(components: pd.DataFrame, tolerance: float) -> Figure:
    """Activity on triggered against clean inputs, what 99 % of each do not exceed (KL, nats): a dot a diff.

    Both axes are logarithmic; dots at or below zero lie in the shaded bands that read 0. A panel for each kind,
    the other kinds in pale grey behind it.

    Args:
        components: components.parquet.
        tolerance: of the census, in nats; drawn on both axes.
    """
    rows = components[components["diff_norm"] > 0].dropna(subset=["activity_clean_q99", "activity_triggered_q99"])
    if rows.empty:
        return empty_figure("activity: no component has a diff")
    values = rows[["activity_clean_q99", "activity_triggered_q99"]].to_numpy(dtype=float)
    floor, top = log_floor(values, np.array(tolerance)), max(float(values.max()), tolerance) * 3
    x, y = (floored(values[:, i], floor) for i in range(2))
    kinds = ordered(rows["kind"], KINDS)
    n_columns = min(3, len(kinds))
    n_rows = -(-len(kinds) // n_columns)
    figure = Figure(figsize=(max(5.0, 2.9 * n_columns + 0.6), 2.9 * n_rows + 0.5), layout="constrained")
    grid = figure.subplots(n_rows, n_columns, sharex=True, sharey=True, squeeze=False)
    for axes in grid.flat[len(kinds) :]:
        axes.set_visible(False)
    for kind, axes in zip(kinds, grid.flat, strict=False):
        own = (rows["kind"] == kind).to_numpy(dtype=bool)
        mark_floor(axes, "x", floor, top)
        mark_floor(axes, "y", floor, top)
        _dots(axes, x[~own], y[~own], ".", "#D4D4D4", 5)
        marker, colour = KIND_MARKERS.get(kind, "o"), KIND_COLOURS.get(kind, GREY)
        _dots(axes, x[own], y[own], marker, colour, 9 if own.sum() > 300 else 16)
        _tolerance_cross(axes, tolerance)
        alone = ((x <= tolerance) & (y > tolerance))[own].mean()
        axes.set_title(f"{KIND_LABELS.get(kind, kind)}:\n{alone:.0%} active only if triggered", loc="left")
    n_seeds = rows["seed"].nunique()
    figure.supxlabel("activity on clean inputs, 99 % of inputs at most (KL, nats)", fontsize=9)
    figure.supylabel("activity on triggered inputs, 99 % of inputs at most (KL, nats)", fontsize=9)
    note = f"one dot: one component in one of {counted(n_seeds, 'seed')}; dashed: stated tolerance {tolerance:g} nats"
    figure.suptitle(f"{note}; shaded: 0", fontsize=9)
    return figure


@styled
def share_figure(components: pd.DataFrame, tolerance: float) -> Figure:
    """Share of diffs that are always inactive on clean inputs (fraction) as a function of the tolerance.

    A panel for each measure, with a thin line a seed and a thick one for the mean, among all diffs and among
    those whose activity exceeds the stated tolerance on more than 1 % of triggered inputs. The last panels show
    how far the causal shares fall when the number of clean inputs is doubled from half to all.

    Args:
        components: components.parquet.
        tolerance: of the census, in nats; marked where the axis is in nats.
    """
    diffs = components[components["diff_norm"] > 0]
    if diffs.empty:
        return empty_figure("share: no component has a diff")
    matters = diffs[diffs["activity_triggered_q99"] > tolerance]
    populations = dict(zip(POPULATIONS, (diffs, matters), strict=True))
    figure = Figure(figsize=(9, 9.4), layout="constrained")
    panels = list(figure.subplots(3, 2).flat)
    for axes, (column, title, x_label) in zip(panels, MEASURES, strict=False):
        _share_panel(axes, populations, column, tolerance if column.startswith("activity") else None)
        axes.set_title(title, loc="left")
        axes.set_xlabel(x_label)
        axes.set_ylabel("share always inactive (fraction of diffs)")
    for axes, (column, where) in zip(panels[len(MEASURES) :], HALVED, strict=True):
        _doubling_panel(axes, populations, column, tolerance)
        axes.set_title(f"{where}: half the sample − all (shaded: ±{ALLOWED_MOVE:g})", loc="left")
    handles = [Line2D([], [], lw=2, label=name, **style) for name, style in POPULATIONS.items()]
    handles.append(Line2D([], [], color=GREY, lw=0.6, label="thin: one seed; thick: mean over seeds"))
    handles.append(Line2D([], [], color=BLACK, lw=0.9, ls=":", label=f"stated tolerance, {tolerance:g} nats"))
    figure.legend(handles=handles, loc="outside lower center", ncols=2, handlelength=3.2)
    return figure


def share_inactive(values: np.ndarray, tolerances: np.ndarray) -> np.ndarray:
    """Fraction of values at or below each tolerance; NaN where there are no values. NaN values are not counted."""
    values = np.sort(values[np.isfinite(values)])
    if not len(values):
        return np.full(len(tolerances), np.nan)
    return np.searchsorted(values, tolerances, side="right") / len(values)


def _tolerances(values: np.ndarray) -> np.ndarray:
    """A logarithmic grid over the positive values, from half a decade below the 0.1th percentile."""
    positive = values[np.isfinite(values) & (values > 0)]
    low, high = np.percentile(positive, [0.1, 100]) if len(positive) else (1e-6, 1.0)
    return np.geomspace(low / 3, high * 1.5, GRID_POINTS)


def _share_panel(axes: Axes, populations: dict[str, pd.DataFrame], column: str, tolerance: float | None) -> None:
    grid = _tolerances(populations["all diffs"][column].to_numpy(dtype=float))
    for name, rows in populations.items():
        curves = [share_inactive(own[column].to_numpy(dtype=float), grid) for _, own in rows.groupby("seed")]
        _curves(axes, grid, curves, list(rows["seed"].drop_duplicates().sort_values()), POPULATIONS[name])
    if tolerance is not None:
        axes.axvline(tolerance, color=BLACK, lw=0.9, ls=":")
    axes.set_xscale("log")
    axes.set_xlim(grid[0], grid[-1])
    mark_decades(axes.xaxis, grid[0], grid[-1])
    axes.set_ylim(-0.03, 1.03)
    axes.grid(**GRID)


def _doubling_panel(axes: Axes, populations: dict[str, pd.DataFrame], column: str, tolerance: float) -> None:
    """Share from half of the clean inputs minus share from all of them."""
    grid = _tolerances(populations["all diffs"][column].to_numpy(dtype=float))
    axes.axhspan(-ALLOWED_MOVE, ALLOWED_MOVE, color=PALE_GREY, lw=0, zorder=0)
    for name, rows in populations.items():
        curves = [
            share_inactive(own[f"{column}_half"].to_numpy(dtype=float), grid)
            - share_inactive(own[column].to_numpy(dtype=float), grid)
            for _, own in rows.groupby("seed")
        ]
        _curves(axes, grid, curves, list(rows["seed"].drop_duplicates().sort_values()), POPULATIONS[name])
    axes.axvline(tolerance, color=BLACK, lw=0.9, ls=":")
    axes.set_xscale("log")
    axes.set_xlim(grid[0], grid[-1])
    mark_decades(axes.xaxis, grid[0], grid[-1])
    axes.set_xlabel("tolerance (KL, nats)")
    axes.set_ylabel("difference of shares (fraction)")
    axes.grid(**GRID)


def _curves(axes: Axes, x: np.ndarray, curves: list[np.ndarray], seeds: list[int], style: dict[str, Any]) -> None:
    """A thin line for each seed (labelled `_seed N`) and a thick one for their mean."""
    if not curves:
        note_empty(axes)
        return
    for seed, curve in zip(seeds, curves, strict=True):
        axes.plot(x, curve, label=f"_seed {seed}", **{**style, "lw": 0.6, "alpha": 0.5, "ls": "-"})
    axes.plot(x, np.mean(curves, axis=0), label="_mean", lw=2, zorder=3, **style)


def _dots(axes: Axes, x: np.ndarray, y: np.ndarray, marker: str, colour: str, size: float) -> None:
    axes.scatter(x, y, s=size, marker=marker, color=colour, alpha=0.75, lw=0, rasterized=True)


def _tolerance_cross(axes: Axes, tolerance: float) -> None:
    axes.axvline(tolerance, color=BLACK, lw=0.8, ls="--")
    axes.axhline(tolerance, color=BLACK, lw=0.8, ls="--")
