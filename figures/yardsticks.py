"""What training takes of the margin, by step, by movement and by what has been learnt."""

from itertools import count
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from figures.panels import THIN_AND_THICK, draw_curves, with_legend
from figures.style import (
    GREY,
    GRID,
    WIDTH,
    empty_figure,
    note_empty,
    regime_colour,
    regime_marker,
    styled,
    with_foot,
)
from figures.views import YARDSTICKS, OverSeeds

LABELS = {
    "step": "step",
    "displacement": "distance of all weights\nfrom the start",
    "novel_accuracy": "right on the new skill\n(fraction of prompts)",
}
# arms of one regime have its colour and marker, and differ in this
DASHES = ("-", (0, (5, 1.5)), (0, (1, 1.2)), (0, (6, 1.5, 1, 1.5)), (0, (2.5, 1)))


@styled
def yardstick_figure(curves: OverSeeds) -> Figure:
    """Margin lost (nats) under every arm without decay, against each yardstick: a thin line a seed, a
    thick one for the mean of both.

    Args:
        curves: of `yardstick_curves`.
    """
    if curves.seeds.empty:
        return empty_figure("yardsticks: no rows")
    arms = curves.seeds[["arm", "name", "regime"]].drop_duplicates()
    styles = _styles(list(arms.itertuples(index=False, name=None)))
    drawn = [name for name in YARDSTICKS if (curves.seeds["yardstick"] == name).any()]
    figure = Figure(figsize=(WIDTH, 2.7 + 0.1 * len(arms)), layout="constrained")
    for axes, name in zip(
        figure.subplots(1, len(drawn), sharey=True, squeeze=False)[0], drawn, strict=True
    ):
        of_yardstick = curves.where(yardstick=name)
        axes.axhline(0, color=GREY, lw=0.6, zorder=1)
        for arm, style in styles.items():
            draw_curves(axes, of_yardstick.where(arm=arm), style)
        if of_yardstick.middle.empty:
            note_empty(axes)
        axes.set_xlabel(LABELS[name])
        axes.locator_params(axis="x", nbins=5)
        axes.grid(**GRID)
        if axes is figure.axes[0]:
            axes.set_ylabel("margin lost (nats)")
    names = dict(zip(arms["arm"], arms["name"], strict=True))
    handles = [Line2D([], [], lw=2, label=names[arm], **style) for arm, style in styles.items()]
    count = curves.seeds["seed"].nunique()
    return with_foot(with_legend(figure, handles), count, THIN_AND_THICK)


def _styles(arms: list[tuple[str, str, str]]) -> dict[str, dict[str, Any]]:
    """Of each arm (key, name, regime): its regime's colour and marker, and a dash of its own there."""
    places = {regime: count() for _, _, regime in arms}
    return {
        arm: {
            "color": regime_colour(regime),
            "marker": regime_marker(regime),
            "ms": 3,
            "ls": DASHES[next(places[regime]) % len(DASHES)],
        }
        for arm, _, regime in arms
    }
