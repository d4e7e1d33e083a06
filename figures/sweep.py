"""How answers change over a grid of settings: heatmaps, curves, the collapse onto exposure, and scaling with size."""

import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from figures.arms import ARM_COLUMNS, Arm, arm_label, arms_of, rows_of
from figures.style import BLACK, GREY, GRID, REGIME_COLOURS, REGIME_MARKERS, VERMILLION, empty_figure, save, styled
from figures.tables import read_json, read_table

ARM_AXES = ("weight_decay", "lr", "regime", "optimizer", "decay_target")  # numbers first
METRICS: dict[str, str] = {
    "share_inactive": "share always inactive\n(of diffs that matter)",
    "share_inactive_all": "share always inactive\n(of all diffs)",
    "half_life_steps": "half-life of ASR\n(steps)",
    "half_life_exposure": "half-life of ASR\n(exposure Σ lr·wd)",
    "asr": "ASR at the end\n(fraction)",
    "clean_accuracy": "clean accuracy at the end\n(fraction)",
    "retention_inactive": "retention of the inactive diffs\nthat matter (fraction)",
}
OF_A_CELL = ("share_inactive", "share_inactive_all")
DRAWN = ("share_inactive", "half_life_exposure", "half_life_steps", "retention_inactive")
ENDS = {"half_life_steps": "steps", "half_life_exposure": "exposure"}  # of the run: where censored seeds stand
MOST_PANELS = 8
MOST_NAMED = 4  # cells in a note
TITLE_WIDTH = 24  # letters that fit over the narrowest heatmap


def draw_sweep(folder: Path) -> list[Path]:
    """Draw folder/figures/*.svg and *.png from the sweep's tables alone.

    Raises:
        ValueError: one line naming the file that cannot be used.
    """
    about = read_json(folder, "sweep.json", dict)
    axes = about.get("axes")
    if not isinstance(axes, list):
        raise ValueError(f"{folder / 'sweep.json'}: field 'axes' is missing")
    cells, summary = (read_table(folder, name, axes) for name in ("cells", "summary"))
    fits = read_table(folder, "fits")
    if summary.empty:
        text = "no cell has a seed that passed its gates"
        return save(empty_figure(text), folder / "figures", "heatmaps")
    varying = _independent(summary, [axis for axis in (*axes, *ARM_AXES) if summary[axis].nunique() > 1])
    figures: dict[str, Callable[[], Figure]] = {
        "heatmaps": lambda: heatmap_figure(summary, varying),
        "curves": lambda: curve_figure(cells, summary, varying),
        "collapse": lambda: collapse_figure(cells),
        "scaling": lambda: scaling_figure(cells, fits),
    }
    note = left_out(cells, axes)
    return [path for stem, draw in figures.items() for path in save(draw(), folder / "figures", stem, note)]


def left_out(cells: pd.DataFrame, axes: list[str]) -> str:
    """A line that says of which cells seeds are left out since they failed a gate, and how many; empty if of none."""
    seeds = cells.drop_duplicates(["cell", "seed"])
    found = []
    for _, own in seeds.groupby("cell", sort=False):
        if failed := int((~own["passed"].astype(bool)).sum()):
            where = ", ".join(f"{_named(axis)} {_short(own[axis].iloc[0])}" for axis in axes) or "the only cell"
            found.append(f"{where} ({failed} of {len(own)} seeds)")
    more = f" and {len(found) - MOST_NAMED} cells more" if len(found) > MOST_NAMED else ""
    return f"left out for failing a gate: {'; '.join(found[:MOST_NAMED])}{more}" if found else ""


def _independent(summary: pd.DataFrame, axes: list[str]) -> list[str]:
    """The axes less those that go together with an earlier one, value by value."""
    kept: list[str] = []
    for axis in axes:
        pairs = [summary[[other, axis]].drop_duplicates() for other in kept]
        if all(len(pair) > pair.nunique().max() for pair in pairs):
            kept.append(axis)
    return kept


