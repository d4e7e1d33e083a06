"""Where slabs run: here, one after the other, or in loky's worker processes. One torch thread each."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
import torch
from loky import get_reusable_executor
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Task = tuple[Any, ...]


def run_all(work: Callable[..., None], tasks: Sequence[Task], totals: Sequence[int], meter: Path, workers: int) -> None:
    """Run `work(*task, tick)` for every task; `tick(n)` tells that n of the task's total are done.

    A failed task does not stop the others: all that can finish does, then the first error is raised.
    """
    np.zeros(len(tasks), dtype=np.int64).tofile(meter)
    with _bar(sum(totals)) as show:
        if workers == 1:
            torch.set_num_threads(1)
            errors = [_attempt(work, task, meter, i, show) for i, task in enumerate(tasks)]
        else:
            errors = _in_workers(work, tasks, meter, workers, show)
    meter.unlink()
    for error in filter(None, errors):
        raise error


def _attempt(
    work: Callable[..., None], task: Task, meter: Path, index: int, show: Callable[[int], None]
) -> Exception | None:
    try:
        _run(work, task, meter, index, show)
    except Exception as error:
        return error
    return None


def _in_workers(
    work: Callable[..., None], tasks: Sequence[Task], meter: Path, workers: int, show: Callable[[int], None]
) -> list[Exception | None]:
    executor = get_reusable_executor(
        min(workers, len(tasks)), initializer=_start_worker, initargs=(os.getpid(),), timeout=60
    )
    pending = futures = [executor.submit(_run, work, task, meter, i) for i, task in enumerate(tasks)]
    try:
        while pending:
            _, pending = wait(pending, timeout=0.3, return_when=FIRST_COMPLETED)
            show(int(np.fromfile(meter, dtype=np.int64).sum()))
    except BaseException:
        executor.shutdown(wait=True, kill_workers=True)
        raise
    executor.shutdown(wait=True)
    return [_explained(future.exception()) for future in futures]


def _explained(error: BaseException | None) -> Exception | None:
    if isinstance(error, BrokenProcessPool):
        return ValueError("a worker process died (out of memory?); run the same command again to go on")
    return error if isinstance(error, Exception) else None


def _start_worker(driver: int) -> None:
    """Ctrl-C is the driver's to handle. One thread: the same bits whatever the number of cores."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    threading.Thread(target=_end_with, args=(driver,), daemon=True).start()


def _end_with(driver: int) -> None:
    """Stop this worker once its driver is gone, whatever ended it: an orphan would only heat the room."""
    while os.getppid() == driver:
        time.sleep(0.5)
    os._exit(1)


def _run(
    work: Callable[..., None], task: Task, meter: Path, index: int, show: Callable[[int], None] | None = None
) -> None:
    counts = np.memmap(meter, dtype=np.int64, mode="r+")
    last = time.monotonic()

    def tick(steps: int) -> None:
        nonlocal last
        counts[index] += steps
        if show and time.monotonic() - last > 0.3:
            last = time.monotonic()
            show(int(counts.sum()))

    work(*task, tick)


@contextlib.contextmanager
def _bar(total: int) -> Any:
    """Progress with an estimate of what is left, on a terminal only."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
    with Progress(
        *columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("training and measuring", total=total)
        yield lambda done: bar.update(task, completed=done)
