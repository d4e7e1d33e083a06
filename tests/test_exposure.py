"""What a recipe's decay does, against arithmetic that a machine does by itself."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import TrainingArguments

from experiments.exposure import (
    BITS,
    PUBLISHED,
    Precision,
    Training,
    exposure_table,
    felt,
    read_training,
)


def rows(*args: float | str) -> dict[str, str]:
    table = exposure_table(*args)  # pyright: ignore[reportArgumentType]
    return dict(zip(*(column.cells for column in table.columns), strict=True))


def test_numbers_by_hand():
    """A thousandth a step: half is left after log(2)/0.001 steps, and e^-1 after a thousand."""
    told = rows(1e-2, 0.1, 1000)
    assert told["decay exposure, sum of lr * wd"] == "1"
    assert told["left of a weight that nothing holds"] == "0.3677"
    assert told["it has halved after"] == "693 steps"
    assert rows(1e-2, 0.1, 692)["it has halved after"] == "not in this run"
    linear = rows(1e-2, 0.1, 1000, "linear")
    assert float(linear["decay exposure, sum of lr * wd"]) == pytest.approx(0.5005, abs=6e-4)
    assert {name: told[f"of {name}"] for name, _ in PUBLISHED} == {
        n: f"{e:.2g}" for n, e in PUBLISHED
    }


@given(st.sampled_from([*BITS]), st.floats(-0.9, 0.9), st.integers(0, 100))
def test_a_step_is_felt_where_the_machine_feels_it(precision: Precision, off: float, seed: int):
    """Of weights of every significand, around the two thresholds."""
    dtype = getattr(torch, precision)
    generator = torch.Generator().manual_seed(seed)
    ends = torch.tensor([1.0, 1 + 2.0 ** (1 - BITS[precision])])  # one, and the next number
    weights = torch.cat([ends, 1 + torch.rand(500, generator=generator)]).to(dtype)
    step = 2.0 ** (-BITS[precision] - 0.5 + off)
    moved = (weights.double() * (1 - step)).to(dtype) != weights
    said = felt(step, precision)
    if "lost on every" in said:
        assert not moved.any()
    elif "felt by every" in said:
        assert moved.all()
    else:
        assert moved.any() and not moved.all()


def test_no_decay_is_said():
    assert felt(0.0, "float32") == "there is none"
    assert rows(1e-3, 0.0, 10)["left of a weight that nothing holds"] == "1"


@pytest.mark.parametrize(
    ("args", "why"),
    [
        ((-1.0, 0.1, 10), "^lr: must be 0 or more, not -1$"),
        ((1e-3, -0.1, 10), "^wd: must be 0 or more, not -0.1$"),
        ((1e-3, np.nan, 10), "^wd: must be 0 or more, not nan$"),
        ((1e-3, 0.1, 0), "^steps: must be 1 or more, not 0$"),
        ((1.0, 2.0, 10), "^weight_decay: lr"),
    ],
)
def test_what_is_out_of_range_is_named(args: tuple, why: str):
    with pytest.raises(ValueError, match=why):
        rows(*args)


def test_a_trainers_own_record_is_read(tmp_path: Path):
    """From the pickle, from its folder, and from plain text with the same names."""
    args = TrainingArguments(
        output_dir=str(tmp_path), learning_rate=2e-5, weight_decay=0.1, max_steps=300,
        lr_scheduler_type="cosine", warmup_steps=10, use_cpu=True,
    )  # fmt: skip
    torch.save(args, tmp_path / "training_args.bin")
    wanted = Training(2e-5, 0.1, 300, "cosine", 10)
    assert read_training(tmp_path) == read_training(tmp_path / "training_args.bin") == wanted
    plain = {"learning_rate": 2e-5, "weight_decay": 0.1, "lr_scheduler_type": "cosine"}
    (tmp_path / "config.json").write_text(json.dumps({**plain, "warmup_ratio": 0.1}))
    with pytest.raises(ValueError, match=r"config.json: max_steps: says nothing"):
        read_training(tmp_path / "config.json")
    assert read_training(tmp_path / "config.json", 100) == Training(2e-5, 0.1, 100, "cosine", 10)
    (tmp_path / "trainer_state.json").write_text('{"global_step": 50}')
    assert read_training(tmp_path / "config.json").steps == 50
    (tmp_path / "config.json").write_text(json.dumps({**plain, "lr_scheduler_type": "polynomial"}))
    with pytest.raises(ValueError, match=r"lr_scheduler_type: polynomial is none of"):
        read_training(tmp_path / "config.json")


class Poison:
    """Unpickled, it would write a file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch poisoned",)


def test_a_pickle_that_would_run_something_is_refused_and_runs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    torch.save(Poison(), "training_args.bin")
    with pytest.raises(ValueError, match=r"^training_args.bin: is no Trainer's training_args"):
        read_training(Path("training_args.bin"))
    assert not Path("poisoned").exists()
    Path("training_args.bin").write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match=r"^training_args.bin: is no Trainer's training_args"):
        read_training(Path("training_args.bin"))
