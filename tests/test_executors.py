"""How many workers there are, and what is said where a machine does not let them work."""

import builtins
import errno
import io
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny

from experiments import reproduce
from experiments.run import executors
from experiments.run.executors import cores, handing_over
from experiments.run.jobs import Job, run_all

QUOTA = "/sys/fs/cgroup/cpu.max"


@pytest.mark.parametrize(
    ("quota", "allowed", "expected"),
    [
        ("max 100000", {0, 1, 2, 3}, {0, 1, 2, 3}),
        ("100000 100000", {0, 1, 2, 3}, {0}),
        ("150000 100000", {1, 2, 3}, {1, 2}),
        ("20000 100000", {2, 3}, {2}),
        ("800000 100000", {2, 3}, {2, 3}),
    ],
)
def test_a_containers_quota_is_respected(
    quota: str, allowed: set[int], expected: set[int], monkeypatch: pytest.MonkeyPatch
):
    """Text stands in for the file in which Linux tells a container how much time it has, per period."""
    real_open, real_exists = builtins.open, os.path.exists

    def opened(path: Any, *words: Any, **named: Any) -> Any:
        return io.StringIO(quota) if path == QUOTA else real_open(path, *words, **named)

    monkeypatch.setattr(builtins, "open", opened)
    monkeypatch.setattr("os.path.exists", lambda path: path == QUOTA or real_exists(path))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: allowed)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert cores() == expected


def test_one_core_is_worked_on_without_worker_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    class Stop(Exception):
        pass

    asked: list[str] = []

    def run_all(_jobs: Any, executor: str, _workers: int) -> None:
        asked.append(executor)
        raise Stop

    monkeypatch.setattr(reproduce, "run_all", run_all)
    for width, workers in ((1, 0), (4, 0), (4, 1), (1, 2)):
        monkeypatch.setattr(reproduce, "cores", lambda width=width: set(range(width)))
        with pytest.raises(Stop):
            reproduce.reproduce(tiny(), tmp_path, workers, "")
    assert asked == ["here", "loky", "here", "loky"]


def test_a_notebook_keeps_its_torch_and_decides_no_number():
    """What runs in this process finds torch as in a new one, and leaves it as it was, however it ends."""

    def state() -> tuple[Any, ...]:
        empty = torch.empty(())
        return torch.get_num_threads(), empty.dtype, empty.device.type, torch.is_grad_enabled()

    def note(_tick: Any) -> None:
        seen.append(state())

    def fail(_tick: Any) -> None:
        raise ValueError("no")

    threads, seen = torch.get_num_threads(), []
    try:
        torch.set_num_threads(3)
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")
        with torch.no_grad():
            of_the_notebook = state()
            assert not run_all({"a": Job(note, ())}, "here", 1)
            assert "a" in run_all({"a": Job(fail, ())}, "here", 1)
            assert state() == of_the_notebook == (3, torch.float64, "meta", False)
        assert seen == [(1, torch.float32, "cpu", True)]
    finally:
        torch.set_num_threads(threads)
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


def test_without_shared_memory_workers_say_what_they_miss(monkeypatch: pytest.MonkeyPatch):
    """As in a container whose /dev/shm is read-only: semaphores cannot be made there."""

    def refused(*_words: Any, **_named: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(executors, "get_reusable_executor", refused)
    with (
        pytest.raises(OSError, match="shared memory to talk; one worker does without") as raised,
        handing_over("loky", 2) as (submit, _),
    ):
        submit(0)
    assert raised.value.filename == "/dev/shm"


def test_a_folder_too_deep_for_rays_sockets_is_named_before_ray_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / ("deep" * 10)))
    with pytest.raises(ValueError, match=r"RAY_TMPDIR: .*deep.*shorter"), handing_over("ray", 1):
        pass
