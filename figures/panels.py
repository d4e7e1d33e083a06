"""Grids of panels, one for each arm of a study among them, and the curves in a panel."""

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from figures.style import GRID, WIDTH
from figures.views import OF_ARM, OverSeeds

MOST_COLUMNS = 3
TITLE_LETTERS = 15  # that an inch holds
# Panels share one exposure axis, so that they can be compared, unless that would squeeze one to a
# sliver.
MOST_SQUEEZE = 6
# what `draw_curves` draws, for the foot of a figure
THIN_AND_THICK = "thin line: one seed, thick line: mean over seeds"
AXIS_LABELS = {
    "exposure": "decay so far, Σ lr·wd",
    "step": "step, without decay",
    "relearning": "step of relearning",
}


def panel_grid(
    count: int,
    most_columns: int,
    height: float,
    more: float = 0.0,
    shared: bool = False,
) -> tuple[Figure, list[Axes]]:
    """A figure with so many panels, left to right and row by row.

    Args:
        height: of a panel, in inches.
        more: inches of height that the figure needs besides.
        shared: whether all panels have the same axes.
    """
    n_rows, n_columns = shape(count, most_columns)
    figure = Figure(figsize=(WIDTH, n_rows * height + more), layout="constrained")
    panels = list(
        figure.subplots(n_rows, n_columns, squeeze=False, sharex=shared, sharey=shared).flat
    )
    for axes in panels[count:]:
        axes.set_visible(False)
    return figure, panels[:count]


def draw_curves(axes: Axes, curves: OverSeeds, style: dict[str, Any]) -> None:
    """A thin line for each seed (labelled `_seed N`) and a
    thick one for their mean, through columns x and value.
    """
    for seed, rows in curves.seeds.dropna(subset=["x", "value"]).groupby("seed"):
        # a line through one point is nothing to see
        marker = "" if len(rows) > 1 else "."
        thin = {**style, "lw": 0.6, "alpha": 0.5, "ls": "-", "marker": marker}
        axes.plot(rows["x"], rows["value"], label=f"_seed {seed}", **thin)
    if not curves.middle.empty:
        axes.plot(
            curves.middle["x"], curves.middle["value"], label="_mean", lw=2, zorder=3, **style
        )


def arm_panels(
    rows: pd.DataFrame, *stacked: tuple[str, float]
) -> tuple[Figure, list[tuple[str, list[Axes]]]]:
    """A figure with one titled panel, or some on top of each other, for each arm, in the order of
    the rows.

    Args:
        rows: of a view, with the columns OF_ARM and `x`; must not be empty.
        stacked: label of the y-axis, shared by all arms, and height in inches, of each of an arm's
            panels from top to bottom.

    Returns:
        The figure, and the key and the panels of every arm.
    """
    arms = rows.groupby(OF_ARM, sort=False)[["x"]].max().reset_index()
    n_rows, n_columns = shape(len(arms), MOST_COLUMNS)
    cells = [divmod(i, n_columns) for i in range(len(arms))]
    heights = [height for _, height in stacked]
    figure = Figure(figsize=(WIDTH, sum(heights) * n_rows + 0.8), layout="constrained")
    grid = figure.subplots(
        n_rows * len(stacked), n_columns, squeeze=False, height_ratios=heights * n_rows
    )
    for axes in grid.flat:
        axes.set_visible(False)
    panels: list[tuple[str, list[Axes]]] = []
    for (row, column), arm, limit in zip(
        cells, arms.to_dict("records"), _limits(arms), strict=True
    ):
        of_arm = list(grid[row * len(stacked) : (row + 1) * len(stacked), column])
        for axes, first, (y_label, _) in zip(of_arm, grid[:, 0], stacked, strict=False):
            axes.set_visible(True)
            if axes is not first:
                axes.sharey(first)
            axes.set_xlim(0, limit)
            axes.locator_params(axis="x", nbins=4)
            axes.locator_params(axis="y", nbins=5)
            axes.xaxis.set_major_formatter("{x:g}")
            axes.grid(**GRID)
            axes.tick_params(labelbottom=axes is of_arm[-1], labelleft=column == 0)
            if column == 0:
                axes.set_ylabel(y_label)
        of_arm[0].set_title(broken(arm["name"], WIDTH / n_columns - 0.35), loc="left")
        of_arm[-1].set_xlabel(AXIS_LABELS[arm["axis"]])
        panels.append((arm["arm"], of_arm))
    return figure, panels


def with_legend(figure: Figure, handles: Sequence[Line2D | Patch], columns: int = 2) -> Figure:
    """The figure with a legend of curves below all its panels; the layout makes room for it.

    Args:
        columns: of the legend.
    """
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, handlelength=3.2)
    return figure


def lanes(seeds: pd.Series, height: float) -> dict[int, float]:
    """Each seed's place above or below the middle of a row of marks so high."""
    drawn = sorted(seeds.unique())
    places = np.linspace(-height / 2, height / 2, len(drawn)) if len(drawn) > 1 else [0.0]
    return dict(zip(drawn, places, strict=True))


def broken(name: str, inches: float) -> str:
    """A name that is too long for one line so wide is broken: after a comma, or else at a blank."""
    most = int(TITLE_LETTERS * inches)
    *first, last = name.split(", ")
    lines = [""]
    for said in [*(f"{clause}," for clause in first), last]:
        joined = f"{lines[-1]} {said}".strip()
        lines[-1:] = [joined] if len(joined) <= most else [lines[-1], *textwrap.wrap(said, most)]
    return "\n".join(filter(None, lines))


def shape(count: int, most_columns: int) -> tuple[int, int]:
    """Rows and columns of so many panels: as few rows as can be, and then as few columns."""
    n_rows = -(-count // most_columns)
    return n_rows, -(-count // n_rows)


def _limits(arms: pd.DataFrame) -> list[float]:
    """Right end of every arm's x-axis: shared by arms that
    are drawn against the same thing, where that reads well.
    """
    ends = arms["x"].where(arms["x"] > 0, 1.0)
    most, least = (ends.groupby(arms["axis"]).transform(which) for which in ("max", "min"))
    return list(1.02 * ends.where(most > MOST_SQUEEZE * least, most))