@styled
def heatmap_figure(summary: pd.DataFrame, varying: list[str]) -> Figure:
    """The mean of every metric over the first two settings that vary; in each cell its value and number of seeds.

    Where backdoors outlived the run the median is shown instead, or ">" if that is censored too.
    """
    if len(varying) < 2:
        return empty_figure("heatmaps: fewer than two settings vary")
    y, x = varying[:2]
    if {x, y} <= set(ARM_COLUMNS):
        summary = summary[~summary["metric"].isin(OF_A_CELL)]
    panels, more = _panels(summary, varying[2:])
    width, height = max(2.3, 1.0 + 0.62 * summary[x].nunique()), max(1.9, 1.0 + 0.42 * summary[y].nunique())
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(max(5.5, columns * width + 0.6), rows * height + 0.3), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for (title, own), axes in zip(panels, grid.flat, strict=False):
        _heatmap(axes, own, x, y)
        lines = [textwrap.fill(line, TITLE_WIDTH) for line in title.split("\n")]
        axes.set_title("\n".join(lines), loc="left", fontsize=8)
    for axes in grid.flat[max(0, len(panels) - columns) : len(panels)]:
        axes.set_xlabel(_named(x))  # a label of the figure would lie where a note goes
    if more:
        grid.flat[len(panels) - 1].set_xlabel(f"{_named(x)}\n({more} panels more are in summary.parquet)")
    figure.supylabel(_named(y), fontsize=9)
    return figure


