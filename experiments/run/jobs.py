"""Runs jobs that need one another. Nothing here knows what they do.

The order in which they may start is graphlib's; where they run is the executor's
(experiments/run/executors.py).
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from graphlib import TopologicalSorter
from typing import Any

import numpy as np

from experiments.run.executors import Executor, explained, handing_over, metered


@dataclass(frozen=True)
class Job:
    """`work(*args, tick)`, to be run after the jobs that
    it needs; `tick(n)` says that n of `steps` are done.

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

    In loky the death of a worker ends all jobs that are at work, and nobody knows whose fault it
    was. All of them become suspects, and dying has cost them no attempt. Suspects are run one at a
    time, with nothing beside them: a job that dies while it is alone is at fault, and that does
    cost it an attempt.
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
        """A job to begin now, if there is one and fewer
        than `width` are running; it counts as an attempt.
        """
        if self.suspects:
            name = None if self.running else self.suspects.pop(0)
            is_alone = True
        else:
            free = (
                self.ready
                and len(self.running) < width
                and not self.alone & {*self.running.values()}
            )
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

    A failed job is tried again up to `retries` times, unless it raised ValueError. It does not stop
    the others: all that do not need it are run.

    Args:
        workers: jobs run at once; 0 means one a core (of the cluster).
        ended: hears of each job as it is done, or given up.
    """
    graph = TopologicalSorter({name: set(job.needs) & set(jobs) for name, job in jobs.items()})
    graph.prepare()
    queue = _Queue({name: i for i, name in enumerate(jobs)})
    failures: dict[str, Failure] = {}
    with (
        metered([job.steps for job in jobs.values()]) as meter,
        handing_over(executor, workers) as (submit, width),
    ):
        steps_done = np.memmap(meter, dtype=np.int64, mode="r+")
        while graph.is_active():
            queue.add(graph.get_ready())
            while (name := queue.next(width)) is not None:
                job = jobs[name]
                queue.running[submit(job.gpus, job.work, job.args, meter, queue.order[name])] = name
            if not queue.running:
                break  # what is left needs something that failed
            for future in wait(queue.running, return_when=FIRST_COMPLETED)[0]:
                name, error = queue.running.pop(future), explained(future.exception())
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
