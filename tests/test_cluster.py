"""The same sweep on a real Ray cluster of two nodes,
started here on loopback and ended by their handles.
"""

import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_sweep import write_sweep

from experiments.check.tiny_sweep import hashes

ROOT = Path(__file__).parent.parent
RAY = [sys.executable, "-m", "ray.scripts.scripts"]
# Without a mode, ray wants a token from nodes as soon as some run has left one in the home folder.
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def node(*words: str, folder: Path) -> "subprocess.Popen[str]":
    """One `ray start --block`: it lives as long as its handle is not ended."""
    environment = {**ENVIRONMENT, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1"}
    command = [*RAY, "start", "--block", "--num-cpus=1", "--disable-usage-stats", *words]
    with (folder / f"node{words[0].strip('-').split('=')[0]}.log").open("w") as log:
        return subprocess.Popen(
            command,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )


@pytest.fixture(name="cluster")
def two_nodes(tmp_path: Path) -> Iterator[str]:
    address = f"127.0.0.1:{free_port()}"
    port = address.rpartition(":")[2]
    nodes = [
        node(
            "--head",
            "--node-ip-address=127.0.0.1",
            f"--port={port}",
            "--include-dashboard=false",
            folder=tmp_path,
        )
    ]
    try:
        wait_for_nodes(address, 1)
        nodes.append(node(f"--address={address}", folder=tmp_path))
        wait_for_nodes(address, 2)
        yield address
    finally:
        for process in reversed(nodes):
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def wait_for_nodes(address: str, count: int) -> None:
    deadline, alive = time.monotonic() + 90, 0
    while time.monotonic() < deadline:
        listed = subprocess.run(
            [*RAY, "status", f"--address={address}"],
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
        )
        alive = len(re.findall(r"^\s*\d+ node_", listed.stdout, re.MULTILINE))
        if alive >= count:
            return
        time.sleep(0.5)
    raise AssertionError(f"{alive} of {count} nodes came up")


@pytest.mark.slow
def test_a_cluster_of_two_nodes_gives_the_bytes_of_one_process(tmp_path: Path, cluster: str):
    path = write_sweep(tmp_path)
    results = []
    for executor in ("ray", "here"):
        out = tmp_path / executor
        command = [sys.executable, "-m", "experiments.cli", "sweep", str(path), "--out", str(out)]
        environment = {**ENVIRONMENT, "RAY_ADDRESS": cluster}
        run = subprocess.run(
            [*command, "--executor", executor],
            env=environment,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert run.returncode == 0, run.stderr
        results.append(hashes(out))
    assert results[0] == results[1] and len(results[0]) > 20
    # Each node has one core, so stages that ran at the same time ran on both.
    journal = [
        json.loads(line)
        for line in (tmp_path / "ray" / ".stages" / "journal.jsonl").read_text().splitlines()
    ]
    spans = sorted((entry["at"] - entry["seconds"], entry["at"]) for entry in journal)
    assert any(begun < ended for (_, ended), (begun, _) in itertools.pairwise(spans))