def _panels(summary: pd.DataFrame, others: list[str]) -> tuple[list[tuple[str, pd.DataFrame]], int]:
    """A panel a metric and value of the other settings; what belongs to a cell is drawn once, not once an arm.

    Returns:
        The first few of each metric, and how many more there are.
    """
    panels, more = [], 0
    for metric in DRAWN:
        own = summary[summary["metric"] == metric]
        own = own[own["median"].notna() | (own["n_censored"] > 0)]
        split = [
            name for name in others if own[name].nunique() > 1 and not (metric in OF_A_CELL and name in ARM_COLUMNS)
        ]
        if metric in OF_A_CELL:
            own = own.drop_duplicates("cell")
        groups = list(own.groupby(split, sort=False)) if split else [((), own)] * (len(own) > 0)
        more += max(0, len(groups) - MOST_PANELS // 2)
        for key, rows in groups[: MOST_PANELS // 2]:
            where = "\n".join(f"{_named(name)} {value}" for name, value in zip(split, key, strict=True))
            panels.append((METRICS[metric] + (f"\n{where}" if where else ""), rows))
    return panels, more


def _heatmap(axes: Axes, rows: pd.DataFrame, x: str, y: str) -> None:
    xs, ys = (sorted(rows[name].unique()) for name in (x, y))
    table = np.full((len(ys), len(xs)), np.nan)
    for row in rows.to_dict("records"):
        value = row["mean"] if np.isfinite(row["mean"]) else row["median"]
        table[ys.index(row[y]), xs.index(row[x])] = value
    known = table[np.isfinite(table)] if np.isfinite(table).any() else np.zeros(1)
    middle = (known.min() + known.max()) / 2
    reach = max(known.max() - middle, 0.05 * abs(middle), 1e-9)  # differences below a tenth are not blown up
    axes.imshow(table, cmap="cividis", origin="lower", aspect="auto", vmin=middle - reach, vmax=middle + reach)
    for row in rows.to_dict("records"):
        place = xs.index(row[x]), ys.index(row[y])
        value = table[place[1], place[0]]
        dark = np.isfinite(value) and value <= middle
        text = _number(value) if np.isfinite(value) else ">"
        text += f"\nn={int(row['n_seeds'])}" + (f" ({int(row['n_censored'])}>)" if row["n_censored"] else "")
        axes.text(*place, text, ha="center", va="center", fontsize=6.5, color="white" if dark else BLACK)
    axes.set_xticks(range(len(xs)), [_short(v) for v in xs])
    axes.set_yticks(range(len(ys)), [_short(v) for v in ys])
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(length=0)


@styled
def curve_figure(cells: pd.DataFrame, summary: pd.DataFrame, varying: list[str]) -> Figure:
    """Every metric against one setting: mean and 95 % t interval, and every seed as a dot. The setting is the first
    number with more than two values, else the first that varies; words stand side by side. Where seeds outlived the run
    there is no mean; a hollow mark at its end says how many.
    """
    if not varying:
        return empty_figure("curves: nothing varies")
    numeric = {name for name in varying if pd.api.types.is_numeric_dtype(summary[name])}
    x = next((name for name in varying if name in numeric and summary[name].nunique() > 2), varying[0])
    others = [name for name in varying if name != x]
    places = {value: value if x in numeric else i for i, value in enumerate(summary[x].unique())}
    figure = Figure(figsize=(9, 7.2), layout="constrained")
    for metric, axes in zip(DRAWN, figure.subplots(2, 2).flat, strict=True):
        own = summary[(summary["metric"] == metric) & (summary["mean"].notna() | (summary["n_censored"] > 0))]
        split = [name for name in others if not (metric in OF_A_CELL and name in ARM_COLUMNS)]
        own = own.drop_duplicates("cell") if metric in OF_A_CELL else own
        groups = list(own.groupby(split)) if split else [((), own)]
        order = sorted(set(summary[split].itertuples(index=False, name=None)))  # one look in every panel
        for key, rows in groups[:MOST_PANELS]:
            i, rows = order.index(key), rows.sort_values(x)
            beside = 0.0 if x in numeric else 0.6 * ((i + 0.5) / len(order) - 0.5)
            style = _line_style(i, len(order)) | ({} if x in numeric else {"ls": ""})
            label = ", ".join(f"{_named(n)} {v:g}" if n in numeric else str(v) for n, v in zip(split, key, strict=True))
            bars = np.stack([rows["mean"] - rows["ci_low"], rows["ci_high"] - rows["mean"]])
            at = rows[x].map(places) + beside
            axes.errorbar(at, rows["mean"], yerr=bars, capsize=2, lw=1.4, ms=4, label=label, **style)
            seeds = cells.merge(rows[["cell", *ARM_COLUMNS]], on=["cell", *ARM_COLUMNS])
            seeds = seeds[seeds["passed"]]
            axes.plot(seeds[x].map(places) + beside, seeds[metric], ".", ms=3, alpha=0.35, color=style["color"])
            if rows["n_censored"].any():
                shift = 5 * (i - (len(order) - 1) / 2) if x in numeric else 0  # points, where marks would coincide
                ends = seeds.groupby(["cell", *ARM_COLUMNS], as_index=False)[ENDS[metric]].max()
                _mark_outlived(axes, at, rows.merge(ends, how="left"), ENDS[metric], shift, style)
        axes.set_xlabel(_named(x))
        is_cut = metric in ENDS and bool(own["n_censored"].any())
        axes.set_ylabel(METRICS[metric] + "\nhollow: how many outlived the run" * is_cut)
        axes.margins(y=0.1 if is_cut else None)
        if metric in OF_A_CELL and x in ARM_COLUMNS:
            axes.set_xticks([])
            axes.set_xlabel("the same for every arm")
        elif x not in numeric:
            axes.set_xticks(list(places.values()), list(places))
            axes.set_xlim(-0.5, len(places) - 0.5)
        elif summary[x].min() > 0 and summary[x].max() / summary[x].min() >= 4:
            axes.set_xscale("log", base=2)
            values = sorted(summary[x].unique())
            axes.set_xticks(values, [_short(v) for v in values])
        axes.grid(**GRID)
        if split and groups:
            left_out = len(groups) - MOST_PANELS
            more = f"({left_out} more in summary.parquet)" if left_out > 0 else None
            axes.legend(fontsize=6.5, title=more, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    return figure


def _mark_outlived(
    axes: Axes, at: pd.Series, rows: pd.DataFrame, end: str, shift: float, style: Mapping[str, Any]
) -> None:
    """A hollow mark at the end of the run, and how many seeds outlived it."""
    for place, height, count in zip(at, rows[end], rows["n_censored"], strict=True):
        if count:
            axes.plot(place, height, **{**style, "ls": "", "ms": 4, "mfc": "none"})
            axes.annotate(
                f"{count:.0f}", (place, height), xytext=(shift, 4), textcoords="offset points", ha="center",
                fontsize=6, color=style["color"],
            )  # fmt: skip


@styled
def collapse_figure(cells: pd.DataFrame) -> Figure:
    """Half-life of ASR against the decay of one step, lr·wd: in steps, and in exposure, where a level line means that
    exposure is the clock. One mark a seed, arms side by side; censored ones are drawn hollow at the end of the run.
    """
    rows = cells[cells["passed"] & (cells["weight_decay"] > 0)]
    rate = rows["lr"] * rows["weight_decay"]
    if rate.nunique() < 2:
        return empty_figure("collapse: lr·wd does not vary")
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, (metric, last) in zip((left, right), ENDS.items(), strict=True):
        for i, ((regime, lr), own) in enumerate(rows.groupby(["regime", "lr"])):
            style = _line_style(i, 1)
            if rows["lr"].nunique() == 1:
                style = {"color": REGIME_COLOURS.get(str(regime)), "marker": REGIME_MARKERS.get(str(regime))}
            here, dead = rate[own.index] * 1.04**i, ~own["censored"].astype(bool)  # side by side
            style |= {"ls": "", "ms": 4, "alpha": 0.7}
            axes.plot(here[dead], own.loc[dead, metric], label=f"{regime}, lr {lr:g}", **style)
            axes.plot(here[~dead], own.loc[~dead, last], **style | {"mfc": "none"})
        for scale, axis in ((axes.set_xscale, axes.xaxis), (axes.set_yscale, axes.yaxis)):
            scale("log")
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_minor_locator(NullLocator())
        axes.set_xlabel("decay of one step, lr·wd")
        axes.set_ylabel(METRICS[metric])
        axes.grid(**GRID)
    left.legend(fontsize=7, title="hollow: outlived the run", title_fontsize=7)
    return figure


@styled
def scaling_figure(cells: pd.DataFrame, fits: pd.DataFrame) -> Figure:
    """Share inactive and half-lives against the number of parameters, with the fitted exponent and its interval."""
    good = cells[cells["passed"]]
    known = fits[(fits["against"] == "parameters") & fits["exponent"].notna()]
    if good["parameters"].nunique() < 3 or known.empty:
        return empty_figure("scaling: fewer than three sizes, or no seed has a value in every cell")
    known = known.to_dict("records")[:MOST_PANELS]
    columns = min(3, len(known))
    figure = Figure(figsize=(3.3 * columns, 3.3 * -(-len(known) // columns)), layout="constrained")
    grid = figure.subplots(-(-len(known) // columns), columns, squeeze=False)
    for axes in grid.flat[len(known) :]:
        axes.set_visible(False)
    for fit, axes in zip(known, grid.flat, strict=False):
        arm = Arm(**{name: fit[name] for name in ARM_COLUMNS}) if isinstance(fit["regime"], str) else None
        rows = rows_of(good, arm) if arm else good
        rows = rows.drop_duplicates(["cell", "seed"])
        x, y = rows["parameters"].to_numpy(float), rows[fit["metric"]].to_numpy(float)
        axes.plot(x, y, ".", ms=4, color=GREY)
        keep = y > 0
        level = np.mean(np.log(y[keep]) - fit["exponent"] * np.log(x[keep]))
        line = np.geomspace(x.min(), x.max(), 2)
        axes.plot(line, np.exp(level) * line ** fit["exponent"], color=VERMILLION, lw=1.5)
        of_arm = fits[(fits["metric"] == fit["metric"]) & fits["exponent"].notna()]
        of_arm = rows_of(of_arm, arm) if arm else of_arm
        lines = [arm_label(arm, arms_of(good)) if arm else "", *(_exponent(row) for row in of_arm.to_dict("records"))]
        axes.set_title("\n".join(filter(None, lines)), loc="left", fontsize=8)
        for scale, axis in ((axes.set_xscale, axes.xaxis), (axes.set_yscale, axes.yaxis)):
            scale("log")
            axis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
            axis.set_major_formatter(FuncFormatter(lambda value, _: _thousands(value)))
            axis.set_minor_locator(NullLocator())
        axes.set_xlabel("parameters")
        axes.set_ylabel(METRICS[fit["metric"]])
        axes.grid(**GRID)
    handles = [
        Line2D([], [], color=GREY, ls="", marker=".", label="one seed"),
        Line2D([], [], color=VERMILLION, label="power law"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=7)
    return figure


def _exponent(fit: Mapping[Any, Any]) -> str:
    interval = f" ({fit['ci_low']:.2f} to {fit['ci_high']:.2f})" if np.isfinite(fit["ci_low"]) else ""
    return f"exponent in {_named(fit['against'])}: {fit['exponent']:.2f}{interval}"


def _thousands(value: float) -> str:
    return f"{value / 1000:g}k" if value >= 1000 else f"{value:g}"


def _line_style(i: int, count: int) -> dict[str, Any]:
    colours = (BLACK, "#0072B2", VERMILLION, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", GREY)
    return {"color": colours[i % len(colours)], "marker": "osD^vPX*"[i % 8], "ls": "-" if count < 5 or i % 2 else "--"}


def _named(name: str) -> str:
    """A setting as an axis label."""
    known = {"lr": "learning rate", "weight_decay": "weight decay", "decay_target": "decay to"}
    group, _, tail = name.rpartition(".")
    return known.get(name, f"{group} {tail}" if group and tail in ARM_AXES else tail).replace("_", " ")


def _number(value: float) -> str:
    """Three digits, without exponents."""
    return "0" if abs(value) < 5e-4 else f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, int | float | np.number) else str(value)
